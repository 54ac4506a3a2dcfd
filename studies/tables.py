"""Tables of a study as Markdown, from its result files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.comparison import Cell, Comparison, End, compare, end_of, read_results
from studies.design import Study
from studies.paired import holm, ratio_interval, sign_flip_p


def rate_table(study: Study, ends: dict[Cell, End]) -> str:
    """Mean iterations to the target of every arm and learning rate, with the runs that there are (of pilot seeds)."""
    seeds = study.pilot_seeds or study.seeds
    rates = sorted(study.learning_rates)
    lines = ["| arm | " + " | ".join(f"{rate:.0e}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for arm in study.arms:
        cells = []
        for rate in rates:
            runs = [ends[arm.name, rate, seed] for seed in seeds if (arm.name, rate, seed) in ends]
            mean = f"{np.mean([end.iterations for end in runs]):.0f}" if runs else "–"
            cells.append(f"{mean} ({sum(end.reached for end in runs)} of {len(runs)})" if runs else mean)
        lines.append(f"| `{arm.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_table(study: Study, comparisons: Sequence[Comparison]) -> str:
    """Arms at their best learning rates against the reference."""
    others = [found for found in comparisons if found.arm != study.reference]
    adjusted = dict(zip([found.arm for found in others], holm([found.p for found in others]), strict=True))
    head = "| arm | seeds | best rate | iterations | tokens | ratio of iterations | ratio of tokens | p | p, Holm |"
    lines = [head, "|---" * 9 + "|"]
    for found in comparisons:
        rate = f"{found.learning_rate:.0e}"
        rate += f", of {len(found.learning_rates)}" if len(found.learning_rates) > 1 else ""
        ratios = (
            f"{with_interval(found.ratio, found.interval)} | {with_interval(found.token_ratio, found.token_interval)}"
        )
        tests = f"{found.p:.3f} | {adjusted.get(found.arm, 1):.3f}"
        if found.arm == study.reference:
            ratios, tests = "1 | 1", "– | –"
        lines.append(
            f"| `{found.arm}` | {len(found.seeds)} | {rate} | {found.iterations:.0f} | {found.tokens:.0f} | {ratios} "
            f"| {tests} |"
        )
    return "\n".join(lines)


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    """Such as `0.61 [0.54, 0.69]`."""
    return f"{value:.2f}" if interval is None else f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def final_table(study: Study, results: dict[Cell, dict[str, Any]]) -> str:
    """Means of the last values, relative to the reference's on the same seeds, and the p-value of the difference.

    Every arm has the one rate of the grid, or its own.
    """
    lines = ["| arm | seeds | " + " | ".join(study.final_metrics) + " |"]
    lines.append("|---" * (len(study.final_metrics) + 2) + "|")
    for arm in study.arms:
        of_arm = {seed: result["final"] for (name, _, seed), result in results.items() if name == arm.name}
        of_reference = {seed: result["final"] for (name, _, seed), result in results.items() if name == study.reference}
        seeds = sorted(of_arm.keys() & of_reference.keys())
        if not seeds:
            continue
        cells = []
        for metric in study.final_metrics:
            ours, theirs = (np.array([finals[seed][metric] for seed in seeds]) for finals in (of_arm, of_reference))
            cell = f"{ours.mean():.3g}"
            if arm.name != study.reference and len(seeds) > 1 and theirs.min() > 0:
                ratio = with_interval(ours.mean() / theirs.mean(), ratio_interval(ours, theirs))
                cell += f"; {ratio}, p {sign_flip_p(ours, theirs, of_logs=False):.3f}"
            cells.append(cell)
        lines.append(f"| `{arm.name}` | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(study: Study, folder: Path) -> str:
    """All tables, as Markdown."""
    results = read_results(study, folder)
    runs = f"{len(results)} of {sum(1 for _ in study.runs())} runs."
    if study.target is None:
        head = f"{runs} After {study.limit} iterations; ratios to `{study.reference}` on the same seeds:"
        return f"{head}\n\n{final_table(study, results)}"
    ends = {cell: end_of(study, result) for cell, result in results.items()}
    what = "pilot seeds" if study.pilot_seeds else "seeds"
    how = "at the rate chosen on the pilot seeds" if study.pilot_seeds else "at its best rate"
    return "\n\n".join(
        [
            f"{runs} Iterations to {study.metric} ≥ {study.target}, mean over the {what} run (runs that reached it, of "
            f"runs); never counts as {study.limit}:",
            rate_table(study, ends),
            f"Against `{study.reference}` on the same seeds, each arm {how}:",
            comparison_table(study, compare(study, ends)),
        ]
    )
