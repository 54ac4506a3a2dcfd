"""Arms of a study against its reference, from the result files.

Every arm has its own best learning rate of the grid: the one with the fewest iterations on average. Without pilot seeds
it is chosen on the seeds that are compared, for every arm alike, so that a best value is somewhat flattering, the
reference's too. With pilot seeds it is chosen on these, and the comparison is made on other seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_lightning.errors import RunError
from studies.design import Study
from studies.paired import ratio_interval, sign_flip_p

Cell = tuple[str, float, int]
"""Arm, learning rate, seed."""


@dataclass(frozen=True)
class End:
    """Cost of reaching the target; all of the run if it never did."""

    iterations: float
    tokens: float
    reached: bool


@dataclass(frozen=True)
class Comparison:
    """An arm against the reference on the same seeds, each at its best learning rate."""

    arm: str
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    """Rates that were open to the arm on all these seeds: the chosen one, or those that the reference has too."""
    learning_rate: float
    iterations: float
    tokens: float
    ratio: float
    token_ratio: float
    interval: tuple[float, float] | None
    """95 % interval of the ratio of iterations; `None` with one seed."""
    token_interval: tuple[float, float] | None
    """That of the ratio of tokens."""
    p: float
    """The sign-flip test's, not adjusted."""


def read_results(study: Study, folder: Path) -> dict[Cell, dict[str, Any]]:
    """Result files of the study's runs by arm, learning rate and seed.

    Raises:
        RunError: If a file was made by another version of the design.
    """
    found = {}
    for run in study.runs():
        path = folder / f"{run.name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            if result["frozen_on"] != study.frozen_on or result["options"] != list(run.options):
                raise RunError(f"{path} is of another design than the one frozen on {study.frozen_on}: run it again")
            found[run.arm.name, run.learning_rate, run.seed] = result
    return found


def end_of(study: Study, result: dict[str, Any]) -> End:
    """First evaluation at or above the target; without one, the limit of iterations and all tokens of the run."""
    curve = result["curve"]
    for iteration, tokens, value in zip(curve["iteration"], curve["tokens"], curve["value"], strict=True):
        if study.target is not None and value >= study.target:
            return End(iteration, tokens, True)
    return End(study.limit, result["tokens"], False)


def compare(study: Study, ends: dict[Cell, End]) -> list[Comparison]:
    """Every arm with results against the reference, in the order of the design.

    In a study with pilot seeds each arm has its chosen rate, and seeds are those that both have at theirs. Without,
    learning rates are those that both have on a common seed, seeds those on which both have all of these rates: a seed
    or a rate that is still being run is left out, and neither arm has the larger choice.
    """
    found = []
    for arm in study.arms:
        rates, seeds = _common(study, arm.name, ends)
        if not rates or not seeds:
            continue
        best, ours, our_tokens = _at_best_rate(ends, arm.name, rates, seeds)
        reference_rates = _common(study, study.reference, ends)[0] if study.pilot_seeds else rates
        _, theirs, their_tokens = _at_best_rate(ends, study.reference, reference_rates, seeds)
        several = len(seeds) > 1
        found.append(
            Comparison(
                arm.name, seeds, rates, best, float(ours.mean()), float(our_tokens.mean()),
                float(ours.mean() / theirs.mean()), float(our_tokens.mean() / their_tokens.mean()),
                ratio_interval(ours, theirs) if several else None,
                ratio_interval(our_tokens, their_tokens) if several else None,
                sign_flip_p(our_tokens, their_tokens),
            )
        )  # fmt: skip
    return found


def _common(study: Study, arm: str, ends: dict[Cell, End]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Rates and seeds on which an arm is compared with the reference; those that were chosen, if there are pilots."""
    if study.pilot_seeds:
        rate, other = (_chosen(study, name) for name in (arm, study.reference))
        if rate is None or other is None:
            return (), ()
        both = (s for s in study.seeds if (arm, rate, s) in ends and (study.reference, other, s) in ends)
        return (rate,), tuple(both)
    paired = {(rate, seed) for name, rate, seed in ends if name == arm and (study.reference, rate, seed) in ends}
    rates = tuple(rate for rate in study.learning_rates if any(rate == its for its, _ in paired))
    return rates, tuple(seed for seed in study.seeds if all((rate, seed) in paired for rate in rates))


def _chosen(study: Study, name: str) -> float | None:
    return next(arm.learning_rate for arm in study.arms if arm.name == name)


def _at_best_rate(
    ends: dict[Cell, End], arm: str, rates: Sequence[float], seeds: Sequence[int]
) -> tuple[float, np.ndarray, np.ndarray]:
    """The rate of the fewest iterations on average, and iterations and tokens there, one per seed."""
    best = min(rates, key=lambda rate: sum(ends[arm, rate, seed].iterations for seed in seeds))
    iterations = np.array([ends[arm, best, seed].iterations for seed in seeds], dtype=np.float64)
    return best, iterations, np.array([ends[arm, best, seed].tokens for seed in seeds], dtype=np.float64)
