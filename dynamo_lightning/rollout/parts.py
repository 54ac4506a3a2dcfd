"""A batch sampled in parts: a pilot, and together with it what its outcomes cannot change of the commit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from dynamo_lightning.distributed import rank, run_seed, stop_together, world_size
from dynamo_lightning.rollout.requests import make_requests, share_of_rank
from dynamo_lightning.types import Key, PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynamo_lightning.rollout.collect import RolloutCollector


def certain_commit(batch: PromptBatch) -> PromptBatch | None:
    """The first rollouts of each pilot's commit group, as many as it has in any case; `None` without a pilot."""
    plans = [
        replace(plan, size=plan.commit_least, first_sample_index=plan.first_sample_index + plan.size)
        for plan in batch.plans
        if plan.commit_least and not plan.first_sample_index
    ]
    return PromptBatch(batch.iteration, plans) if plans else None


class PartSampler:
    """Samples the parts of a batch, one after the other.

    The least size of every commit group is known before the pilot. So many of its rollouts are requested together with
    the pilot's; the rest is requested when the whole batch's pilots are scored. An engine that takes requests as they
    come (`works_ahead`) samples the first while pilots are scored and the rest is placed; any other samples them in one
    go with the pilots. Sample indices and seeds, hence the rollouts, are the same as if the parts were sampled one
    after the other, and sizes follow from the pilots' outcomes alone, whatever is finished first.

    Args:
        collector: Samples and scores.
        policy: The current policy.
        tokenizer: Decodes the responses.
    """

    def __init__(
        self, collector: RolloutCollector, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.collector = collector
        self.policy = policy
        self.tokenizer = tokenizer
        self._early_keys: set[Key] = set()
        """Rollouts of the next part that are requested already, on all ranks."""
        self._early: Callable[[], list[Rollout]] = list
        """Gives this rank's share of them; waits until they are there."""
        self._filler: Rollout | None = None

    def sample(self, part: PromptBatch) -> tuple[list[Rollout], Rollout]:
        """This rank's share of the part's rollouts, and one rollout that every rank has even if its share is empty.

        Args:
            part: A pilot, what follows it, or a batch that is all of one part.
        """
        self.collector.scorer.watch.expect(sum(part.group_sizes))
        following = certain_commit(part)
        if following is None:
            return self._sample_rest(part)
        if self.collector.generator.works_ahead:
            return self._sample_concurrently(part, following)
        return self._sample_together(part, following)

    def _sample_rest(self, part: PromptBatch) -> tuple[list[Rollout], Rollout]:
        """This rank's share of what is left of a part, and one rollout that every rank has."""
        early_keys, early, filler = self._early_keys, self._early, self._filler
        self._early_keys, self._early, self._filler = set(), list, None
        wanted = {key for plan in part.plans for key in plan.keys} - early_keys
        rest: list[Rollout] = []
        if not self.collector.generator.works_ahead:  # they are there
            self.collector.submit(early())
        if wanted or filler is None:
            rest, filler = self.collector.sample(
                self.policy,
                self.tokenizer,
                part,
                "train",
                self.collector.sampling.temperature,
                wanted=wanted if early_keys else None,
            )
        return early() + rest, filler

    def _sample_together(self, part: PromptBatch, following: PromptBatch) -> tuple[list[Rollout], Rollout]:
        """The pilot and what is certain to follow, in one go; only the pilot is scored already."""
        self._early_keys = {key for plan in following.plans for key in plan.keys}
        rollouts, self._filler = self.collector.sample(
            self.policy,
            self.tokenizer,
            PromptBatch(part.iteration, (*part.plans, *following.plans)),
            "train",
            self.collector.sampling.temperature,
            scored_later=self._early_keys,
        )
        own = [rollout for rollout in rollouts if rollout.key not in self._early_keys]
        early = [rollout for rollout in rollouts if rollout.key in self._early_keys]
        self._early = lambda: early
        return own, self._filler

    def _sample_concurrently(self, part: PromptBatch, following: PromptBatch) -> tuple[list[Rollout], Rollout]:
        """The pilot, while what is certain to follow is sampled in the background."""
        self._early_keys = {key for plan in following.plans for key in plan.keys}
        self.policy.eval()
        # A thread each, the pilot's first: everything waits for it.
        threads = ThreadPoolExecutor(max_workers=2)
        futures = [self._in_background(batch, threads) for batch in (part, following)]
        threads.shutdown(wait=False)
        self._early = lambda: _own_share(*futures[1])
        pilots = _result(futures[0][0])
        self._filler = pilots[0]
        return pilots[: len(pilots) - futures[0][1]], pilots[0]

    def _in_background(self, batch: PromptBatch, threads: ThreadPoolExecutor) -> tuple[Future[list[Rollout]], int]:
        """This rank's share of a batch, under way, and how many rollouts at its end only fill it up."""
        requests, num_filled_up = share_of_rank(make_requests(batch, "train", run_seed()), rank(), world_size())
        sample = self.collector.sample_in_background(self.policy, self.tokenizer, requests)
        return threads.submit(sample), num_filled_up


def _own_share(under_way: Future[list[Rollout]], num_filled_up: int) -> list[Rollout]:
    rollouts = _result(under_way)
    return rollouts[: len(rollouts) - num_filled_up]


def _result(under_way: Future[list[Rollout]]) -> list[Rollout]:
    """Rollouts that were sampled; an error of any rank is raised on all, which would wait for it."""
    rollouts: list[Rollout] = []
    message = ""
    try:
        rollouts = under_way.result()
    except (RuntimeError, ValueError) as error:
        message = str(error)
    stop_together(message)
    return rollouts
