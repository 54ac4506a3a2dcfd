"""A run in the terminal while it goes on, 80 columns wide: what its files tell, read anew every few seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dynamo_lightning.runs.history import RunHistory, read_history
from dynamo_lightning.runs.table import format_number

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

METRICS = {
    "reward": "training reward",
    "entropy": "entropy (nats)",
    "grad_norm": "gradient norm",
    "alloc/predicted_variance_ratio": "variance ratio",
    "groups/frac_mixed": "mixed groups",
    "completions/mean_length": "response length",
    "completions/clipped_ratio": "cut-off responses",
    "perf/throughput": "tokens per second",
    "perf/iteration_seconds": "seconds/iteration",
}
"""Metrics that are shown, by name, of runs that have them."""
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 30
_NUM_WARNINGS = 3


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """A curve as block characters from its smallest to its largest value; a space where there is no number.

    Args:
        values: `[num_values]`; of long curves means are drawn.
        width: Characters, at most.
    """
    if not len(values):
        return ""
    parts = np.array_split(np.asarray(values, dtype=float), min(width, len(values)))
    known = [part[np.isfinite(part)] for part in parts]
    means = [float(part.mean()) if len(part) else math.nan for part in known]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)

    def bar(mean: float) -> str:
        if not math.isfinite(mean):
            return " "
        return _BARS[min(7, int(8 * (mean - low) / span))] if span > 0 else _BARS[3]

    return "".join(map(bar, means))


def live_view(run: RunHistory) -> RenderableType:
    """Curves of a run, its last validations and its last warnings."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    status = (run.summary or {}).get("status", "going on, or killed")
    head = f"{run.folder}: {run.iterations[-1] if run.iterations else 0} RL iterations, {status}"
    table = Table("metric", "curve", "last", "mean", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, title in METRICS.items():
        values = [value for value in run.metrics.get(name, ()) if math.isfinite(value)]
        if values:
            recent = values[-max(1, len(values) // 10) :]
            table.add_row(title, sparkline(values), f"{values[-1]:.4g}", f"{sum(recent) / len(recent):.4g}")
    for name, points in run.validations.items():
        last = points[-1]
        interval = "" if last.low is None else f"[{format_number(last.low)}, {format_number(last.high)}]"
        curve = sparkline([point.value for point in points])
        table.add_row(escape(name[-17:]), curve, f"{last.value:.4g}", escape(interval))
    parts: list[RenderableType] = [Text(head, overflow="fold"), table]
    for mark in run.warnings[-_NUM_WARNINGS:]:
        parts.append(Text(f"{mark.level}, iteration {mark.iteration}: {mark.message}", overflow="fold"))
    return Group(*parts)


def watch(folder: str, every_n_seconds: float = 5.0, console: Console | None = None) -> None:
    """Show a run until it ends or Ctrl-C is pressed; once, where the output is no terminal.

    Args:
        folder: Log folder of the run.
        every_n_seconds: Time from one look at its files to the next.
        console: Where to print, by default standard output.

    Raises:
        UserError: If the folder is no run's.
    """
    from rich.console import Console
    from rich.live import Live

    console = console or Console()
    first = live_view(read_history(folder))
    if not console.is_terminal:
        console.print(first)
        return
    try:
        with Live(first, console=console, auto_refresh=False) as live:
            while not _has_ended(Path(folder)):
                time.sleep(every_n_seconds)
                live.update(live_view(read_history(folder)), refresh=True)
    except KeyboardInterrupt:
        return


def _has_ended(folder: Path) -> bool:
    """The summary, which a run writes when it ends, is newer than its metrics; a resumed run's metrics are newer."""
    summary, metrics = folder / "summary.json", folder / "metrics.csv"
    if not summary.is_file():
        return False
    return not metrics.is_file() or summary.stat().st_mtime >= metrics.stat().st_mtime
