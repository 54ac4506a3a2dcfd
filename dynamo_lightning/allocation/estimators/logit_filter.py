"""A filter on logits: one drift that all prompts share, and a population of any shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np

from dynamo_lightning.allocation.estimators import population as grid
from dynamo_lightning.allocation.estimators.pooled import PooledEstimator
from dynamo_lightning.allocation.records import BoolArray, FloatArray
from dynamo_lightning.errors import UserError

PATH_LENGTH = 16
"""Iterations whose common logit is remembered for outcomes that arrive late."""

NEWTON_STEPS = 6

NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()


class Shared(NamedTuple):
    """Everything that all prompts have in common, as of the last iteration that was closed."""

    iteration: int
    """The last closed RL iteration; −1 before any."""
    origin: int
    """Grid points by which the grid's center lies right of θ = 0."""
    path: FloatArray
    """`M` after each of the last iterations, `[PATH_LENGTH]`, the latest last."""
    weights: FloatArray
    """The population: probability of each θ on the grid, `[num_points]`."""

    @property
    def common(self) -> float:
        """The latest `M`."""
        return float(self.path[-1])

    @property
    def thetas(self) -> FloatArray:
        """The grid's θ, `[num_points]`."""
        return grid.GRID + self.origin * grid.SPACING

    def at(self, iteration: int) -> float:
        """Return `M` of a closed iteration; the oldest remembered one if it lies before."""
        return float(self.path[max(-1 - max(self.iteration - iteration, 0), -PATH_LENGTH)])

    def pack(self) -> FloatArray:
        """Return all numbers in one vector."""
        return np.concatenate([[self.iteration, self.origin], self.path, self.weights])

    @classmethod
    def unpack(cls, vector: FloatArray) -> Shared:
        """Return the record of a packed vector."""
        return cls(int(vector[0]), int(vector[1]), vector[2 : 2 + PATH_LENGTH], vector[2 + PATH_LENGTH :])


