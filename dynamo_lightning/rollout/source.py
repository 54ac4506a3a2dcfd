"""The groups of each batch, sampled now or up to `max_staleness` iterations earlier.

Strictly first in, first out: with `max_staleness` S, batch t + S is sampled with the weights that iteration t begins
with. So one Lightning batch stays one RL iteration, and the same run gives the same numbers, whatever the engine's
speed. An engine that runs elsewhere samples while the policy is trained; any other samples at once, which gains no time
but gives the same data.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dynamo_lightning.distributed import rank, run_seed, world_size
from dynamo_lightning.rollout.collect import RolloutCollector
from dynamo_lightning.rollout.in_flight import RolloutsInFlight
from dynamo_lightning.rollout.requests import make_requests, share_of_rank
from dynamo_lightning.types import Collected, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Actor:
    """The policy as it samples, with what belongs to it."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    version: int
    """Optimizer steps so far."""
    sync: Callable[[], None]
    """Has the engine sample from these weights."""
    rest: Callable[[], None]
    """Tells the engine that nothing is sampled for a while."""


class RolloutSource:
    """Gives each batch's groups.

    Args:
        collector: Samples and scores.
        max_staleness: RL iterations that the weights which sampled a batch may be older than those that are trained
            on it; 0 samples each batch when it is due.
    """

    def __init__(self, collector: RolloutCollector, max_staleness: int = 0) -> None:
        self.collector = collector
        self.max_staleness = max_staleness
        self.in_flight = RolloutsInFlight()

    def next(
        self, batch: PromptBatch, actor: Actor, datamodule: Any, phase: Callable[[str], AbstractContextManager[None]]
    ) -> Collected:
        """The groups of a batch with their outcomes; the batches that may follow it are begun.

        Args:
            batch: The global batch of this iteration.
            actor: The policy.
            datamodule: Observes the outcomes and plans the batches that follow.
            phase: Timer of a phase, a context manager by its name.
        """
        taken = self.in_flight.take(batch)
        if taken is None:
            actor.sync()
        collected = self.collector.collect(actor.policy, actor.tokenizer, datamodule, batch, phase, taken)
        metrics = dict(collected.metrics)
        if self.collector.generator.push_difference is not None:
            metrics["sampling/push_logp_difference"] = self.collector.generator.push_difference
        if self.max_staleness:
            metrics["sampling/staleness"] = float(actor.version - collected.filler.turns[0].version)
            self.begin(datamodule.upcoming(self.max_staleness), batch.iteration, actor, phase)
        actor.rest()
        return replace(collected, metrics=metrics)

    def begin(
        self,
        batches: list[PromptBatch],
        iteration: int,
        actor: Actor,
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Have those of the batches sampled that are not under way yet, from the weights as they are now."""
        new = [batch for batch in batches if batch not in self.in_flight]
        if not new:
            return
        actor.policy.eval()
        actor.sync()
        for batch in new:
            if self.collector.generator.works_ahead:
                requests, num_filled_up = share_of_rank(make_requests(batch, "train", run_seed()), rank(), world_size())
                sample = self.collector.sample_in_background(actor.policy, actor.tokenizer, requests)
                self.in_flight.begin(batch, iteration, num_filled_up, sample)
            else:
                with phase("generate"):
                    rollouts, filler = self.collector.sample(
                        actor.policy, actor.tokenizer, batch, "train", self.collector.sampling.temperature, submit=False
                    )
                self.in_flight.add(batch, iteration, rollouts, filler)
