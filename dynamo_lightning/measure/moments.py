"""How much the policy gradient of a prompt varies from one set of rollouts to the next, measured on its rollouts.

With leave-one-out advantages, prompt i's gradient is the sample covariance of reward r and score s = ∇ log π(rollout):

    ĝ_i = (1/n) Σ_j (r_j − mean of the others) s_j = mean over pairs of h(x, x'),   h(x, x') = ½(r − r')(s − s'),

a U-statistic, so that its variance (the trace of its covariance) is known for every group size n (Hoeffding, 1948):

    Var ĝ_i = [4(n − 2)ζ₁ + 2ζ₂]/(n(n − 1)),
    ζ₁ = E⟨h₁₂, h₁₃⟩ − ‖∇J_i‖²,   ζ₂ = E‖h₁₂‖² − ‖∇J_i‖²,   ‖∇J_i‖² = E⟨h₁₂, h₃₄⟩.

The allocation's own model, a_i/(n − 1) with a_i ∝ p_i(1 − p_i), is the case of rewards that do not depend on scores
(then ζ₁ = ζ₂/4 and ∇J_i = 0) and scores that vary equally for all prompts. Here nothing of the kind is assumed.

A score is as long as the policy has parameters. Only inner products of scores matter, and random projections keep them
on average: rank-one ones of the vocabulary head's gradient, which need a forward pass only, or a sketch of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.errors import UserError


@dataclass(frozen=True)
class KernelMoments:
    """Mean inner products of the kernel h = ½(r − r')(s − s') of two pairs of a prompt's rollouts."""

    same: float
    """E‖h₁₂‖²: both pairs are the same one."""
    overlapping: float
    """E⟨h₁₂, h₁₃⟩: they share a rollout."""
    disjoint: float
    """E⟨h₁₂, h₃₄⟩ = ‖∇J‖²: they share none."""

    @property
    def zeta1(self) -> float:
        """ζ₁, the variance of the kernel's projection on one rollout."""
        return self.overlapping - self.disjoint

    @property
    def zeta2(self) -> float:
        """ζ₂, the variance of the kernel."""
        return self.same - self.disjoint

    def variance(self, group_size: float) -> float:
        """Variance of the leave-one-out gradient of `n` rollouts, `[4(n − 2)ζ₁ + 2ζ₂]/(n(n − 1))`.

        Args:
            group_size: n, at least 2; not necessarily whole, to compare with a mean group size.

        Raises:
            UserError: If the group is smaller than 2: it has no leave-one-out gradient.
        """
        n = group_size
        if n < 2:
            raise UserError(f"a group of {n:g} rollouts has no leave-one-out gradient, at least 2 are needed")
        return (4 * (n - 2) * self.zeta1 + 2 * self.zeta2) / (n * (n - 1))


def leave_one_out_gradient(rewards: ArrayLike, scores: ArrayLike, counts: ArrayLike | None = None) -> FloatArray:
    """Return `(1/n) Σ_j (r_j − mean of the others) s_j = Σ_j (r_j − r̄) s_j/(n − 1)`, `[num_dimensions]`.

    Args:
        rewards: `[num_distinct]`.
        scores: `[num_distinct, num_dimensions]`.
        counts: How often each occurred, `[num_distinct]`; once each by default. `n` is their sum.

    Raises:
        UserError: If there are fewer than 2 rollouts.
    """
    r, s, c, n = _checked(rewards, scores, counts, at_least=2)
    return (c * (r - (c * r).sum() / n)) @ s / (n - 1)


def kernel_moments(rewards: ArrayLike, scores: ArrayLike, counts: ArrayLike | None = None) -> KernelMoments:
    """Return unbiased estimates of a prompt's moments: means over all pairs of pairs of distinct rollouts.

    With `v_i = Σ_j h_ij`, `P = Σ_ij ‖h_ij‖²` and `Q = Σ_i ‖v_i‖² − P`, the sums over ordered pairs of pairs that
    coincide, share one rollout and share none are `P`, `Q` and `‖Σ_i v_i‖² − 4Q − 2P`. All of them come from a few
    sums over rollouts, in time and memory `O(n d)`.

    Args:
        rewards: `[num_distinct]`.
        scores: `[num_distinct, num_dimensions]`.
        counts: How often each occurred, `[num_distinct]`; once each by default. Short responses repeat a lot.

    Raises:
        UserError: If there are fewer than 4 rollouts, from which ‖∇J‖² cannot be told.
    """
    r, s, c, n = _checked(rewards, scores, counts, at_least=4)
    # The kernel sees differences only; centred numbers lose fewer digits in the sums below.
    r, s = r - (c * r).sum() / n, s - (c @ s) / n
    squares = (s**2).sum(1)
    # Σ_j c_j h_ij = ½[n r_i s_i + Σ c r s]: the sums of r and of s are 0.
    v = (n * r[:, None] * s + (c * r) @ s) / 2
    # ¼(r_i − r_j)²(q_i − 2 s_i·s_j + q_j) summed over j, with q = ‖s‖².
    r_squared = (c * r**2).sum()
    pairs = r**2 * (n * squares + (c * squares).sum()) + r_squared * squares
    pairs += (c * r**2 * squares).sum() - 2 * s @ ((c * r**2) @ s)
    pairs += -2 * r * (c * r * squares).sum() + 4 * r * (s @ ((c * r) @ s))
    same = float((c * pairs).sum() / 4)
    overlapping = float((c * (v**2).sum(1)).sum()) - same
    disjoint = float(((c @ v) ** 2).sum()) - 4 * overlapping - 2 * same
    return KernelMoments(
        same / (n * (n - 1)),
        overlapping / (n * (n - 1) * (n - 2)),
        disjoint / (n * (n - 1) * (n - 2) * (n - 3)),
    )


def _checked(
    rewards: ArrayLike, scores: ArrayLike, counts: ArrayLike | None, at_least: int
) -> tuple[FloatArray, FloatArray, FloatArray, float]:
    """Return all in float64 with the number of rollouts."""
    r, s = np.asarray(rewards, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    c = np.ones(len(r)) if counts is None else np.asarray(counts, dtype=np.float64)
    if s.ndim != 2 or not len(r) == len(s) == len(c):
        raise UserError(f"rewards, scores and counts differ in length: {r.shape}, {s.shape}, {c.shape}")
    n = float(c.sum())
    if n < at_least:
        raise UserError(f"{n:g} rollouts are too few, at least {at_least} are needed")
    return r, s, c, n


def group_variances(rewards: ArrayLike, scores: ArrayLike, sizes: Sequence[float]) -> list[float]:
    """Return the variance of a prompt's leave-one-out gradient with each of these group sizes, from one small group.

    Four rollouts or more give an unbiased estimate, which may be negative. Two or three cannot tell ‖∇J‖²; for them,
    reward and score are taken as independent: `E‖h₁₂‖²/(size − 1)`. That is too much by no more than a share of
    2p(1 − p) or so: little where an allocation gives so few rollouts.

    Args:
        rewards: `[num_rollouts]`, at least 2.
        scores: `[num_rollouts, num_dimensions]`.
        sizes: Group sizes that are asked about, at least 2 each.
    """
    r, s, _, n = _checked(rewards, scores, None, at_least=2)
    if n >= 4:
        moments = kernel_moments(r, s)
        return [moments.variance(size) for size in sizes]
    h = (r[:, None] - r)[..., None] * (s[:, None] - s) / 2
    return [float((h**2).sum() / (n * (n - 1)) / (size - 1)) for size in sizes]
