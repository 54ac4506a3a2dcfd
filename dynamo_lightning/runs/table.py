"""The report of a finished run in the terminal.

Rich is imported where it is needed: it would make every start of the command line wait.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynamo_lightning.runs.summary import is_headline

if TYPE_CHECKING:
    from rich.console import Console


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
