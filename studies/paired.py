"""Comparisons of two arms on the same seeds: ratio, bootstrap interval, sign-flip test, Holm's correction."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

EXACT_UP_TO = 12
"""Pairs for which all sign flips are enumerated; beyond, 2¹² are drawn at random."""


def ratio_interval(values: ArrayLike, reference: ArrayLike, replications: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the ratio of means when seeds are drawn again, both arms' values together.

    Args:
        values: One positive number per seed, `[num_seeds]`, at least 2.
        reference: The reference's, same seeds in the same order.
        replications: Bootstrap samples; their generator is seeded, so that the interval is always the same.
    """
    ours, theirs = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(ours), size=(replications, len(ours)))
    low, high = np.quantile(ours[drawn].mean(1) / theirs[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def sign_flip_p(values: ArrayLike, reference: ArrayLike, *, of_logs: bool = True) -> float:
    """Two-sided p-value of the mean log ratio if each seed's two values could as well be exchanged.

    With n seeds it is at least `2 / 2ⁿ`.

    Args:
        values: One number per seed, `[num_seeds]`; positive for logarithms.
        reference: The reference's, same seeds in the same order.
        of_logs: Of the mean difference instead if `False`.
    """
    ours, theirs = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    logs = np.log(ours / theirs) if of_logs else ours - theirs
    if len(logs) <= EXACT_UP_TO:
        signs = np.array(list(itertools.product((1, -1), repeat=len(logs))))
    else:
        drawn = np.random.default_rng(0).choice((1, -1), size=(2**EXACT_UP_TO - 1, len(logs)))
        signs = np.vstack([np.ones(len(logs)), drawn])
    sums = np.abs(signs @ logs)
    return float(np.mean(sums >= abs(logs.sum()) - 1e-12))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm, 1979, Scand. J. Statist. 6)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
