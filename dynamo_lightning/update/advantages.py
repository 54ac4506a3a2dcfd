"""Advantages that need a pass of the policy: given to rollouts once the score norms of all ranks are known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dynamo_lightning.distributed import gather_values
from dynamo_lightning.losses.advantages import group_sums
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
    return given, weight_metrics(scored, advantages.double(), norms)


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


def weight_metrics(scored: GroupedRewards, advantages: Tensor, norms: Tensor) -> dict[str, float]:
    """`baseline/mean`, and `baseline/score_ratio`: squared score norm of successes over that of failures.

    The ratio is that of the sums over groups with different rewards of each group's mean norm of its successes and
    of its failures: what `OptimalBaselineRule.score_ratio` asks for. Groups are not thrown together, for an easy
    prompt's successes are not a hard prompt's. With rewards between 0 and 1 a rollout counts as a success by its
    reward, and as a failure by what is left. Without such a group it is not defined.
    """
    rewards, groups, number = scored.rewards.double(), scored.group_indices, int(scored.group_indices.max()) + 1
    metrics = {"baseline/mean": float((rewards - advantages).mean())}
    sums = []
    right = rewards.clamp(0.0, 1.0)
    shares = group_sums(right, groups, number), group_sums(1.0 - right, groups, number)
    both = (shares[0] > 0) & (shares[1] > 0)
    for values, share in zip((right, 1.0 - right), shares, strict=True):
        sums.append(float((group_sums(values * norms, groups, number)[both] / share[both]).sum()))
    if sums[1] > 0:
        metrics["baseline/score_ratio"] = sums[0] / sums[1]
    return metrics
