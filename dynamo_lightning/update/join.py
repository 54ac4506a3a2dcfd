"""Rollouts and outcomes joined into groups, each rollout with its advantage."""

from __future__ import annotations

import torch

from dynamo_lightning.allocation.groups import make_groups, whole_batch
from dynamo_lightning.losses.advantages import Advantage
from dynamo_lightning.types import (
    Collected,
    GroupedRewards,
    RolloutBatch,
    RolloutGroup,
)


def join(collected: Collected, advantage: Advantage) -> RolloutBatch:
    """This rank's rollouts with their advantages, which are computed over the rollouts of all ranks.

    A rollout without outcome was dropped. Each planned group is one of its own, unless `data.pilot_baseline: pooled`
    makes one of a pilot and its commit: the commit's size depends on the pilot's outcomes, so that pooling them biases
    the gradient. Advantages that need a pass of the policy are left at 0; `update/advantages.py` makes them of the
    batch's rewards.

    Args:
        collected: What the iteration sampled.
        advantage: How rewards become advantages.
    """
    groups = collected.groups
    baseline = groups[0].plan.pilot_baseline
    has_pilot = any(group.plan.first_sample_index for group in groups)
    if has_pilot and baseline == "pooled":
        groups = pool(collected)
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    counts = torch.tensor([len(group.outcomes) for group in groups], dtype=torch.int64)
    group_indices = torch.arange(len(groups)).repeat_interleave(counts)
    rewards = torch.tensor([outcome.score.reward for outcome in outcomes], dtype=torch.float32)
    lengths = torch.tensor([outcome.response_length for outcome in outcomes], dtype=torch.int64)
    is_pilot = is_certain = None
    if has_pilot and baseline == "cross":
        is_pilot = torch.tensor([group.plan.first_sample_index == 0 for group in groups])[group_indices]
        # By sample index, not by count: that some were dropped must not bring in others, if there are any.
        stops = torch.tensor([group.plan.first_sample_index + group.plan.commit_least for group in groups])
        indices = torch.tensor([outcome.sample_index for outcome in outcomes], dtype=torch.int64)
        is_certain = ~is_pilot & (indices < stops[group_indices])
    row_of = {outcome.key: row for row, outcome in enumerate(outcomes)}
    own = [rollout for group in groups for rollout in group.rollouts if rollout.key in row_of]
    own_rows = torch.tensor([row_of[rollout.key] for rollout in own], dtype=torch.int64)
    prompt_ids = torch.tensor([outcome.prompt_id for outcome in outcomes], dtype=torch.int64)
    scored = GroupedRewards(
        rewards,
        group_indices,
        prompt_ids,
        own_rows,
        collected.iteration,
        is_pilot,
        is_certain,
        groups[0].plan.commit_mean,
    )
    advantages = torch.zeros_like(rewards) if advantage.needs_score_norms else advantage.of(scored)
    position: dict[int, int] = {}
    prompts = [position.setdefault(group.plan.prompt.prompt_id, len(position)) for group in groups]
    empty = torch.zeros(len(groups), dtype=torch.int64)
    return RolloutBatch(
        iteration=collected.iteration,
        rewards=scored if advantage.needs_score_norms else None,
        rollouts=tuple(own),
        advantages=advantages[own_rows],
        group_indices=group_indices[own_rows],
        group_prompts=torch.tensor(prompts, dtype=torch.int64),
        group_shares=torch.tensor([group.plan.share for group in groups], dtype=torch.float64),
        group_sizes=counts,
        group_tokens=empty.index_add(0, group_indices, lengths),
        group_has_signal=empty.index_add(0, group_indices, (advantages != 0).long()) > 0,
        filler=collected.filler,
    )


def pool(collected: Collected) -> tuple[RolloutGroup, ...]:
    """The groups of an iteration, a pilot and a commit group of one prompt taken as one."""
    groups = collected.groups
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    return make_groups(whole_batch(collected.iteration, [g.plan for g in groups]).plans, rollouts, outcomes)
