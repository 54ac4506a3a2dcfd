"""The `summary.json` of a finished run, and the means that it holds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamo_lightning.errors import MissingFileError, UserError
from dynamo_lightning.files import write_atomically

LAST_ITERATIONS = 10
"""RL iterations over which the end of a run is summed up."""
HIGH_WATER_MARKS = ("perf/total_num_tokens", "perf/peak_memory")
"""Metrics that only grow: their last value counts, not their mean."""
TRAINING_PHASES = ("generate", "reward", "logprobs", "score", "update")
"""Phases of an iteration; `score` is the name of `logprobs` in runs of version 0.1."""
NEEDED = ("iterations", "before", "after", "seconds", "final")


def is_headline(name: str) -> bool:
    """True for a validation result in its own right, false for an end of another one's interval."""
    return name.startswith("val/") and not name.endswith(("_low", "_high"))


def read_summary(folder: str) -> dict[str, Any]:
    """Numbers of a run.

    Args:
        folder: Its log folder.

    Raises:
        MissingFileError: If there is no summary.
        UserError: If it is not complete.
    """
    path = Path(folder) / "summary.json"
    if not path.is_file():
        hint = f"is {folder} a run's log folder?"
        if (path.parent / "metrics.csv").is_file():
            hint = "look at a run that goes on, or was killed, by report --watch or report --output report.html"
        raise MissingFileError(f"{path} does not exist: a run writes it when it ends; {hint}")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not complete JSON ({error}): resume the run, which writes it again") from None
    missing = [name for name in NEEDED if not isinstance(summary, dict) or name not in summary]
    if missing:
        raise UserError(f"{path} is not complete: {', '.join(missing)} missing; is it the summary of a run?")
    return summary


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Writes a summary as JSON; numbers that are not finite, which JSON lacks, become null; pairs stand in one line."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(finite(summary), indent=2, allow_nan=False)
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)  # counts of a problem in one line
    write_atomically(path, text + "\n")


def mean_metrics(rows: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Metrics at the end of a run: means over its last iterations, weighted by their rollouts.

    The last batch of an epoch alone may be a few prompts.

    Args:
        rows: Number of rollouts and metrics of each iteration, in order.

    Returns:
        By name the mean over the iterations that have the metric; the last value of those that only grow.
    """
    values: dict[str, list[tuple[int, float]]] = {}
    for num_rollouts, metrics in rows:
        for name, value in metrics.items():
            values.setdefault(name, []).append((num_rollouts, value))
    found = {}
    for name, pairs in values.items():
        total = sum(weight for weight, _ in pairs)
        if name in HIGH_WATER_MARKS or total == 0:
            found[name] = pairs[-1][1]
        else:
            found[name] = sum(weight * value for weight, value in pairs) / total
    return found
