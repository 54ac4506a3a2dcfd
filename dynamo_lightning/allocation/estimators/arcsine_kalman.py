"""A Kalman filter on the arcsine of the root of the success rate, where noise does not depend on the rate."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from dynamo_lightning.allocation.estimators.base import VarianceEstimator
from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.errors import UserError

RIGHT_ANGLE = math.pi / 2


class ArcsineKalman(VarianceEstimator):
    """Random walk of `ψ = arcsin √p`, for rare visits and drift: the more time has passed, the wider it is.

    A group with `k` of `n` right observes `y = arcsin √((k + 3/8)/(n + 3/4))` (Anscombe, 1948) with noise `1/(4n + 2)`;
    between visits Δ RL iterations apart the variance grows by `q Δ`. A prompt's mean ψ and variance P hold its own
    outcomes only; the population N(μ₀, P₀), what an unseen prompt has, joins them when asked for, as a prior:
    `1/P' = 1/(P + qΔ) + 1/P₀`, `μ' = P'(ψ/(P + qΔ) + μ₀/P₀)`. So a first, poor fit of it is not remembered.

    With `p = sin²ψ`: `E[p] = (1 − e^(−2P') cos 2μ')/2` and `E[p(1 − p)] = (1 − e^(−8P') cos 4μ')/8`. Both are exact for
    a normal ψ, also where its tails leave [0, π/2]: sin² reflects them. The mean never leaves, as an average of angles
    within. What is approximate is the normal shape: groups that are all wrong or all right pull ψ inwards (0 of 16 is
    p = 0.02), and a population of very hard and very easy prompts has two peaks. `BetaPosterior` is better there.

    Args:
        drift_variance: `q`, the variance that ψ gains per RL iteration. The default doubles the variance of 16 rollouts
            in 32 iterations; 0 if the policy stands still.

    Raises:
        UserError: If `drift_variance` is negative or not finite.
    """

    columns = ("mean", "variance")

    min_fit_rollouts: ClassVar[int] = 64
    """With fewer in all (a prompt's are about 1/(4P)), the population is that of p ~ U(0, 1): N(π/4, π²/16 − 1/2)."""

    def __init__(self, drift_variance: float = 5e-4) -> None:
        if not (drift_variance >= 0 and math.isfinite(drift_variance)):
            raise UserError(f"drift_variance={drift_variance} must be a finite number of at least 0")
        self.drift_variance = float(drift_variance)

    def initial_state(self) -> tuple[float, ...]:
        """Return a mean that does not matter, for it has infinite variance."""
        return 0.0, math.inf

    def check_state(self, state: FloatArray) -> None:
        """Raise a ValueError if a mean is not within [0, π/2] or a variance not positive."""
        mean, variance = state
        if not ((mean >= 0) & (mean <= RIGHT_ANGLE)).all():
            raise UserError(f"'mean' has a value outside [0, π/2], range {mean.min():g} to {mean.max():g}")
        if not (variance > 0).all():
            raise UserError(f"'variance' has the value {variance.min():g}, which is not positive")

    def update(self, state: FloatArray, successes: FloatArray, counts: FloatArray, elapsed: FloatArray) -> FloatArray:
        """Let the variance grow and average with the new observation by precision."""
        observed = np.arcsin(np.sqrt((successes + 3 / 8) / (counts + 3 / 4)))
        return self._combined(state[0], state[1] + self.drift_variance * elapsed, observed, 1 / (4 * counts + 2))

    def fit_population(self, state: FloatArray, elapsed: FloatArray) -> tuple[float, float]:
        """Return `(μ₀, P₀)`: mean and variance of ψ over the visited prompts, less the variance that noise explains.

        With `w = 1/(1 + qΔ/P₁)`, P₁ that of p ~ U(0, 1), `W = Σ w` and `c = w(1 − w/W)`: `μ₀ = Σ wψ/W` and
        `P₀ = (Σ w(ψ − μ₀)² − Σ cP)/Σ c`, clipped to [0.0025, π²/16]: no narrower than Beta(50, 50), no wider than two
        equal peaks at 0 and π/2. Old visits count less, for the policy has moved on; large groups do not count more,
        for allocation gives them to p near ½.
        """
        mean, variance = state
        uniform = math.pi / 4, math.pi**2 / 16 - 0.5
        if len(mean) < 2 or (1 / (4 * variance) - 0.5).sum() < self.min_fit_rollouts:
            return uniform
        weights = 1 / (1 + self.drift_variance * elapsed / uniform[1])
        freedom = weights * (1 - weights / weights.sum())
        center = float((weights * mean).sum() / weights.sum())
        spread = ((weights * (mean - center) ** 2).sum() - (freedom * variance).sum()) / freedom.sum()
        return center, float(np.clip(spread, 0.0025, math.pi**2 / 16))

    def posterior(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return `(μ', P')`, `[2, num_prompts]`."""
        return self._combined(state[0], state[1] + self.drift_variance * elapsed, *population)

    def success_rate(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return `(1 − e^(−2P') cos 2μ')/2`."""
        mean, variance = self.posterior(state, elapsed, population)
        return (1 - np.exp(-2 * variance) * np.cos(2 * mean)) / 2

    def bernoulli_variance(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return `(1 − e^(−8P') cos 4μ')/8`, in (0, 1/4)."""
        mean, variance = self.posterior(state, elapsed, population)
        return (1 - np.exp(-8 * variance) * np.cos(4 * mean)) / 8

    @staticmethod
    def _combined(
        mean: FloatArray, variance: FloatArray, other: FloatArray | float, other_variance: FloatArray | float
    ) -> FloatArray:
        """Return mean and variance of the product of two normal densities; an infinite variance says nothing."""
        precision = 1 / variance + 1 / other_variance
        return np.stack([(mean / variance + other / other_variance) / precision, 1 / precision])
