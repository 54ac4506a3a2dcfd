"""Advantages from the rewards of a group: how much better a rollout did than its prompt's other rollouts.

A group whose rewards are all equal teaches nothing and gets exactly 0, which floating-point subtraction of a mean does
not always give; the policy update relies on that to skip its rollouts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


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
    """Whether all rewards of a group are equal, `[num_groups]`, bool; true for an empty group."""
    empty = torch.zeros(num_groups, dtype=rewards.dtype, device=rewards.device)
    highest = empty.scatter_reduce(0, group_indices, rewards, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, group_indices, rewards, "amin", include_self=False)
    return highest == lowest


class Advantage(ABC):
    """How rewards become advantages."""

    def __call__(self, rewards: Tensor, group_indices: Tensor) -> Tensor:
        """Advantage of each rollout.

        Args:
            rewards: `[num_rollouts]` of the whole batch, all ranks.
            group_indices: Prompt of each rollout, `[num_rollouts]`, int64.

        Returns:
            `[num_rollouts]`, float32; exactly 0 in groups whose rewards are all equal.
        """
        num_groups = int(group_indices.max()) + 1 if len(group_indices) else 0
        # float64, so that the result does not depend on the order of the rollouts.
        exact = self.advantages(rewards.double(), group_indices, num_groups)
        return exact.masked_fill(has_equal_rewards(rewards, group_indices, num_groups)[group_indices], 0.0).float()

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
