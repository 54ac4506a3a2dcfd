"""The numbers that all prompts of a `LogitFilter` have in common, in one vector."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dynamo_lightning.allocation.estimators import population as grid
from dynamo_lightning.allocation.estimators.feature_offsets import FeatureOffsets
from dynamo_lightning.allocation.records import FloatArray

PATH_LENGTH = 16
"""Iterations whose common logit M is remembered: for its trend, and for outcomes that arrive late."""

SHARED_LENGTH = 2 + PATH_LENGTH + len(grid.GRID)
"""Numbers in the shared vector, without those of the followers and of the features."""

FEATURE_COLUMN = 6
"""Row of a state that holds the packed features, if there are any."""


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
    features: FloatArray = np.empty(0)
    """Packed `FeatureOffsets`; empty without features."""
    followers: FloatArray = np.empty(0)
    """Packed `Followers`; empty if all prompts are taken to follow."""

    @property
    def common(self) -> float:
        """The latest `M`."""
        return float(self.path[-1])

    @property
    def trend(self) -> float:
        """Mean step of `M` over the remembered iterations, in logits per RL iteration."""
        return float(self.path[-1] - self.path[0]) / (PATH_LENGTH - 1)

    def expected_step(self, gap: int) -> float:
        """Return the step of `M` that the trend says for `gap` iterations, no further than it was observed."""
        return min(gap, PATH_LENGTH - 1) * self.trend

    @property
    def next_logits(self) -> FloatArray:
        """Logits `θ + M` on the grid that are expected in the next iteration, `[num_points]`."""
        return self.thetas + self.common + self.trend

    @property
    def thetas(self) -> FloatArray:
        """The grid's θ, `[num_points]`."""
        return grid.GRID + self.origin * grid.SPACING

    def at(self, iteration: int) -> float:
        """Return `M` of a closed iteration; the oldest remembered one if it lies before."""
        return float(self.path[max(-1 - max(self.iteration - iteration, 0), -PATH_LENGTH)])

    def pack(self) -> FloatArray:
        """Return all numbers in one vector."""
        return np.concatenate([[self.iteration, self.origin], self.path, self.weights, self.followers, self.features])

    @classmethod
    def unpack(cls, vector: FloatArray, num_followers: int = 0) -> Shared:
        """Return the record of a packed vector, with so many numbers about followers."""
        ends = np.cumsum([PATH_LENGTH, len(grid.GRID), num_followers])
        path, weights, followers, features = np.split(vector[2:], ends)
        return cls(int(vector[0]), int(vector[1]), path, weights, features, followers)

    def offsets(self, state: FloatArray) -> FloatArray | None:
        """Return the prompts' offsets β · x, in logits, `[num_prompts]`; `None` without features."""
        return FeatureOffsets.unpack(self.features).of(state[FEATURE_COLUMN]) if len(self.features) else None
