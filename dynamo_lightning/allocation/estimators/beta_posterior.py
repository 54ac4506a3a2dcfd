"""The default estimator: a Beta posterior with forgetting, whose prior is what all prompts have shown."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dynamo_lightning.allocation.estimators.base import VarianceEstimator
from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.errors import UserError


class BetaPosterior(VarianceEstimator):
    """Beta posterior with discounted counts and a prior fitted to the visited prompts (empirical Bayes).

    A visit with `k` of `n` right, Δ RL iterations after the last: `s ← ρ^Δ s + k`, `f ← ρ^Δ f + n − k` with
    `ρ = 2^(−1/half_life)`. The posterior is Beta(a, b), `a = a0 + ρ^Δ s`, `b = b0 + ρ^Δ f`, and the weight
    `E[p(1 − p)] = ab/((a + b)(a + b + 1))`: allocation minimises a sum linear in `p(1 − p)`, so its Bayes weight is
    the posterior mean of that, not `√(p̂(1 − p̂))` as in the paper (arXiv 2602.19208). An unseen prompt has the prior's.

    Args:
        half_life: RL iterations after which an outcome counts half; infinite to count all alike.

    Raises:
        UserError: If `half_life` is not positive.
    """

    columns = ("successes", "failures")

    min_fit_rollouts: ClassVar[int] = 64
    """With fewer (discounted) rollouts in all, the prior is Beta(1, 1)."""

    def __init__(self, half_life: float = 32.0) -> None:
        if not half_life > 0:
            raise UserError(f"half_life={half_life} must be a positive number of RL iterations")
        self.half_life = float(half_life)

    def discount(self, counts: FloatArray, elapsed: FloatArray) -> FloatArray:
        """Return `ρ^Δ counts`."""
        return counts * np.exp2(-elapsed / self.half_life)

    def update(self, state: FloatArray, successes: FloatArray, counts: FloatArray, elapsed: FloatArray) -> FloatArray:
        """Discount the counts and add the new ones."""
        return self.discount(state, elapsed) + np.stack([successes, counts - successes])

    def fit_population(self, state: FloatArray, elapsed: FloatArray) -> tuple[float, float]:
        """Return `(a0, b0)` by the moments of the beta-binomial distribution with unequal counts.

        With `p̂_i = s_i/n_i`, mean `m = Σ w_i p̂_i/W` and `c_i = w_i(1 − w_i/W)`, `W = Σ w_i`:
        `E Σ w_i(p̂_i − m)² = Σ c_i (Var p + noise_i)`, and `p̂_i(1 − p̂_i)/(n_i − 1)` is an unbiased estimate of
        `noise_i`. So `v = (Σ w_i(p̂_i − m)² − Σ c_i noise_i)/Σ c_i` estimates `Var p = m(1 − m)/(a0 + b0 + 1)`.

        Each prompt counts once (`w_i = ρ^Δ`, so that a prior fitted to old visits follows the policy) and not `n_i`
        times: allocation gives more rollouts to p near ½, which would pull the fit there. Prompts with `n_i < 2` say
        nothing of their noise and are left out. Beta(1, 1) as long as there are few rollouts, or where the fit is
        undefined (all right, all wrong, no more spread than noise); else m is clipped to [0.01, 0.99], a0 + b0 to
        [0.1, 100].
        """
        if state.sum() < self.min_fit_rollouts:
            return 1.0, 1.0
        useful = state.sum(axis=0) >= 2
        successes, failures = state[:, useful]
        counts = successes + failures
        weights = self.discount(np.ones_like(counts), elapsed[useful])
        total = weights.sum()
        freedom = weights * (1 - weights / total) if total > 0 else weights
        if not freedom.sum() > 0:
            return 1.0, 1.0
        rates = successes / counts
        mean = (weights * rates).sum() / total
        noise = rates * (1 - rates) / (counts - 1)
        spread = ((weights * (rates - mean) ** 2).sum() - (freedom * noise).sum()) / freedom.sum()
        if not (spread > 0 and 0 < mean < 1):
            return 1.0, 1.0
        strength = float(np.clip(mean * (1 - mean) / spread - 1, 0.1, 100.0))
        mean = float(np.clip(mean, 0.01, 0.99))
        return strength * mean, strength * (1 - mean)

    def posterior(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return the posterior's `(a, b)`, `[2, num_prompts]`."""
        return np.array(population)[:, None] + self.discount(state, elapsed)

    def success_rate(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return `a/(a + b)`."""
        a, b = self.posterior(state, elapsed, population)
        return a / (a + b)

    def bernoulli_variance(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return `ab/((a + b)(a + b + 1))`, in (0, 1/4)."""
        a, b = self.posterior(state, elapsed, population)
        return a * b / ((a + b) * (a + b + 1))
