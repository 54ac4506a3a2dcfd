"""The paper's estimator: lifetime counts, neither forgotten nor smoothed."""

from __future__ import annotations

import numpy as np

from dynamo_lightning.allocation.estimators.base import VarianceEstimator
from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.allocation.variance import sample_bernoulli_variance
from dynamo_lightning.errors import UserError


class PaperBernoulli(VarianceEstimator):
    """The paper's estimator (arXiv 2602.19208), for comparison: `P = k(G − k)/(G(G − 1))` of lifetime counts.

    It is unbiased as long as the policy does not change, never forgets, and gives 0 to a prompt whose few outcomes
    were all equal. Prompts with fewer than two outcomes are explored first: their weight is 1/2, the largest value
    that P can take (one of two right), so P is not confined to [0, 1/4] as p(1 − p) is.
    """

    columns = ("successes", "counts")

    def check_state(self, state: FloatArray) -> None:
        """Raise a ValueError if a count is negative or successes outnumber rollouts."""
        super().check_state(state)
        if (state[0] > state[1]).any():
            row = np.flatnonzero(state[0] > state[1])[0]
            raise UserError(f"{state[0, row]:g} successes in {state[1, row]:g} rollouts")

    def update(self, state: FloatArray, successes: FloatArray, counts: FloatArray, elapsed: FloatArray) -> FloatArray:
        """Add the new counts."""
        return state + np.stack([successes, counts])

    def success_rate(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return `k/G`; 1/2 for an unseen prompt."""
        successes, counts = state
        return np.where(counts > 0, successes / np.maximum(counts, 1.0), 0.5)

    def bernoulli_variance(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return P; 1/2 for a prompt with fewer than two outcomes."""
        successes, counts = state
        return np.where(counts < 2, 0.5, sample_bernoulli_variance(successes, counts))
