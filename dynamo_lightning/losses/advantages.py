"""Advantages from the rewards of a group: how much better a rollout did than its prompt's other rollouts.

A group whose rewards are all equal has no signal relative to itself and gets exactly 0, which floating-point
subtraction of a mean does not always give; the policy update relies on that to skip its rollouts. An advantage without
a baseline says so, and its groups are left alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.errors import UserError
from dynamo_lightning.types import GroupedRewards


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


def prompt_indices(prompt_ids: Tensor) -> Tensor:
    """Number of each rollout's prompt, `[num_rollouts]`, int64: counted from 0 in the order of the ids."""
    return torch.unique(prompt_ids, return_inverse=True)[1]


def has_equal_rewards(rewards: Tensor, group_indices: Tensor, num_groups: int) -> Tensor:
    """Groups whose rewards are all equal, `[num_groups]`, bool; true for an empty group."""
    empty = torch.zeros(num_groups, dtype=rewards.dtype, device=rewards.device)
    highest = empty.scatter_reduce(0, group_indices, rewards, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, group_indices, rewards, "amin", include_self=False)
    return highest == lowest


def weighted_leave_one_out(
    rewards: Tensor,
    weights: Tensor,
    group_indices: Tensor,
    num_groups: int,
    prior_means: Tensor | None = None,
    prior_weights: Tensor | None = None,
) -> Tensor:
    """Baselines `b_i = (Σ_{j≠i} w_j r_j + v_i m_i) / (Σ_{j≠i} w_j + v_i)`; where that is 0/0 the others' plain mean.

    Args:
        rewards: `[num_rollouts]`, float64.
        weights: w, not negative, `[num_rollouts]`, float64.
        group_indices: Group of each rollout, `[num_rollouts]`, int64.
        num_groups: Number of groups, empty ones included.
        prior_means: m, what was known before these rollouts, `[num_rollouts]`, float64; none by default.
        prior_weights: v, its weight, `[num_rollouts]`, float64; none by default.

    Returns:
        `[num_rollouts]`, float64; the reward itself in a group of one without a prior, whose advantage then is 0.
    """

    def others(values: Tensor) -> Tensor:
        return group_sums(values, group_indices, num_groups)[group_indices] - values

    total, weighted = others(weights), others(weights * rewards)
    # What is left of a sum after subtracting all but a rounding error of it is rounding error.
    is_zero = total <= 1e-12 * weights
    counts = others(torch.ones_like(rewards))
    plain = torch.where(counts > 0, others(rewards) / counts.clamp(min=1), rewards)
    baselines = torch.where(is_zero, plain, weighted / torch.where(is_zero, 1.0, total))
    if prior_means is None or prior_weights is None:
        return baselines
    own, prior = torch.where(is_zero, 0.0, total), prior_weights
    has_any = own + prior > 0
    mixed = (own * baselines + prior * prior_means) / torch.where(has_any, own + prior, 1.0)
    return torch.where(has_any, mixed, baselines)


def cross_leave_one_out(
    rewards: Tensor,
    prompts: Tensor,
    is_pilot: Tensor,
    weights: Tensor | None = None,
    prior_means: Tensor | None = None,
    prior_weights: Tensor | None = None,
) -> Tensor:
    """Baselines shared by pilot and commit: the commit's plain mean, and for its rollouts all others of the prompt.

    The pilot decides the commit's size m. A pilot rollout's baseline may hence use only what has the same mean whatever
    m is: the plain mean of the commit's rewards. Once the pilot is known, m is a number, and a commit rollout may be
    compared with every other rollout, weighted, and with what was known before. Without any commit rollout left (all
    dropped) the pilot is compared within itself.

    Args:
        rewards: `[num_rollouts]`, float64.
        prompts: Number of each rollout's prompt, `[num_rollouts]`, int64.
        is_pilot: `[num_rollouts]`, bool.
        weights: Of the rollouts in the baselines of commit rollouts, `[num_rollouts]`, float64; equal by default.
        prior_means: Of commit rollouts, see `weighted_leave_one_out`.
        prior_weights: Its weight.

    Returns:
        `[num_rollouts]`, float64.
    """
    num_prompts = int(prompts.max()) + 1 if len(prompts) else 0
    weights = torch.ones_like(rewards) if weights is None else weights
    of_commit = weighted_leave_one_out(rewards, weights, prompts, num_prompts, prior_means, prior_weights)
    committed = (~is_pilot).to(rewards.dtype)
    counts = group_sums(committed, prompts, num_prompts)[prompts]
    means = group_sums(committed * rewards, prompts, num_prompts)[prompts] / counts.clamp(min=1)
    alone = weighted_leave_one_out(rewards, torch.ones_like(rewards), prompts, num_prompts)
    return torch.where(is_pilot, torch.where(counts > 0, means, alone), of_commit)


