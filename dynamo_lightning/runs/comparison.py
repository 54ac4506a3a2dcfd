"""Several runs side by side: what each reached, and their differences problem by problem.

Runs whose folders differ only in `version_N` and that have different seeds count as repetitions of one arm, provided
that there is another arm to compare it with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynamo_lightning.evaluation.metrics import pass_at_k
from dynamo_lightning.evaluation.paired import PairedDifference, compare_paired, holm
from dynamo_lightning.runs.summary import TRAINING_PHASES, is_headline, read_summary
from dynamo_lightning.runs.table import format_number, with_interval

if TYPE_CHECKING:
    from rich.console import Console

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone."""

    label: str
    """A letter."""
    runs: Mapping[str, Summary]
    """Content of `summary.json` by run folder."""


@dataclass(frozen=True)
class Comparison:
    """One metric of two arms."""

    metric: str
    """Without `val/`."""
    arms: str
    """Such as `B − A`."""
    result: PairedDifference
    adjusted_p_value: float
    """By Holm's method, over all comparisons of the table."""


def arms_of(summaries: Mapping[str, Summary]) -> list[Arm]:
    """Runs by arm, in the order given.

    Args:
        summaries: Content of `summary.json` by run folder.
    """
    groups: dict[str, list[str]] = {}
    for folder in summaries:
        is_version = re.fullmatch(r"version_\d+", Path(folder).name)
        groups.setdefault(os.path.dirname(folder) if is_version else folder, []).append(folder)
    groups = {name if len(folders) > 1 else folders[0]: folders for name, folders in groups.items()}
    seeds = [[summaries[folder].get("seed") for folder in folders] for folders in groups.values()]
    if len(groups) < 2 or any(len(set(of_arm)) < len(of_arm) for of_arm in seeds):
        groups = {folder: [folder] for folder in summaries}
    return [
        Arm(chr(ord("A") + i) if i < 26 else f"#{i}", {folder: summaries[folder] for folder in folders})
        for i, folders in enumerate(groups.values())
    ]


def problem_values(summary: Summary, metric: str) -> dict[str, float] | None:
    """pass@k of each problem at the last validation, by prompt id; `None` if the counts do not give it.

    Args:
        summary: Content of a run's `summary.json`.
        metric: Such as `val/math500/pass@8`.
    """
    match = re.fullmatch(r"val/(.+)/pass@(\d+)", metric)
    counts = ((summary.get("counts") or {}).get("after") or {}).get(match[1]) if match else None
    if match is None or not counts or min(samples for _, samples in counts.values()) < int(match[2]):
        return None
    correct, samples = torch.tensor(list(counts.values())).T
    return dict(zip(counts, pass_at_k(samples, correct, int(match[2])).tolist(), strict=True))


def compare_arms(arms: Sequence[Arm], metrics: Sequence[str]) -> list[Comparison]:
    """Every arm against the first in every metric that counts by problem give, with p-values adjusted for all of it."""
    found = []
    for metric in metrics:
        values = [[problem_values(run, metric) for run in arm.runs.values()] for arm in arms]
        for arm, own in zip(arms[1:], values[1:], strict=True):
            first, second = ([v for v in side if v is not None] for side in (values[0], own))
            if len(first) == len(values[0]) and len(second) == len(own):
                result = compare_paired(first, second)
                if result is not None:
                    found.append((metric.removeprefix("val/"), f"{arm.label} − {arms[0].label}", result))
    adjusted = holm([result.p_value for _, _, result in found])
    return [Comparison(*parts, p_value) for parts, p_value in zip(found, adjusted, strict=True)]


def print_comparison(summaries: Mapping[str, Summary], console: Console | None = None) -> None:
    """Print the runs, a line for each metric and run, and the paired differences; readable at 80 columns.

    Args:
        summaries: Content of `summary.json` by run folder.
        console: Where to print, by default standard output.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = console or Console()
    arms = arms_of(summaries)

    def table(*titles: str, **options: Any) -> Table:
        columns = [Column(title, overflow="fold", no_wrap=i > 0) for i, title in enumerate(titles)]
        return Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", **options)

    overview = table("run", "seed", "iterations", "training s", "variance ratio")
    runs = [(arm.label, folder, run) for arm in arms for folder, run in arm.runs.items()]
    for label, folder, run in runs:
        seconds = sum((run.get("seconds") or {}).get(phase, 0.0) for phase in TRAINING_PHASES)
        ratio = (run.get("final") or {}).get("alloc/predicted_variance_ratio")
        seed = "–" if run.get("seed") is None else str(run["seed"])
        numbers = (seed, str(run["iterations"]), f"{seconds:.1f}", format_number(ratio))
        overview.add_row(escape(f"{label}  {folder}"), *numbers)
    console.print(overview)

    metrics = sorted(
        {name for _, _, run in runs for x in ("before", "after") for name in run[x] or {} if is_headline(name)}
    )
    if metrics:
        scores = table("validation", "run", "before", "after")
        for metric in metrics:
            for position, (label, _, run) in enumerate(runs):
                before, after = run["before"] or {}, run["after"] or {}
                title = metric.removeprefix("val/") if position == 0 else ""
                row = (title, label, format_number(before.get(metric)), with_interval(after, metric))
                scores.add_row(*map(escape, row))
        console.print(scores)
    if len(arms) < 2:
        return
    comparisons = compare_arms(arms, metrics)
    if not comparisons:
        console.print("no paired comparison: the summaries have no counts of the same validation problems")
        return
    title = "after training, difference by problem: bootstrap interval, sign-flip test"
    paired = table("validation", "runs", "problems", "difference", "p", "p (Holm)", title=title)
    for each in comparisons:
        result = each.result
        difference = f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"
        p_values = (f"{result.p_value:.4f}", f"{each.adjusted_p_value:.4f}")
        paired.add_row(*map(escape, (each.metric, each.arms, str(result.num_problems), difference, *p_values)))
    console.print(paired)


def compare(run_folders: Sequence[str], console: Console | None = None) -> None:
    """Prints several runs side by side, and their differences problem by problem.

    Args:
        run_folders: Log folders, each with the `summary.json` of a run.
        console: Where to print, by default standard output.

    Raises:
        UserError: If a folder has no complete `summary.json`.
    """
    summaries = {os.path.normpath(folder): read_summary(folder) for folder in run_folders}
    print_comparison(summaries, console)
