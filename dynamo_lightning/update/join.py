"""Rollouts and outcomes joined into groups, each rollout with its advantage."""

from __future__ import annotations

import torch

from dynamo_lightning.losses.advantages import Advantage
from dynamo_lightning.types import Collected, GroupedRewards, RolloutBatch, merge_parts


def join(collected: Collected, advantage: Advantage) -> RolloutBatch:
    """This rank's rollouts with their advantages, which are computed over the rollouts of all ranks.

    Outcomes and rollouts are joined on `(prompt_id, sample_index)`; a rollout without outcome was dropped. Each planned
    group is one of its own, unless `data.pilot_baseline: pooled` makes one of a pilot and its commit: the commit's size
    depends on the pilot's outcomes, so that pooling them biases the gradient. Advantages that need a pass of the policy
    are left at 0; `update/advantages.py` makes them of the batch's rewards.

    Args:
        collected: What the iteration sampled.
        advantage: How rewards become advantages.
    """
    outcomes = collected.outcomes
    planned = [plan for part in collected.parts for plan in part.plans]
    position = {prompt.prompt_id: index for index, prompt in enumerate(collected.parts[0].prompts)}
    first = collected.parts[0].plans
    has_pilot = len(collected.parts) > 1
    plans = merge_parts(collected.parts).plans if has_pilot and first[0].pilot_baseline == "pooled" else planned
    group_of = {
        (plan.prompt.prompt_id, sample_index): group % len(plans)
        for group, plan in enumerate(planned)
        for sample_index in range(plan.first_sample_index, plan.first_sample_index + plan.size)
    }
    group_indices = torch.tensor([group_of[outcome.key] for outcome in outcomes], dtype=torch.int64)
    rewards = torch.tensor([outcome.score.reward for outcome in outcomes], dtype=torch.float32)
    lengths = torch.tensor([outcome.response_length for outcome in outcomes], dtype=torch.int64)
    is_pilot = None
    if has_pilot and first[0].pilot_baseline == "cross":
        is_pilot = group_indices < len(first)
    empty = torch.zeros(len(plans), dtype=torch.int64)
    row_of = {outcome.key: row for row, outcome in enumerate(outcomes)}
    own = [rollout for rollout in collected.rollouts if rollout.key in row_of]
    own_rows = torch.tensor([row_of[rollout.key] for rollout in own], dtype=torch.int64)
    prompt_ids = torch.tensor([outcome.prompt_id for outcome in outcomes], dtype=torch.int64)
    iteration = collected.parts[0].iteration
    scored = GroupedRewards(rewards, group_indices, prompt_ids, own_rows, iteration, is_pilot)
    advantages = torch.zeros_like(rewards) if advantage.needs_score_norms else advantage.of(scored)
    return RolloutBatch(
        iteration=iteration,
        rewards=scored if advantage.needs_score_norms else None,
        rollouts=tuple(own),
        advantages=advantages[own_rows],
        group_indices=group_indices[own_rows],
        group_prompts=torch.tensor([position[plan.prompt.prompt_id] for plan in plans], dtype=torch.int64),
        group_shares=torch.tensor([plan.share for plan in plans], dtype=torch.float64),
        group_sizes=empty.index_add(0, group_indices, torch.ones_like(lengths)),
        group_tokens=empty.index_add(0, group_indices, lengths),
        group_has_signal=empty.index_add(0, group_indices, (advantages != 0).long()) > 0,
        filler=collected.filler,
    )