class LogitFilter(PooledEstimator):
    """placeholder."""

    columns = ("successes", "failures", "success_drift", "failure_drift", "new_successes", "new_failures")
    dtype = np.float32

    prior_prompts: ClassVar[float] = 2.0
    em_steps: ClassVar[int] = 20
    smoothing: ClassVar[float] = 0.2

    def __init__(self, common_drift: float = 0.15, prompt_drift: float = 0.045) -> None:
        for name, value in (("common_drift", common_drift), ("prompt_drift", prompt_drift)):
            if not (value > 0 and math.isfinite(value)):
                raise UserError(
                    f"data.estimator.init_args.{name}={value} must be a positive, finite number of logits per RL iteration"
                )
        self.common_drift = float(common_drift)
        self.prompt_drift = float(prompt_drift)

    # --- one prompt ---------------------------------------------------------------------------------------------------

    def _kept(self, state: FloatArray, elapsed: FloatArray) -> FloatArray:
        """Return the share of the information in old outcomes that is left after `elapsed`, `[num_prompts]`."""
        successes, failures = state[:2]
        counts = successes + failures
        rate = (successes + 0.5) / (counts + 1)
        return 1 / (1 + self.prompt_drift**2 * elapsed * counts * rate * (1 - rate))

    def update(self, state: FloatArray, successes: FloatArray, counts: FloatArray, elapsed: FloatArray) -> FloatArray:
        """Discount the earlier outcomes and add the new ones to those that wait for the end of the iteration."""
        return np.concatenate([state[:4] * self._kept(state, elapsed), state[4:] + [successes, counts - successes]])

    def fold(self, state: FloatArray, shared: FloatArray, iteration: int) -> FloatArray:
        """Merge the outcomes that wait with the earlier ones, at the common logit of their iteration."""
        new = state[4:]
        common = Shared.unpack(shared).at(iteration)
        return np.concatenate([state[:2] + new, state[2:4] + new * common, np.zeros_like(new)])

    def waiting(self, state: FloatArray) -> BoolArray:
        """Return which prompts have new successes or failures."""
        return state[4:].any(axis=0)

    def log_likelihood(self, state: FloatArray, elapsed: FloatArray, thetas: FloatArray) -> FloatArray:
        """Return the log-likelihood of the earlier outcomes at each θ, `[num_prompts, num_points]`."""
        kept = self._kept(state, elapsed)
        successes, failures, success_drift, failure_drift = state[:4]
        at_success = success_drift / np.maximum(successes, 1e-30)
        at_failure = failure_drift / np.maximum(failures, 1e-30)
        # log σ(θ + M) = −log(1 + e^−θ e^−M): one logarithm per point, no exponential
        right = np.log1p(np.exp(-np.clip(at_success, -60, 60))[:, None] * np.exp(-thetas))
        wrong = np.log1p(np.exp(np.clip(at_failure, -60, 60))[:, None] * np.exp(thetas))
        return -(kept * successes)[:, None] * right - (kept * failures)[:, None] * wrong

    # --- all prompts --------------------------------------------------------------------------------------------------

    def initial_shared(self) -> FloatArray:
        """Return M = 0 and success rates uniform on (0, 1)."""
        return Shared(-1, 0, np.zeros(PATH_LENGTH), grid.UNIFORM_RATE).pack()

    def check_shared(self, shared: FloatArray) -> None:
        """Raise a UserError if the vector is too short or long, or the population no distribution."""
        length = 2 + PATH_LENGTH + len(grid.GRID)
        if shared.shape != (length,):
            raise UserError(f"'shared' has {len(shared)} numbers, not {length}")
        weights = Shared.unpack(shared).weights
        if not ((weights > 0).all() and abs(weights.sum() - 1) < 1e-6):
            raise UserError("'shared' holds a population that is no distribution")

    def advance(
        self, shared: FloatArray, iteration: int, visited: FloatArray, sample: FloatArray, elapsed: FloatArray
    ) -> FloatArray:
        """Estimate the iteration's step of M, recenter the grid, and refit the population."""
        old = Shared.unpack(shared)
        gap = max(iteration - old.iteration, 1) if old.iteration >= 0 else 1
        common = old.common + self._step(old, visited, gap)
        path = np.concatenate([old.path, np.full(min(gap, PATH_LENGTH) - 1, old.common), [common]])[-PATH_LENGTH:]
        origin = -round(common / grid.SPACING)
        moved = Shared(iteration, origin, path, grid.shifted(old.weights, origin - old.origin))
        folded = self.fold(sample, moved.pack(), iteration)
        likelihood = self.log_likelihood(folded, elapsed, moved.thetas)
        weights = grid.refit(moved.weights, likelihood, self.em_steps, self.prior_prompts, self.smoothing)
        return moved._replace(weights=weights).pack()

    def _step(self, shared: Shared, visited: FloatArray, gap: int) -> float:
        """Return the most probable change of M."""
        if visited.shape[1] == 0:
            return 0.0
        now = np.zeros(visited.shape[1])
        before = grid.posterior(shared.weights, self.log_likelihood(visited, now, shared.thetas))
        successes, failures = visited[4:, :, None]
        counts = (successes + failures)[:, 0]
        logits, variance = shared.thetas + shared.common, gap * self.common_drift**2
        step, limit = 0.0, 4 * math.sqrt(variance)
        for _ in range(NEWTON_STEPS):
            rate = 1 / (1 + np.exp(-logits - step))
            log_likelihood = successes * np.log(rate) + failures * np.log1p(-rate)
            after = grid.posterior(before, log_likelihood)
            mean, second = np.einsum("ng,g->n", after, rate), np.einsum("ng,g->n", after, rate**2)
            slope = (successes[:, 0] - counts * mean).sum() - step / variance
            curvature = (counts * (mean - second) - counts**2 * (second - mean**2)).sum() + 1 / variance
            step += float(np.clip(slope / max(curvature, 1 / variance), -limit / 2, limit / 2))
            step = float(np.clip(step, -limit, limit))
        return step

    # --- estimates ----------------------------------------------------------------------------------------------------

    def posterior(self, state: FloatArray, elapsed: FloatArray, population: FloatArray) -> FloatArray:
        """Return the distribution of each prompt's θ on the grid, `[num_prompts, num_points]`."""
        shared = Shared.unpack(np.asarray(population))
        likelihood = self.log_likelihood(state, elapsed, shared.thetas)
        new = state[4:]
        if new.any():  # within a running iteration: at the common logit that was known when it began
            rate = 1 / (1 + np.exp(-shared.thetas - shared.common))
            likelihood = likelihood + new[0][:, None] * np.log(rate) + new[1][:, None] * np.log1p(-rate)
        return grid.posterior(shared.weights, likelihood)

    def _rates(self, population: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return mean and variance terms at each point."""
        shared = Shared.unpack(np.asarray(population))
        rate = 1 / (1 + np.exp(-(shared.thetas + shared.common)[:, None] - self.common_drift * NODES))
        return (rate * NODE_WEIGHTS).sum(axis=1), (rate * (1 - rate) * NODE_WEIGHTS).sum(axis=1)

    def success_rate(self, state: FloatArray, elapsed: FloatArray, population: FloatArray) -> FloatArray:
        """Return `E[p]`."""
        return (self.posterior(state, elapsed, population) * self._rates(population)[0]).sum(axis=1)

    def bernoulli_variance(self, state: FloatArray, elapsed: FloatArray, population: FloatArray) -> FloatArray:
        """Return `E[p(1 − p)]`."""
        return (self.posterior(state, elapsed, population) * self._rates(population)[1]).sum(axis=1)
