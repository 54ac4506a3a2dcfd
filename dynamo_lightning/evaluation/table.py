"""The results of an evaluation for people and programs: a table on the screen, a JSON and a CSV file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_lightning.evaluation.summary import MEAN, BenchmarkResult, Estimate, as_plain
from dynamo_lightning.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console


def write_results(folder: Path, results: Mapping[str, BenchmarkResult], settings: Mapping[str, Any]) -> list[Path]:
    """Write `results.json` (with the settings) and `results.csv` (a line for each number), and return their paths."""
    plain = {"settings": dict(settings), "results": as_plain(results)}
    write_atomically(folder / "results.json", json.dumps(plain, indent=2, default=str) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["benchmark", "metric", "value", "low", "high", "problems", "samples"])
    for source, result in results.items():
        for name, estimate in result.metrics.items():
            numbers = [estimate.value, estimate.low, estimate.high, result.num_problems, result.num_samples]
            writer.writerow([source, name, *numbers])
    write_atomically(folder / "results.csv", text.getvalue())
    return [folder / "results.json", folder / "results.csv"]


def print_results(results: Mapping[str, BenchmarkResult], console: Console | None = None) -> None:
    """Print a row for each benchmark and one for their mean; below each number its 95 % interval.

    Args:
        results: As `summarise` returns them.
        console: Where to print, by default standard output.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if console is None:
        console = Console()
        if not console.is_terminal:  # a log has no width to respect
            console = Console(width=160)
    names = list(dict.fromkeys(name for result in results.values() for name in result.metrics))
    title = "percent (length: tokens), below it the 95 % interval over problems"
    table = Table("benchmark", title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for source, result in results.items():
        if source == MEAN:
            table.add_section()
        cells = [_cell(name, result.metrics.get(name)) for name in names]
        table.add_row(f"{source}\n{result.num_problems} problems", *cells)
    console.print(table)


def _cell(name: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    factor, digits = (1, 0) if name == "length" else (100, 1)
    value, low, high = (f"{factor * x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value}\n{low}–{high}"
