"""Rollouts and outcomes joined into groups, each rollout with its advantage."""

from __future__ import annotations

import torch

from dynamo_lightning.losses.advantages import Advantage
from dynamo_lightning.types import Collected, RolloutBatch


def join(collected: Collected, advantage: Advantage) -> RolloutBatch:
    """This rank's rollouts with their advantages, which are computed over the rollouts of all ranks.

    A rollout without outcome was dropped. Each planned group is one of its own: a pilot and its commit have
    leave-one-out means of their own, for the commit's size depends on the pilot's outcomes, so that pooling them would
    bias the gradient.

    Args:
        collected: What the iteration sampled.
        advantage: How rewards become advantages.
    """
    groups = collected.groups
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    counts = torch.tensor([len(group.outcomes) for group in groups], dtype=torch.int64)
    group_indices = torch.arange(len(groups)).repeat_interleave(counts)
    rewards = torch.tensor([outcome.score.reward for outcome in outcomes], dtype=torch.float32)
    lengths = torch.tensor([outcome.response_length for outcome in outcomes], dtype=torch.int64)
    advantages = advantage(rewards, group_indices)
    row_of = {outcome.key: row for row, outcome in enumerate(outcomes)}
    own = [rollout for group in groups for rollout in group.rollouts if rollout.key in row_of]
    own_rows = torch.tensor([row_of[rollout.key] for rollout in own], dtype=torch.int64)
    position: dict[int, int] = {}
    prompts = [position.setdefault(group.plan.prompt.prompt_id, len(position)) for group in groups]
    empty = torch.zeros(len(groups), dtype=torch.int64)
    return RolloutBatch(
        iteration=collected.iteration,
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
