"""Trend of a curve in words: from its first tenth to its last, and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dynamo_lightning.runs.history import RunHistory


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the `window` − 1 before it, those that are not finite left out, `[num_values]`."""
    known = np.isfinite(values)
    sums = np.cumsum(np.pad(np.where(known, values, 0), (window, 0)))
    counts = np.cumsum(np.pad(known, (window, 0)))
    total, count = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def ends(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean of the first and of the last tenth of a curve, and the standard error of their difference.

    Args:
        values: In order of iterations; those that are not finite are left out.

    Returns:
        `None` without values. With fewer than four values the standard error is infinite: nothing can be said.
    """
    known = np.asarray([value for value in values if math.isfinite(value)])
    if not len(known):
        return None
    tenth = max(1, len(known) // 10)
    first, last = known[:tenth], known[-tenth:]
    if len(known) < 4:
        return float(first.mean()), float(last.mean()), math.inf
    # The spread around the curve, from differences of neighbors, which a slow trend does not inflate.
    variance = float(np.square(np.diff(known)).mean()) / 2
    return float(first.mean()), float(last.mean()), math.sqrt(2 * variance / tenth)


def trend_in_words(subject: str, run: RunHistory, name: str, line: str = "") -> str:
    """Such as `Training reward rises from 0.42 to 0.78`; a change within two standard errors is none.

    Args:
        subject: Begins the title.
        run: The run.
        name: Metric.
        line: Which of several curves of the plot is meant.
    """
    found = ends(run.metrics.get(name, ()))
    if found is None:
        return subject
    first, last, error = found
    which = f" ({line})" if line else ""
    if abs(last - first) <= 2 * error:
        return f"{subject}{which}: {_short(last)} at the end, no clear trend"
    return f"{subject}{which} {'rises' if last > first else 'falls'} from {_short(first)} to {_short(last)}"


def end_in_words(subject: str, runs: Sequence[RunHistory], name: str, line: str = "") -> str:
    """Such as `Training reward at the end: A 0.78, B 0.74`, means over the last tenth."""
    found = [(run.label, ends(run.metrics.get(name, ()))) for run in runs]
    parts = [f"{label} {_short(values[1])}" for label, values in found if values is not None]
    return f"{subject}{f' ({line})' if line else ''} at the end: {', '.join(parts)}"


def _short(value: float) -> str:
    """Three significant digits; whole numbers of a thousand and more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