class Advantage(ABC):
    """How rewards become advantages."""

    equal_rewards_give_zero: ClassVar[bool] = True
    """True if a group whose rewards are all equal gets 0: so it is wherever a rollout is compared with its group."""

    needs_score_norms: ClassVar[bool] = False
    """True if it weighs rollouts by the squared norm of their score, which takes a pass of the policy over them."""

    is_unbiased: ClassVar[bool] = False
    """True if it is the reward less a baseline that does not depend on the rollout: then the gradient is that of the
    expected reward for every group size, also one that a pilot decides."""

    def of(self, scored: GroupedRewards, score_norms: Tensor | None = None) -> Tensor:
        """Advantage of each rollout of a batch, pilots included.

        Args:
            scored: The rewards of all ranks and how they are grouped.
            score_norms: Squared norm of each rollout's score, `[num_rollouts]`, float64; only if `needs_score_norms`.

        Returns:
            `[num_rollouts]`, float32.

        Raises:
            UserError: If pilot and commit share baselines, which this advantage cannot keep unbiased.
        """
        if scored.is_pilot is None:
            return self(scored.rewards, scored.group_indices)
        prompts = prompt_indices(scored.prompt_ids)
        exact = scored.rewards.double() - self.cross_baselines(scored.rewards.double(), prompts, scored.is_pilot)
        equal = has_equal_rewards(scored.rewards, prompts, int(prompts.max()) + 1 if len(prompts) else 0)
        return exact.masked_fill(equal[prompts], 0.0).float()

    def cross_baselines(self, rewards: Tensor, prompts: Tensor, is_pilot: Tensor) -> Tensor:
        """Baselines that a prompt's pilot and commit rollouts share, `[num_rollouts]`, float64.

        Args:
            rewards: `[num_rollouts]`, float64.
            prompts: Number of each rollout's prompt, `[num_rollouts]`, int64.
            is_pilot: `[num_rollouts]`, bool.

        Raises:
            UserError: If there are none that keep the gradient unbiased.
        """
        raise UserError(
            f"data.pilot_baseline=cross does not go with model.loss.advantage={type(self).__name__}: set it to separate"
        )

    def state_dict(self) -> dict[str, Any]:
        """Its memory of earlier iterations, tensors and primitives only; empty if nothing."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            UserError: If there is something to remember, and this advantage cannot.
        """
        if state_dict:
            raise UserError(f"{type(self).__name__} remembers nothing, but the checkpoint has {sorted(state_dict)}")

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

    is_unbiased = True

    def advantages(self, rewards: Tensor, group_indices: Tensor, num_groups: int) -> Tensor:
        """`(n r − Σ r) / (n − 1)`; 0 in a group of one."""
        sizes = group_sums(torch.ones_like(rewards), group_indices, num_groups)[group_indices]
        totals = group_sums(rewards, group_indices, num_groups)[group_indices]
        return (sizes * rewards - totals) / (sizes - 1).clamp(min=1)

    @override
    def cross_baselines(self, rewards: Tensor, prompts: Tensor, is_pilot: Tensor) -> Tensor:
        """`cross_leave_one_out` with equal weights."""
        return cross_leave_one_out(rewards, prompts, is_pilot)


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
