"""A run as its folder tells it, for what is shown of it; files that are missing or half-written are told, not fatal."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dynamo_lightning.errors import MissingFileError, UserError
from dynamo_lightning.runs.folder import newest_config
from dynamo_lightning.runs.json_lines import read_rows
from dynamo_lightning.runs.summary import read_summary

FILES = ("metrics.csv", "summary.json", "rollouts.jsonl", "groups.jsonl", "tripwires.jsonl", "config.yaml")
"""Files that make a folder a run's; any one is enough."""


@dataclass(frozen=True)
class Estimate:
    """A validation metric at one point of a run, with its 95 % interval."""

    iteration: int
    """RL iterations finished before the validation."""
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Warned:
    """A tripwire that went off."""

    iteration: int
    """Counted from 1."""
    tripwire: str
    level: str
    """`warning` or `error`."""
    message: str


@dataclass(frozen=True)
class RunHistory:
    """Everything that a run's folder tells."""

    folder: str
    label: str
    """A letter, the shortest name among the runs shown."""
    iterations: Sequence[int]
    """RL iterations finished after each row, `[num_rows]`."""
    metrics: Mapping[str, Sequence[float]]
    """By name a value for each row, NaN where there is none, `[num_rows]`; validation metrics are not among them."""
    validations: Mapping[str, Sequence[Estimate]]
    """By name, without `val/`."""
    groups: Sequence[Mapping[str, Any]]
    """Rows of `groups.jsonl`, by iteration."""
    warnings: Sequence[Warned]
    summary: Mapping[str, Any] | None
    options: Mapping[str, str]
    """Options of the run's newest config by dotted name, as text; empty if it cannot be read."""
    unreadable: Sequence[str] = field(default=())
    """Files that could not be read, in words."""

    def has(self, name: str) -> bool:
        """True if the run has a number for this metric."""
        return any(map(math.isfinite, self.metrics.get(name, ())))


def read_history(folder: str, label: str = "") -> RunHistory:
    """Contents of a run's folder.

    Args:
        folder: Log folder of a run, finished or not.
        label: Its short name.

    Raises:
        MissingFileError: If there is no such folder.
        UserError: If it has none of a run's files.
    """
    path = Path(folder)
    if not path.is_dir():
        raise MissingFileError(f"report: there is no run folder {folder}")
    if not any((path / name).is_file() for name in FILES):
        raise UserError(f"report: {folder} has none of a run's files ({', '.join(FILES)}); is it a run's log folder?")
    unreadable: list[str] = []
    summary = None
    try:
        summary = _cleaned(read_summary(folder))
    except MissingFileError:
        unreadable.append("no summary.json: the run has not ended, or was killed")
    except UserError as error:
        unreadable.append(str(error))
    iterations, metrics, validations, torn = _read_metrics(path / "metrics.csv")
    if not iterations:
        unreadable.append("metrics.csv has no complete iteration")
    if torn:
        unreadable.append(f"{torn} rows of metrics.csv are torn or not numbers, and left out")
    _add_first_validation(validations, summary)
    groups = sorted((row for row in read_rows(path / "groups.jsonl") if _is_group_row(row)), key=_iteration)
    return RunHistory(
        folder=os.path.normpath(folder),
        label=label,
        iterations=iterations,
        metrics=metrics,
        validations=validations,
        groups=groups,
        warnings=_read_warnings(path / "tripwires.jsonl"),
        summary=summary,
        options=_read_options(path),
        unreadable=tuple(unreadable),
    )


def _read_metrics(path: Path) -> tuple[list[int], dict[str, list[float]], dict[str, list[Estimate]], int]:
    """Iterations, metrics, validations, and the number of rows that could not be read."""
    if not path.is_file():
        return [], {}, {}, 0
    rows: dict[int, dict[str, float]] = {}
    torn = 0
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        try:
            for line in csv.DictReader(line.replace("\0", "") for line in file):
                if not re.fullmatch(r"\d{1,12}", line.get("step") or "") or None in line or None in line.values():
                    torn += 1
                    continue
                rows.setdefault(int(line["step"]) + 1, {}).update(_numbers(line))
        except csv.Error:  # a field without end
            torn += 1
    iterations = sorted(i for i, row in rows.items() if any(not name.startswith(("val/", "test/")) for name in row))
    names = sorted({name for row in rows.values() for name in row if not name.startswith(("val/", "test/"))})
    metrics = {name: [rows[i].get(name, math.nan) for i in iterations] for name in names}
    validations: dict[str, list[Estimate]] = {}
    for iteration in sorted(rows):
        for name, value in _headlines(rows[iteration]).items():
            low, high = (rows[iteration].get(f"val/{name}_{end}") for end in ("low", "high"))
            validations.setdefault(name, []).append(Estimate(iteration, value, low, high))
    return iterations, metrics, validations, torn


