"""Rollouts exchanged between ranks, so that all have about as much to compute; each goes only where it is trained on.

Every rank knows all outcomes, so all come to the same distribution by themselves. What is learned does not depend on
how rollouts are distributed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_lightning.distributed import exchange_values, world_size
from dynamo_lightning.policy.packing import balance
from dynamo_lightning.rollout.arrays import RolloutArrays
from dynamo_lightning.types import Key, Outcome, Prompt, Rollout


def spread_over_ranks(
    rollouts: Sequence[Rollout], outcomes: Sequence[Outcome], prompts: Sequence[Prompt], passes: tuple[int, int]
) -> list[Rollout]:
    """Give each rank its share of the rollouts that have an outcome.

    Args:
        rollouts: Sampled on this rank.
        outcomes: Of all ranks.
        prompts: Of all outcomes.
        passes: How often the tokens of a rollout are passed through the policy: if its group's rewards differ, and if
            they are all equal.

    Returns:
        This rank's share of the rollouts of all ranks; without other processes all of its rollouts.
    """
    if world_size() == 1:
        return list(rollouts)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    owners = assign_ranks(outcomes, by_id, passes, world_size())
    own = [rollout for rollout in rollouts if rollout.key in owners]
    received = exchange(own, [owners[rollout.key] for rollout in own], by_id)
    return sorted(received, key=lambda rollout: rollout.key)


def assign_ranks(
    outcomes: Sequence[Outcome], prompts: Mapping[int, Prompt], passes: tuple[int, int], num_ranks: int
) -> dict[Key, int]:
    """The rank that trains on each rollout, by key: the same on every rank.

    Args:
        outcomes: Of all ranks, in any order.
        prompts: By prompt id.
        passes: As for `spread_over_ranks`.
        num_ranks: Number of ranks.
    """
    rewards: dict[int, set[float]] = {}
    for outcome in outcomes:
        rewards.setdefault(outcome.prompt_id, set()).add(outcome.score.reward)
    differing, equal = passes
    ordered = sorted(outcomes, key=lambda outcome: outcome.key)
    costs = [
        (len(prompts[outcome.prompt_id].token_ids) + outcome.num_tokens)
        * (differing if len(rewards[outcome.prompt_id]) > 1 else equal)
        for outcome in ordered
    ]
    shares = balance(costs, num_ranks)
    return {ordered[i].key: number for number, share in enumerate(shares) for i in share}


def exchange(rollouts: Sequence[Rollout], owners: Sequence[int], prompts: Mapping[int, Prompt]) -> list[Rollout]:
    """Send each rollout to the rank that owns it, as arrays: no rank sees another's tokens.

    Args:
        rollouts: Of this rank.
        owners: Rank that each goes to.
        prompts: By prompt id, of the rollouts of all ranks.

    Returns:
        What this rank owns, in the order of the ranks it came from.
    """
    order = np.argsort(np.asarray(owners, dtype=np.int64), kind="stable")
    arrays = RolloutArrays.of([rollouts[i] for i in order])
    sizes = arrays.sizes()
    groups = np.asarray(owners, dtype=np.int64)[order]

    def send(name: str, values: NDArray[Any]) -> NDArray[Any]:
        counts = np.bincount(groups, weights=sizes[name], minlength=world_size()).astype(int)
        sent = torch.from_numpy(values.view(np.uint8) if values.dtype == bool else values)
        received = exchange_values(sent, counts.tolist()).numpy()
        return received.view(bool) if values.dtype == bool else received

    return arrays.map(send).rollouts(prompts)
