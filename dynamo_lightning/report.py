"""The report of a finished run: one table, one picture, and the same numbers as `summary.json`.

Plain functions on plain data; `dynamo_lightning.callbacks.RunReport` collects the data. Matplotlib and rich are
imported where they are needed: they would make every start of the command line wait.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_lightning.runs.summary import read_summary

if TYPE_CHECKING:
    from rich.console import Console

PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("mean reward", {"reward": ""}),
    ("policy entropy (nats)", {"entropy": ""}),
    ("gradient norm before clipping", {"grad_norm": ""}),
    (
        "gradient variance relative to equal groups",
        {
            "alloc/predicted_variance_ratio": "predicted",
            "alloc/realised_variance_ratio": "realised",
            "alloc/best_variance_ratio": "best possible",
        },
    ),
    ("rollouts per prompt", {"alloc/n_max": "largest", "alloc/n_mean": "mean", "alloc/n_min": "smallest"}),
    ("advantage factor", {"mod/beta_comp_mean": "compensation", "mod/beta_stab_mean": "stabilisation"}),
    ("mean response length (tokens)", {"completions/mean_length": ""}),
)
"""Pictures in `curves.png` beside the validation metrics: axis label, and legend by metric name."""

TRAINING_PHASES = ("generate", "reward", "logprobs", "score", "update")
"""Phases of an iteration; `score` is the name of `logprobs` in runs of version 0.1."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is, whatever happens, either the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def is_headline(name: str) -> bool:
    """True for a validation result in its own right, false for an end of another one's interval."""
    return name.startswith("val/") and not name.endswith(("_low", "_high"))


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Writes a summary as JSON; numbers that are not finite, which JSON lacks, become null; pairs stand in one line."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(finite(summary), indent=2, allow_nan=False)
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)  # counts of a problem in one line
    write_atomically(path, (text + "\n").encode())


def draw_curves(
    path: Path,
    iterations: Sequence[int],
    history: Mapping[str, Sequence[float]],
    validations: Sequence[tuple[int, Mapping[str, float]]],
) -> None:
    """Draws a run's curves as small multiples into one PNG; a picture without any data is left out.

    Noisy curves are drawn faint, with their mean over the last twentieth of the run on top.

    Args:
        path: The PNG.
        iterations: RL iterations finished after each point, `[num_iterations]`.
        history: Values by metric name, each `[num_iterations]`, NaN where there was none.
        validations: For each validation, the iterations finished before it and its metrics by name.
    """
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot: needs no display and keeps no global state

    panels = [(label, {name: text for name, text in lines.items() if name in history}) for label, lines in PANELS]
    panels = [(label, lines) for label, lines in panels if lines]
    scores = sorted({name for _, metrics in validations for name in metrics if is_headline(name)})
    panels[1:1] = [("validation", {name: name.removeprefix("val/") for name in scores})] if scores else []
    if not panels:
        return

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    window = max(1, len(iterations) // 20)
    for axis, (label, lines) in zip(axes, panels, strict=False):
        for index, (name, text) in enumerate(lines.items()):
            color = f"C{index}"
            if name in scores:
                points = [(iteration, metrics[name]) for iteration, metrics in validations if name in metrics]
                axis.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=text)
                ends = [(i, m[f"{name}_low"], m[f"{name}_high"]) for i, m in validations if f"{name}_low" in m]
                if ends:
                    axis.fill_between(*zip(*ends, strict=True), color=color, alpha=0.12, linewidth=0)
                continue
            values = np.asarray(history[name], dtype=float)
            steady = window == 1 or name in ("alloc/n_min", "alloc/n_max", "alloc/n_mean")
            axis.plot(
                iterations, values, color=color, alpha=1 if steady else 0.3, linewidth=1, label=text if steady else None
            )
            if not steady:
                kept = np.isfinite(values)
                sums = np.cumsum(np.pad(np.where(kept, values, 0), (window, 0)))
                counts = np.cumsum(np.pad(kept, (window, 0)))
                total, count = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
                means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
                axis.plot(iterations, means, color=color, linewidth=1.8, label=text)
        if "alloc/predicted_variance_ratio" in lines:
            axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("RL iteration", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if any(lines.values()):
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())


def format_number(value: float | None) -> str:
    """Three decimals; a dash where there is no number."""
    return "–" if value is None else f"{value:.3f}"


def with_interval(metrics: Mapping[str, float | None], name: str) -> str:
    """A metric with its interval, if it has one."""
    text = format_number(metrics.get(name))
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return text if low is None or high is None else f"{text} [{format_number(low)}, {format_number(high)}]"


def print_summary(summary: Mapping[str, Any], files: Sequence[str] = (), console: Console | None = None) -> None:
    """Prints the results of a run: before → after, seconds per phase, files, and the commands to go on with.

    Args:
        summary: As in `summary.json`.
        files: Paths of what was written.
        console: Where to print, by default standard output.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = console or Console()
    before, after = summary["before"] or {}, summary["after"] or {}
    names = [name for name in sorted({*before, *after}) if is_headline(name)]
    title = f"{summary['iterations']} RL iterations" + (
        f", {summary['status']}" if summary["status"] != "finished" else ""
    )
    if names:
        titles = (
            Column("validation", overflow="fold"),
            *(Column(x, no_wrap=True) for x in ("before", "after", "change")),
        )
        table = Table(*titles, title=title, title_justify="left")
        for name in names:
            first, last = before.get(name), after.get(name)
            change = "–" if first is None or last is None else f"{last - first:+.3f}"
            row = (name.removeprefix("val/"), with_interval(before, name), with_interval(after, name), change)
            table.add_row(*map(escape, row))
        console.print(table)
    else:
        console.print(f"{title}, no validation")
    if names and summary["validated_at"] != summary["iterations"]:
        console.print(f"“after” was validated at iteration {summary['validated_at']} of {summary['iterations']}")
    total = sum(summary["seconds"].values())
    phases = ", ".join(
        f"{name} {seconds:.1f} ({seconds / total:.0%})"
        for name, seconds in sorted(summary["seconds"].items(), key=lambda item: -item[1])
        if total and seconds / total >= 0.005
    )
    console.print(f"seconds: {phases}", highlight=False)
    for path in files:
        console.print(f"wrote    {escape(path.removeprefix(os.getcwd() + os.sep))}", soft_wrap=True, highlight=False)
    for purpose, command in summary["commands"].items():  # never wrapped: they are there to be copied
        console.print(f"{purpose:8} {escape(command)}", soft_wrap=True, highlight=False)


def compare(run_folders: Sequence[str], console: Console | None = None) -> None:
    """Prints several runs side by side, and their differences problem by problem; see `comparison`.

    Args:
        run_folders: Log folders, each with the `summary.json` of a run.
        console: Where to print, by default standard output.

    Raises:
        UserError: If a folder has no complete `summary.json`.
    """
    from dynamo_lightning.comparison import print_comparison

    summaries = {os.path.normpath(folder): read_summary(folder) for folder in run_folders}
    print_comparison(summaries, console)