def _numbers(line: Mapping[str, str]) -> dict[str, float]:
    found = {}
    for name, text in line.items():
        try:
            value = float(text)
        except ValueError:
            continue
        if math.isfinite(value) and name not in ("step", "epoch"):
            found[name] = value
    return found


def _headlines(row: Mapping[str, float]) -> dict[str, float]:
    """Validation metrics without `val/`, without the ends of intervals."""
    return {
        name.removeprefix("val/"): value
        for name, value in row.items()
        if name.startswith("val/") and not name.endswith(("_low", "_high"))
    }


def _add_first_validation(validations: dict[str, list[Estimate]], summary: Mapping[str, Any] | None) -> None:
    """Put the validation before training, which only the summary has, in front."""
    before = (summary or {}).get("before", {})
    for name, value in _headlines(before).items():
        low, high = before.get(f"val/{name}_low"), before.get(f"val/{name}_high")
        validations.setdefault(name, []).insert(0, Estimate(0, value, low, high))


def _cleaned(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary whose parts are of the types that a run writes; others are left out."""
    seed, iterations = summary.get("seed"), summary.get("iterations")
    counts = summary.get("counts")
    after = counts.get("after") if isinstance(counts, dict) else None
    by_source = {
        source: {problem: pair for problem, pair in of_source.items() if _is_count(pair)}
        for source, of_source in (after.items() if isinstance(after, dict) else ())
        if isinstance(of_source, dict)
    }
    return {
        "status": str(summary.get("status", "")),
        "iterations": iterations if isinstance(iterations, int) else 0,
        "seed": seed if isinstance(seed, int) else None,
        "counts": {"after": by_source},
        **{name: _numbers_of(summary.get(name)) for name in ("before", "after", "seconds", "final")},
    }


def _numbers_of(values: Any) -> dict[str, float]:
    return {name: v for name, v in values.items() if _is_number(v)} if isinstance(values, dict) else {}


def _is_count(pair: Any) -> bool:
    """True for successes and samples of a problem."""
    return (
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, int) for n in pair) and 0 <= pair[0] <= pair[1]
    )


def _read_warnings(path: Path) -> list[Warned]:
    rows = (row for row in read_rows(path) if isinstance(row.get("iteration"), int))
    return [
        Warned(row["iteration"], *(str(row.get(name, "")) for name in ("tripwire", "level", "message")))
        for row in rows
        if row.get("message")
    ]


def _read_options(folder: Path) -> dict[str, str]:
    try:
        loaded = yaml.safe_load(newest_config(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(_flat("", loaded)) if isinstance(loaded, dict) else {}


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Options by dotted name; members of a list have their class's name, or else their number, in theirs."""
    if isinstance(value, dict) and value:
        return [pair for key, item in value.items() for pair in _flat(f"{prefix}.{key}" if prefix else str(key), item)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        names = [
            str(item.get("class_path", number)).rsplit(".", 1)[-1] if isinstance(item, dict) else str(number)
            for number, item in enumerate(value)
        ]
        return [pair for name, item in zip(names, value, strict=True) for pair in _flat(f"{prefix}.{name}", item)]
    if prefix.endswith("class_path"):  # a class may be named by several paths
        value = str(value).rsplit(".", 1)[-1]
    return [(prefix, "null" if value is None else str(value))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _iteration(row: Mapping[str, Any]) -> int:
    return int(row["iteration"])


def _is_group_row(row: Mapping[str, Any]) -> bool:
    columns = [row.get(name) for name in ("prompt_ids", "sizes", "successes", "expected", "tokens")]
    if not isinstance(row.get("iteration"), int) or not all(isinstance(column, list) for column in columns):
        return False
    lengths = {len(column) for column in columns if column is not None}
    return len(lengths) == 1 and all(_is_number(value) for column in columns if column is not None for value in column)
