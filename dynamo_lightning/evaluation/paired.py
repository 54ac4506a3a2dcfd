"""Comparison of two policies on the same problems: pure functions on values joined by problem.

Two policies find the same problems easy and hard, so that their differences by problem vary far less than either's
values: intervals of the two means may overlap widely where a paired comparison leaves no doubt.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

MAX_EXACT_PROBLEMS = 14
"""Up to so many problems with a difference the sign-flip test goes through all 2ⁿ flips."""
_AT_ONCE = 2**20  # values of a resampling held at once

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two means over the same problems, the second minus the first."""

    num_problems: int
    """Problems that both have."""
    difference: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    p_value: float
    """Two-sided, of no difference."""


def join(first: Sequence[Mapping[Key, float]], second: Sequence[Mapping[Key, float]]) -> tuple[Tensor, Tensor]:
    """Values of the problems that every run has, in the same order: `[num_runs, num_problems]` of either side.

    Args:
        first: Values by problem of each run (seed) of the first side.
        second: Those of the second side.
    """
    common = set(first[0]).intersection(*first[1:], *second)
    keys = sorted(common, key=str)

    def table(runs: Sequence[Mapping[Key, float]]) -> Tensor:
        return torch.tensor([[run[key] for key in keys] for run in runs], dtype=torch.float64)

    return table(first), table(second)


def sign_flip_p_value(differences: Tensor, num_flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the sign-flip test: without an effect, every difference is as likely as its negative.

    Exact for up to 14 differences other than 0, else from random flips: `(1 + flips at least as far) / (1 + flips)`.

    Args:
        differences: One for each problem, `[num_problems]`.
        num_flips: Random flips.
        seed: Of the flips.
    """
    moved = differences.double()[differences != 0].sort().values  # the order of problems does not matter
    if not len(moved):
        return 1.0
    observed = float(moved.sum().abs()) * (1 - 1e-12)  # equal sums, to rounding, are as far
    if len(moved) <= MAX_EXACT_PROBLEMS:
        signs = torch.tensor(list(product([1.0, -1.0], repeat=len(moved))), dtype=torch.float64)
        return float(((signs @ moved).abs() >= observed).double().mean())
    generator = torch.Generator().manual_seed(seed)
    as_far, step = 0, max(1, _AT_ONCE // len(moved))
    for start in range(0, num_flips, step):
        shape = (min(step, num_flips - start), len(moved))
        signs = torch.randint(2, shape, generator=generator).double() * 2 - 1
        as_far += int(((signs @ moved).abs() >= observed).sum())
    return (1 + as_far) / (1 + num_flips)


def paired_bootstrap(first: Tensor, second: Tensor, num_bootstrap: int = 4_000, seed: int = 0) -> Tensor:
    """Differences of means of resampled problems, the same for both sides, and of resampled runs of either side.

    Args:
        first: `[num_runs, num_problems]` of the first side.
        second: `[num_runs, num_problems]` of the second side, of the same problems.
        num_bootstrap: Resamples.
        seed: Of the resampling.

    Returns:
        `[num_bootstrap]`, float64, the second minus the first.
    """
    generator = torch.Generator().manual_seed(seed)
    number = first.shape[1]

    def means(values: Tensor, problems: Tensor) -> Tensor:
        runs = torch.randint(len(values), (len(problems), len(values)), generator=generator)
        counts = torch.zeros(len(problems), len(values), dtype=torch.float64)
        counts.scatter_add_(1, runs, torch.ones_like(runs, dtype=torch.float64))
        by_run = torch.stack([row[problems].mean(1) for row in values], 1)
        return (counts * by_run).sum(1) / len(values)

    found, step = [], max(1, _AT_ONCE // number)
    for start in range(0, num_bootstrap, step):
        problems = torch.randint(number, (min(step, num_bootstrap - start), number), generator=generator)
        found.append(means(second, problems) - means(first, problems))
    return torch.cat(found)


def compare_paired(
    first: Sequence[Mapping[Key, float]], second: Sequence[Mapping[Key, float]], seed: int = 0
) -> PairedDifference | None:
    """Difference of two sides, each of one or several runs with different seeds; `None` without a common problem.

    The interval is the percentile interval of `paired_bootstrap`. The p-value is that of the sign-flip test on the
    differences between the runs' means by problem. With several runs on a side these say nothing of how much seeds
    matter: the p-value is then the larger one of this and of the bootstrap over problems and runs.

    Args:
        first: Values by problem of each run of the first side.
        second: Those of the second side.
        seed: Of the resampling.
    """
    a, b = join(first, second)
    if not a.shape[1]:
        return None
    differences = b.mean(0) - a.mean(0)
    resampled = paired_bootstrap(a, b, seed=seed)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    p_value = sign_flip_p_value(differences, seed=seed)
    if len(a) > 1 or len(b) > 1:
        tail = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
        p_value = max(p_value, min(1.0, 2 * (1 + tail) / (1 + len(resampled))))
    mean = float(differences.mean())
    return PairedDifference(a.shape[1], mean, min(low, mean), max(high, mean), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for several tests by Holm's method: the family-wise error stays below the level.

    The i-th smallest of m is multiplied by m − i (i from 0), and none is below a smaller one's.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
