"""The variance of the batch's gradient under given group sizes, and how far allocation could cut it at best."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dynamo_lightning.allocation.records import FloatArray


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
