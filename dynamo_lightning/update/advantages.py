"""Advantages that need a pass of the policy: given to rollouts once the score norms of all ranks are known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dynamo_lightning.distributed import gather_values
from dynamo_lightning.losses.optimal_baseline import rollout_score_norms
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.losses.token_statistics import TokenStatistics
from dynamo_lightning.types import GroupedRewards, RolloutBatch


def with_advantages(
    batch: RolloutBatch, statistics: TokenStatistics, loss: PolicyLoss
) -> tuple[RolloutBatch, dict[str, float]]:
    """The batch with its advantages, and metrics of the weights; communicates, once.

    Args:
        batch: This rank's rollouts, with the rewards of all ranks.
        statistics: Of this rank's response tokens, all of them.
        loss: The advantage, and how it is normalized.
    """
    scored = batch.rewards
    assert scored is not None
    norms = gathered_norms(batch, scored, statistics, loss)
    advantages = loss.advantage.of(scored, norms)
    has_signal = torch.zeros(len(batch.group_sizes), dtype=torch.int64)
    has_signal.index_add_(0, scored.group_indices, (advantages != 0).long())
    given = replace(batch, advantages=advantages[scored.own_rows], group_has_signal=has_signal > 0, rewards=None)
    return given, weight_metrics(scored.rewards.double(), advantages.double(), norms)


def gathered_norms(
    batch: RolloutBatch, scored: GroupedRewards, statistics: TokenStatistics, loss: PolicyLoss
) -> Tensor:
    """Squared score norm of every rollout of all ranks, `[num_rollouts]`, float64, on the CPU, the same on every rank.

    A truncated response that `mask_truncated` leaves out of the loss has no score: 0.
    """
    device = statistics.logprobs.device
    own = rollout_score_norms(
        statistics.squared_logit_gradient(),
        batch.token_rollouts,
        batch.response_lengths,
        loss.aggregation,
        loss.length_normalisation,
    )
    if loss.mask_truncated:
        own = own * torch.tensor([not rollout.truncated for rollout in batch.rollouts], device=device)
    rows, values = gather_values(scored.own_rows.to(device)).cpu(), gather_values(own).cpu()
    norms = torch.zeros(len(scored.rewards), dtype=torch.float64)
    norms[rows] = values
    return norms


def weight_metrics(rewards: Tensor, advantages: Tensor, norms: Tensor) -> dict[str, float]:
    """`baseline/mean`, and `baseline/score_ratio`: mean squared score norm of successes over that of failures.

    With rewards between 0 and 1 a rollout counts as a success by its reward and as a failure by what is left. The
    ratio is what `OptimalBaselineRule.score_ratio` asks for; without any success or failure it is not defined.
    """
    metrics = {"baseline/mean": float((rewards - advantages).mean())}
    right = rewards.clamp(0.0, 1.0)
    wrong = 1.0 - right
    if right.sum() > 0 and wrong.sum() > 0 and (wrong @ norms) > 0:
        metrics["baseline/score_ratio"] = float((right @ norms / right.sum()) / (wrong @ norms / wrong.sum()))
    return metrics
