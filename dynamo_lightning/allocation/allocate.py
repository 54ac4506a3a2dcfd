"""Share a rollout budget over the prompts of a batch in exact integers, and say how much that can help.

Unlike the paper's code, the sizes add up to the budget and stay within their bounds for every batch, a short last one
too, and they depend on the prompts' ids only, never on their order: every rank and every rerun gets the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dynamo_lightning.allocation.rules import AllocationRule, FloatArray, IntArray

WEIGHT_FLOOR = 1e-6
"""Least weight of a prompt, so that rollouts left over by capped prompts still go round among those with weight 0."""


def allocate_rollouts(
    weights: ArrayLike,
    prompt_ids: ArrayLike,
    budget: int,
    min_rollouts: int,
    max_rollouts: int,
    rule: AllocationRule,
) -> IntArray:
    """Return how many rollouts each prompt gets: `Σ n_i = budget` and `min_rollouts ≤ n_i ≤ max_rollouts`, always.

    Args:
        weights: Expected reward variance `E[p(1 − p)]` of each prompt, `[num_prompts]`, floored at 1e-6; only their
            proportions count, and if all are 0 the prompts get equal shares.
        prompt_ids: Distinct ids, `[num_prompts]`; they settle ties.
        budget: Rollouts of the whole batch, `B`.
        min_rollouts: Smallest group size, at least `rule.minimum_group_size`.
        max_rollouts: Largest group size.
        rule: What the group sizes minimise.

    Returns:
        Group sizes, `[num_prompts]`, in the order of the prompts.

    Raises:
        ValueError: If the bounds contradict each other, the rule or the budget, an id occurs twice, or a weight is
            negative or not finite.
    """
    weights = np.asarray(weights, dtype=np.float64)
    prompt_ids = np.asarray(prompt_ids, dtype=np.int64)
    assert weights.ndim == 1 and weights.shape == prompt_ids.shape, (weights.shape, prompt_ids.shape)
    num_prompts = len(weights)

    least = rule.minimum_group_size
    if min_rollouts < least:
        raise ValueError(f"data.min_rollouts={min_rollouts} is less than {least}, which {type(rule).__name__} needs")
    if min_rollouts > max_rollouts:
        raise ValueError(f"data.min_rollouts={min_rollouts} is more than data.max_rollouts={max_rollouts}")
    if not num_prompts * min_rollouts <= budget <= num_prompts * max_rollouts:
        raise ValueError(
            f"a budget of {budget} rollouts (data.rollouts_per_prompt times {num_prompts} prompts) is not between "
            f"{num_prompts} × {min_rollouts} (data.min_rollouts) = {num_prompts * min_rollouts} and "
            f"{num_prompts} × {max_rollouts} (data.max_rollouts) = {num_prompts * max_rollouts}"
        )
    ids, counts = np.unique(prompt_ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"prompt id {ids[counts > 1][0]} occurs {counts.max()} times in one batch")
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        raise ValueError(f"weights must be finite and at least 0, prompt id {prompt_ids[bad][0]} has {weights[bad][0]}")

    sizes = rule.allocate(np.maximum(weights, WEIGHT_FLOOR), prompt_ids, budget, min_rollouts, max_rollouts)
    assert sizes.sum() == budget
    assert num_prompts == 0 or (min_rollouts <= sizes.min() and sizes.max() <= max_rollouts)
    return sizes


def sample_bernoulli_variance(successes: ArrayLike, counts: ArrayLike) -> FloatArray:
    """Return `k(n − k)/(n(n − 1))`, the unbiased estimate of `p(1 − p)` from a group's own outcomes; 0 for `n < 2`.

    Args:
        successes: Right answers `k` of each group, `[num_prompts]`.
        counts: Rollouts `n` of each group, `[num_prompts]`.

    Returns:
        The estimates, `[num_prompts]`, at most 1/2 (one of two right).
    """
    k, n = np.asarray(successes, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    return np.where(n < 2, 0.0, k * (n - k) / np.maximum(n * (n - 1), 1.0))


def leave_one_out_variance(variances: ArrayLike, sizes: ArrayLike) -> float:
    """Return `Σ a_i/(n_i − 1)/N²`, the variance of the batch's gradient with leave-one-out advantages, up to a factor.

    Args:
        variances: `a_i = p_i(1 − p_i)`, `[num_prompts]`.
        sizes: Group sizes `n_i`, `[num_prompts]`.

    Returns:
        The variance; infinite if a group has fewer than two rollouts, for then it has no leave-one-out advantage.
    """
    a, n = np.asarray(variances, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    return float("inf") if (n < 2).any() else float((a / (n - 1)).sum() / len(a) ** 2)


def variance_ratio(variances: ArrayLike, sizes: ArrayLike) -> float:
    """Return `leave_one_out_variance` relative to equal groups of the same mean size, which need not be whole.

    Args:
        variances: `a_i = p_i(1 − p_i)`, `[num_prompts]`.
        sizes: Group sizes `n_i`, `[num_prompts]`.

    Returns:
        Less than 1 if the allocation helps; 1 for equal groups and where no prompt has any variance.
    """
    a, n = np.asarray(variances, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if not a.any() or (n == n[0]).all():
        return 1.0
    return leave_one_out_variance(a, n) / leave_one_out_variance(a, np.full(len(n), n.mean()))


def best_variance_ratio(variances: ArrayLike) -> float:
    """Return `(Σ√a)²/(N Σa) = 1/(1 + CV²(√a))`: no allocation, whatever its bounds, has a smaller `variance_ratio`.

    Args:
        variances: `a_i = p_i(1 − p_i)`, `[num_prompts]`.

    Returns:
        The ratio at `n_i − 1 ∝ √a_i`, in (0, 1]; 1 where no prompt has any variance.
    """
    a = np.asarray(variances, dtype=np.float64)
    return float(np.sqrt(a).sum() ** 2 / (len(a) * a.sum())) if a.any() else 1.0
