"""Curves of a run, of bounded size however long it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class ThinnedCurves:
    """Metrics over iterations, at most `max_points` points a curve.

    A point is the mean of a metric over as many consecutive numbers of iterations: one at first, and twice as many
    whenever a curve would have too many points. A bin in which a metric has no finite value has no point.

    Args:
        max_points: Points of a curve, an even number.
    """

    def __init__(self, max_points: int = 200) -> None:
        self.max_points = max_points
        self.bin_size = 1
        """Iterations that a point stands for."""
        self._sums: dict[str, dict[int, tuple[float, int]]] = {}
        """By metric and number of the bin: sum and number of values."""

    @property
    def names(self) -> set[str]:
        """Metrics that have a point."""
        return set(self._sums)

    def add(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of an iteration.

        Args:
            iteration: From 1; not below those before.
            metrics: By name; values that are not finite are left out.
        """
        for name, value in metrics.items():
            if math.isfinite(value):
                bins = self._sums.setdefault(name, {})
                total, count = bins.get((iteration - 1) // self.bin_size, (0.0, 0))
                bins[(iteration - 1) // self.bin_size] = total + value, count + 1
        while (iteration - 1) // self.bin_size >= self.max_points:
            self.bin_size *= 2
            self._sums = {name: _halved(bins) for name, bins in self._sums.items()}

    def points(self, name: str) -> tuple[list[float], list[float]]:
        """Middle of each bin, in iterations, and mean of the metric in it."""
        bins = self._sums.get(name, {})
        middle = (self.bin_size + 1) / 2
        return [number * self.bin_size + middle for number in bins], [total / count for total, count in bins.values()]

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        sums = {
            name: [[number, total, count] for number, (total, count) in bins.items()]
            for name, bins in self._sums.items()
        }
        return {"bin_size": self.bin_size, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.bin_size = state["bin_size"]
        self._sums = {
            name: {number: (total, count) for number, total, count in rows} for name, rows in state["sums"].items()
        }


def _halved(bins: Mapping[int, tuple[float, int]]) -> dict[int, tuple[float, int]]:
    """Bins of twice as many iterations."""
    merged: dict[int, tuple[float, int]] = {}
    for number, (total, count) in bins.items():
        earlier, known = merged.get(number // 2, (0.0, 0))
        merged[number // 2] = earlier + total, known + count
    return merged
