"""Experience: rollouts with all that has to be known of a whole batch before the policy is trained on any of it.

A pass of the policy over the rollouts, without gradient, gives `old_logprobs`, the entropies and the modulated token
advantages, whose normalisers need the whole batch. A single update of plain advantages needs nothing of it beforehand:
it computes the same policy's statistics itself, so that the pass takes only the rollouts that are not trained on, for
their entropies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamo_lightning.distributed import gather_objects, gather_values, sum_over_ranks
from dynamo_lightning.losses.engine_mismatch import engine_weights, mismatch_metrics
from dynamo_lightning.losses.modulation import ModulatedAdvantages
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.types import RolloutBatch
from dynamo_lightning.update.known import know
from dynamo_lightning.update.logprobs import all_statistics, token_keys
from dynamo_lightning.update.plan import UpdatePlan, plan_step
from dynamo_lightning.update.probe import mean_probe_entropy, probe_rollouts
from dynamo_lightning.update.sampling_check import (
    LogpDifference,
    sampled_logprobs,
)
from dynamo_lightning.update.settings import UpdateSettings
from dynamo_lightning.update.token_weights import step_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Experience:
    """Rollouts with all that is known of their tokens before the first update."""

    batch: RolloutBatch
    plan: UpdatePlan
    """Use of each rollout in the steps to come."""
    old_logprobs: Tensor | None
    """log π_old of this rank's response tokens, `[num_tokens]`, at the policy that sampled them; `None` if the only
    update starts from that policy and needs not be told."""
    modulated: ModulatedAdvantages
    """Final advantages of this rank's response tokens, `[num_tokens]`; raw ones if the modulation is recomputed."""
    reference_logprobs: Tensor | None
    """log π_ref of this rank's response tokens, `[num_tokens]`; only with a KL term."""
    metrics: Mapping[str, float]
    """Global means over all response tokens."""
    entropy: float
    """Part of the mean entropy of all response tokens, all ranks, nats: all of it, or without `old_logprobs` only that
    of the tokens that are not trained on."""
    token_selection: Tensor | None = None
    """The penalty's `token_selection` of this rank's response tokens, `[num_tokens]`; only if it selects some."""
    engine_weights: Tensor | None = None
    """Importance weights of this rank's response tokens, `[num_tokens]`; only if another engine sampled them."""
    difference: LogpDifference = field(default_factory=LogpDifference)
    """Between the log-probabilities of sampling and of training: of all tokens and ranks if the plan compares
    beforehand, else only of this rank's tokens that are not trained on."""
    logp_tolerance: float | None = None
    """Largest mean difference that an update starts with; `None` checks nothing."""
    token_entropy: Tensor | None = None
    """Entropy of this rank's response tokens before the update, nats, `[num_tokens]`; NaN where it was not computed."""
    modulation_inputs: ModulationInputs | None = None
    """Input that the modulation was computed from; only if it has candidates for later steps."""
    probe: Tensor | None = None
    """This rank's rollouts whose entropy is measured again after the steps, `[num_rollouts]`, bool; `None`: nothing is
    measured, on no rank."""
    probe_entropy: float | None = None
    """Their mean token entropy before the steps, all ranks, nats."""


def prepare_experience(
    policy: PreTrainedModel,
    batch: RolloutBatch,
    settings: UpdateSettings,
    reference: AbstractContextManager[PreTrainedModel] | None = None,
    logp_tolerance: float | None = None,
) -> Experience:
    """Run the policy, and the reference if there is one, over the rollouts; modulate, select and weight the tokens.

    Args:
        policy: What the rollouts were sampled from, to rounding.
        batch: This rank's rollouts with their advantages.
        settings: The loss, whose modulation and penalty need statistics of the whole batch, and the token budget.
        reference: Gives the frozen policy of a KL term, which may be the policy itself without its adapters.
        logp_tolerance: Largest mean difference of the log-probabilities of sampling and of training, nats; `None`
            checks nothing.

    Raises:
        RunError: If a log-probability is not finite, or the difference is larger, on all ranks.
    """
    loss = settings.loss
    known = know(policy, batch, settings, logp_tolerance)
    batch, plan, statistics = known.batch, known.plan, known.statistics
    advantages = batch.advantages[batch.token_rollouts].to(policy.device)
    modulated, token_selection = ModulatedAdvantages(advantages), None

    def keys() -> Tensor:
        return token_keys(batch, policy.device)

    def weights_of_tokens() -> Tensor:
        whole = plan_step(batch, loss, torch.ones(len(batch.group_sizes), dtype=torch.bool), policy.device)
        return step_weights(batch, loss, whole, settings.max_response_length).to(policy.device)

    inputs = ModulationInputs(statistics, advantages, gather_values, keys, token_weights=weights_of_tokens)
    if loss.batch_modulation is not None:
        modulated = loss.batch_modulation(inputs)
    if loss.penalty is not None:
        token_selection = loss.penalty.token_selection(inputs)
    means = {"entropy": statistics.entropy, **modulated.indicators}
    totals = sum_over_ranks({name: float(value.sum()) for name, value in means.items()})
    num_tokens = int(batch.group_tokens.sum())
    reference_logprobs = None
    if reference is not None:
        with reference as frozen:
            everything = range(len(batch.rollouts))
            found = all_statistics(frozen, batch, everything, settings.config, settings.temperature)
            reference_logprobs = found.logprobs
    metrics = {name: total / num_tokens for name, total in totals.items()}
    entropy = metrics.pop("entropy")
    metrics.update(known.metrics)
    probe = probe_rollouts(batch, loss)
    before = mean_probe_entropy(statistics, batch, probe) if probe is not None else None
    weights = None
    if settings.uses_external_engine:
        rollouts = batch.token_rollouts.to(policy.device)
        engine_logprobs = sampled_logprobs([rollout.logprobs for rollout in batch.rollouts], statistics.logprobs)
        weights, summary = engine_weights(statistics.logprobs, engine_logprobs, rollouts, loss.engine_mismatch)
        metrics.update(mismatch_metrics(gather_objects([summary])))
    return Experience(
        batch,
        plan,
        old_logprobs=statistics.logprobs if plan.needs_old_logprobs else None,
        modulated=modulated,
        reference_logprobs=reference_logprobs,
        metrics=metrics,
        entropy=entropy,
        token_selection=token_selection,
        engine_weights=weights,
        difference=known.difference,
        logp_tolerance=logp_tolerance,
        token_entropy=statistics.entropy.where(known.is_known, math.nan),
        modulation_inputs=inputs if modulated.candidates is not None else None,
        probe=probe,
        probe_entropy=before,
    )
