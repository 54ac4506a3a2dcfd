"""Tables and figure of a study, from its result files alone: `python -m studies.analyse studies/noise_limited.py`.

Every arm has its own best learning rate of the grid: the one with the fewest iterations on average. It is chosen on the
seeds that are compared, for every arm alike, so that a best value is somewhat flattering, the reference's too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_lightning.errors import RunError, UserError
from studies.design import Study, load_study, results_folder
from studies.paired import holm, ratio_interval, sign_flip_p

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
    """Rates of the grid that both have on all these seeds."""
    learning_rate: float
    reference_rate: float
    iterations: float
    tokens: float
    ratio: float
    token_ratio: float
    interval: tuple[float, float] | None
    """95 % interval of the ratio of iterations; `None` with one seed."""
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
        if value >= study.target:
            return End(iteration, tokens, True)
    return End(study.limit, result["tokens"], False)


def compare(study: Study, ends: dict[Cell, End]) -> list[Comparison]:
    """Every arm with results against the reference, in the order of the design.

    Learning rates are those that both have on a common seed, seeds those on which both have all of these rates: a seed
    or a rate that is still being run is left out, and neither arm has the larger choice.
    """
    found = []
    for arm in [arm.name for arm in study.arms]:
        both = {(rate, seed) for name, rate, seed in ends if name == arm and (study.reference, rate, seed) in ends}
        rates = tuple(rate for rate in study.learning_rates if any(rate == paired for paired, _ in both))
        seeds = tuple(seed for seed in study.seeds if all((rate, seed) in both for rate in rates))
        if not rates or not seeds:
            continue
        best, ours, our_tokens = _at_best_rate(ends, arm, rates, seeds)
        reference_rate, theirs, their_tokens = _at_best_rate(ends, study.reference, rates, seeds)
        found.append(
            Comparison(
                arm, seeds, rates, best, reference_rate, float(ours.mean()), float(our_tokens.mean()),
                float(ours.mean() / theirs.mean()), float(our_tokens.mean() / their_tokens.mean()),
                ratio_interval(ours, theirs) if len(seeds) > 1 else None, sign_flip_p(ours, theirs),
            )
        )  # fmt: skip
    return found


def _at_best_rate(
    ends: dict[Cell, End], arm: str, rates: Sequence[float], seeds: Sequence[int]
) -> tuple[float, np.ndarray, np.ndarray]:
    """The rate of the fewest iterations on average, and iterations and tokens there, one per seed."""
    best = min(rates, key=lambda rate: sum(ends[arm, rate, seed].iterations for seed in seeds))
    iterations = np.array([ends[arm, best, seed].iterations for seed in seeds], dtype=np.float64)
    return best, iterations, np.array([ends[arm, best, seed].tokens for seed in seeds], dtype=np.float64)


def rate_table(study: Study, ends: dict[Cell, End]) -> str:
    """Mean iterations to the target of every arm and learning rate, with the runs that there are."""
    rates = sorted(study.learning_rates)
    lines = ["| arm | " + " | ".join(f"{rate:.0e}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for arm in study.arms:
        cells = []
        for rate in rates:
            runs = [ends[arm.name, rate, seed] for seed in study.seeds if (arm.name, rate, seed) in ends]
            mean = f"{np.mean([end.iterations for end in runs]):.0f}" if runs else "–"
            cells.append(f"{mean} ({sum(end.reached for end in runs)} of {len(runs)})" if runs else mean)
        lines.append(f"| `{arm.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_table(study: Study, comparisons: Sequence[Comparison]) -> str:
    """Arms at their best learning rates against the reference."""
    others = [found for found in comparisons if found.arm != study.reference]
    adjusted = dict(zip([found.arm for found in others], holm([found.p for found in others]), strict=True))
    head = (
        "| arm | seeds | best rate, of how many | iterations | tokens | ratio of iterations | of tokens | p | p, Holm |"
    )
    lines = [head, "|---" * 9 + "|"]
    for found in comparisons:
        of_grid = f"{found.learning_rate:.0e}, of {len(found.learning_rates)}"
        interval = "" if found.interval is None else " [{:.2f}, {:.2f}]".format(*found.interval)
        ratio, tests = f"{found.ratio:.2f}{interval}", f"{found.p:.3f} | {adjusted.get(found.arm, 1):.3f}"
        if found.arm == study.reference:
            ratio, tests = "1", "– | –"
        lines.append(
            f"| `{found.arm}` | {len(found.seeds)} | {of_grid} | {found.iterations:.0f} | {found.tokens:.0f} | {ratio} "
            f"| {found.token_ratio:.2f} | {tests} |"
        )
    return "\n".join(lines)


def tables(study: Study, folder: Path) -> str:
    """All tables, as Markdown."""
    results = read_results(study, folder)
    ends = {cell: end_of(study, result) for cell, result in results.items()}
    total = sum(1 for _ in study.runs())
    return "\n\n".join(
        [
            f"{len(results)} of {total} runs. Iterations to {study.metric} ≥ {study.target}, mean over the seeds run "
            f"(runs that reached it, of runs); never counts as {study.limit}:",
            rate_table(study, ends),
            f"Against `{study.reference}` on the same seeds, each arm at its best rate:",
            comparison_table(study, compare(study, ends)),
        ]
    )


def main(args: Sequence[str] | None = None) -> None:
    """Print the tables and write the figure."""
    parser = argparse.ArgumentParser(prog="python -m studies.analyse", description=__doc__)
    parser.add_argument("design", type=Path, help="file of the study, such as studies/noise_limited.py")
    parser.add_argument("--figure", type=Path, default=None, help="where the figure goes (PNG or SVG)")
    options = parser.parse_args(args)
    try:
        study = load_study(options.design)
        print(tables(study, results_folder(options.design)))
        if options.figure is not None:
            from studies.figure import draw

            draw(study, read_results(study, results_folder(options.design)), options.figure)
    except (UserError, RunError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
