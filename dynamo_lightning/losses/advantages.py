"""Advantages from the rewards of a group: how much better a rollout did than its prompt's other rollouts.

A group whose rewards are all equal has no signal relative to itself and gets exactly 0, which floating-point
subtraction of a mean does not always give; the policy update relies on that to skip its rollouts. An advantage without
a baseline says so, and its groups are left alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from dynamo_lightning.errors import UserError


def group_sums(values: Tensor, group_indices: Tensor, num_groups: int) -> Tensor:
    """Sum of each group's values.

    Args:
        values: `[num_rollouts]`.
        group_indices: Group of each value, `[num_rollouts]`, int64.
        num_groups: Number of groups, empty ones included.

    Returns:
        `[num_groups]`, in the dtype of `values`.
    """
    return torch.zeros(num_groups, dtype=values.dtype, device=values.device).index_add_(0, group_indices, values)


def has_equal_rewards(rewards: Tensor, group_indices: Tensor, num_groups: int) -> Tensor:
    """Groups whose rewards are all equal, `[num_groups]`, bool; true for an empty group."""
    empty = torch.zeros(num_groups, dtype=rewards.dtype, device=rewards.device)
    highest = empty.scatter_reduce(0, group_indices, rewards, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, group_indices, rewards, "amin", include_self=False)
    return highest == lowest


class Advantage(ABC):
    """How rewards become advantages."""

    equal_rewards_give_zero: ClassVar[bool] = True
    """True if a group whose rewards are all equal gets 0: so it is wherever a rollout is compared with its group."""

    def __call__(self, rewards: Tensor, group_indices: Tensor) -> Tensor:
        """Advantage of each rollout.

        Args:
            rewards: `[num_rollouts]` of the whole batch, all ranks.
            group_indices: Prompt of each rollout, `[num_rollouts]`, int64.

        Returns:
            `[num_rollouts]`, float32; exactly 0 in groups whose rewards are all equal, if `equal_rewards_give_zero`.
        """
        num_groups = int(group_indices.max()) + 1 if len(group_indices) else 0
        # float64, so that the result does not depend on the order of the rollouts.
        exact = self.advantages(rewards.double(), group_indices, num_groups)
        if self.equal_rewards_give_zero:
            exact = exact.masked_fill(has_equal_rewards(rewards, group_indices, num_groups)[group_indices], 0.0)
        return exact.float()

    @abstractmethod
    def advantages(self, rewards: Tensor, group_indices: Tensor, num_groups: int) -> Tensor:
        """The formula; groups of equal rewards need no care. Shapes as in `__call__`, float64."""


class RLOO(Advantage):
    """Leave-one-out: `A_ij = r_ij − mean of the group's other rewards` (arXiv 2402.14740).

    The gradient it gives is unbiased for every group size of at least 2, which is what lets group sizes differ.
    """

    def advantages(self, rewards: Tensor, group_indices: Tensor, num_groups: int) -> Tensor:
        """`(n r − Σ r) / (n − 1)`; 0 in a group of one."""
        sizes = group_sums(torch.ones_like(rewards), group_indices, num_groups)[group_indices]
        totals = group_sums(rewards, group_indices, num_groups)[group_indices]
        return (sizes * rewards - totals) / (sizes - 1).clamp(min=1)


class DrGRPO(Advantage):
    """Group mean only: `A_ij = r_ij − mean_j r_ij` (Dr. GRPO, arXiv 2503.20783).

    Shrinks prompt `i` by `(n_i − 1) / n_i` against `RLOO`, hence weighs prompts unequally when group sizes differ.
    """

    def advantages(self, rewards: Tensor, group_indices: Tensor, num_groups: int) -> Tensor:
        """`r − Σ r / n`."""
        sizes = group_sums(torch.ones_like(rewards), group_indices, num_groups)[group_indices]
        return rewards - group_sums(rewards, group_indices, num_groups)[group_indices] / sizes


class GRPO(Advantage):
    """Group mean and standard deviation: `A_ij = (r_ij − mean) / (std + ε)` (arXiv 2402.03300).

    Args:
        ddof: Delta degrees of freedom of the standard deviation: 1 divides by n − 1, 0 by n.
        epsilon: Added to the standard deviation.
    """

    def __init__(self, ddof: int = 1, epsilon: float = 1e-6) -> None:
        self.ddof = ddof
        self.epsilon = epsilon

    def advantages(self, rewards: Tensor, group_indices: Tensor, num_groups: int) -> Tensor:
        """`(r − mean) / (std + ε)`; 0 in a group of one."""
        sizes = group_sums(torch.ones_like(rewards), group_indices, num_groups)[group_indices]
        centred = rewards - group_sums(rewards, group_indices, num_groups)[group_indices] / sizes
        squares = group_sums(centred.square(), group_indices, num_groups)[group_indices]
        return centred / ((squares / (sizes - self.ddof).clamp(min=1)).sqrt() + self.epsilon)


class WReinforce(Advantage):
    """W-REINFORCE: λ for a right response, −1 for a wrong one, whatever the others of its group did (arXiv 2506.01347).

    Mostly suppresses what is wrong and lets the probability go wherever the policy's own beliefs put it. There is no
    baseline: a group whose rewards are all equal is trained on as well, and nothing is skipped.

    Args:
        positive_weight: λ; 1 is REINFORCE with rewards ±1, 0 learns from wrong responses alone.
        success_threshold: A reward from here on is right; the same as `data.success_threshold`.

    Raises:
        UserError: If λ is negative.
    """

    equal_rewards_give_zero = False

    def __init__(self, positive_weight: float = 0.1, success_threshold: float = 0.5) -> None:
        if positive_weight < 0:
            raise UserError(f"W-REINFORCE needs positive_weight ≥ 0, got {positive_weight}")
        self.positive_weight = positive_weight
        self.success_threshold = success_threshold

    def advantages(self, rewards: Tensor, group_indices: Tensor, num_groups: int) -> Tensor:
        """λ where `r ≥ success_threshold`, else −1."""
        right = rewards >= self.success_threshold
        return torch.where(right, self.positive_weight, -1.0).to(rewards.dtype)
