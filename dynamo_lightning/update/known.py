"""Statistics of the response tokens that are known before the first optimizer step.

They come from a pass of the policy over the rollouts, or from the engine where it is the policy itself that sampled;
then only a few rollouts are passed, to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamo_lightning.losses.token_statistics import TokenStatistics, columns_of
from dynamo_lightning.types import RolloutBatch
from dynamo_lightning.update.advantages import with_advantages
from dynamo_lightning.update.logprobs import all_statistics, check_finite, engine_statistics
from dynamo_lightning.update.plan import UpdatePlan, row_indices
from dynamo_lightning.update.sampling_check import (
    LogpDifference,
    check_difference,
    check_statistics,
    global_difference,
    sampled_logprobs,
)
from dynamo_lightning.update.settings import UpdateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class KnownStatistics:
    """Statistics of this rank's response tokens before the first step, and the plan of the steps."""

    batch: RolloutBatch
    """With its advantages."""
    plan: UpdatePlan
    statistics: TokenStatistics
    """`[num_tokens]` each; 0 where they are not known."""
    is_known: Tensor
    """`[num_tokens]`, bool: the plan's `needed` rollouts."""
    difference: LogpDifference
    """See `Experience.difference`."""
    metrics: dict[str, float]
    """Metrics of advantages that are made of the statistics."""


def know(
    policy: PreTrainedModel, batch: RolloutBatch, settings: UpdateSettings, logp_tolerance: float | None
) -> KnownStatistics:
    """Find out what has to be known of the tokens before the first step; args and errors as of `prepare_experience`."""
    config, temperature = settings.config, settings.temperature
    metrics: dict[str, float] = {}
    plan = UpdatePlan.of(batch, settings.loss, config, settings.uses_external_engine, policy.device)
    computed = all_statistics(policy, batch, row_indices(plan.beforehand), config, temperature)
    check_finite(batch, computed.logprobs)
    known = engine_statistics(batch, policy) if plan.uses_engine_statistics else computed
    if batch.rewards is not None:  # which rollouts have a gradient is known only now
        batch, metrics = with_advantages(batch, known, settings.loss)
        plan = UpdatePlan.of(batch, settings.loss, config, settings.uses_external_engine, policy.device)

    def of_tokens(rollouts: Tensor) -> Tensor:
        return rollouts[batch.token_rollouts].to(policy.device)

    sampled = sampled_logprobs([rollout.logprobs for rollout in batch.rollouts], computed.logprobs)
    compared, is_known = of_tokens(plan.beforehand), of_tokens(plan.needed)
    if plan.compares_beforehand:
        difference = global_difference(LogpDifference.of(computed.logprobs[compared], sampled[compared]))
        check_difference(difference, logp_tolerance, policy)
    else:  # the update compares what it trains on
        if plan.uses_engine_statistics:
            check_statistics(known, computed, compared, logp_tolerance, policy)
        others = compared & ~of_tokens(plan.trained_on)
        difference = LogpDifference.of(computed.logprobs[others], sampled[others])
    statistics = TokenStatistics(*(torch.where(is_known, value, 0.0) for value in columns_of(known)))
    return KnownStatistics(batch, plan, statistics, is_known, difference, metrics)
