"""Rollouts of runs and of their evaluations, column by column, for the page's browser."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamo_lightning.runs.folder import EVALUATIONS
from dynamo_lightning.runs.history import RunHistory
from dynamo_lightning.runs.json_lines import Row, read_rows

MAX_BYTES = 64 * 2**20
"""Size of the logs above which a part of the groups is shown."""
_FAILURES = ("timeout", "crash")


@dataclass
class RolloutColumns:
    """Rollouts as columns, a value for each; texts that a group shares are in its row."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    """Each with `run` (position), `stage`, `iteration` (none in evaluations), `source`, `prompt_id`, `prompt`,
    `answer`."""
    group: list[int] = field(default_factory=list)
    """Position of each rollout's group."""
    sample: list[int] = field(default_factory=list)
    reward: list[float | None] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    """Empty, or `truncated`, `timeout` or `crash`."""
    response: list[str] = field(default_factory=list)
    components: list[dict[str, float]] = field(default_factory=list)
    tokens: list[dict[str, Any] | None] = field(default_factory=list)
    """`texts` of the first tokens, and `values` by name."""
    num_rollouts: int = 0
    """Rollouts that the logs have, with those left out."""

    @property
    def kept(self) -> dict[int, dict[int, set[str]]]:
        """By run's position and iteration, the prompt ids with responses."""
        found: dict[int, dict[int, set[str]]] = {}
        for group in self.groups:
            if group["iteration"] is not None:
                found.setdefault(group["run"], {}).setdefault(group["iteration"], set()).add(group["prompt_id"])
        return found


def log_files(folder: Path) -> list[tuple[str, Path]]:
    """Logs of rollouts of a run, each with its stage: `training`, or the name of an evaluation's folder."""
    evaluations = folder / EVALUATIONS
    patterns = ("predictions*.jsonl", "*.responses*.jsonl", "rollouts.jsonl")
    found = [("training", folder / "rollouts.jsonl")]
    found += [("training", path) for path in sorted(folder.glob("predictions*.jsonl"))]
    for pattern in patterns:
        for path in sorted(evaluations.rglob(pattern)) if evaluations.is_dir() else ():
            found.append((f"evaluation {path.relative_to(evaluations).parts[0]}", path))
    return [(stage, path) for stage, path in found if path.is_file()]


def read_rollouts(runs: Sequence[RunHistory], max_rollouts: int) -> RolloutColumns:
    """Rollouts that the logs of some runs have; where they are too many, whole groups drawn at random.

    Args:
        runs: The runs.
        max_rollouts: Rollouts shown, about; the logs' bytes are bounded too.
    """
    files = [
        (position, stage, path) for position, run in enumerate(runs) for stage, path in log_files(Path(run.folder))
    ]
    num_rows = sum(_count_lines(path) for _, _, path in files)
    num_bytes = sum(path.stat().st_size for _, _, path in files)
    share = min(1.0, max_rollouts / max(num_rows, 1), MAX_BYTES / max(num_bytes, 1))
    columns, positions = RolloutColumns(num_rollouts=num_rows), dict[tuple[Any, ...], int]()
    for run, stage, path in files:
        for row in _rollouts(path):
            key = (run, stage, row.get("iteration"), str(row.get("prompt_id", row.get("prompt", row.get("question")))))
            if share < 1 and _uniform(key) >= share:
                continue
            if key not in positions:
                positions[key] = len(columns.groups)
                columns.groups.append(_group(run, stage, row, key[3]))
            _append(columns, positions[key], row)
    return columns


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _rollouts(path: Path) -> Iterator[Row]:
    return (row for row in read_rows(path) if isinstance(row.get("response"), str))


def _uniform(key: tuple[Any, ...]) -> float:
    """A number in [0, 1), the same for the same group."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") / 2**64


def _group(run: int, stage: str, row: Row, prompt_id: str) -> dict[str, Any]:
    iteration = row.get("iteration")
    return {
        "run": run,
        "stage": stage,
        "iteration": iteration if isinstance(iteration, int) else None,
        "source": str(row.get("source") or ""),
        "prompt_id": prompt_id,
        "prompt": str(row.get("prompt") or row.get("question") or ""),
        "answer": str(row.get("answer") or ""),
    }


def _append(columns: RolloutColumns, group: int, row: Row) -> None:
    columns.group.append(group)
    columns.sample.append(int(_number(row.get("sample_index")) or 0))
    columns.reward.append(_number(row.get("reward")))
    columns.length.append(int(_number(row.get("response_length")) or 0))
    failure = row.get("failure")
    columns.state.append(failure if failure in _FAILURES else "truncated" if row.get("truncated") else "")
    columns.response.append(row["response"])
    components = row.get("components")
    parts = components.items() if isinstance(components, dict) else ()
    columns.components.append({str(name): value for name, value in parts if _number(value) is not None})
    columns.tokens.append(_tokens(row))


def _tokens(row: Row) -> dict[str, Any] | None:
    """Texts and values of a row's tokens; `None` unless there is a value for each."""
    texts, values = row.get("tokens"), row.get("token_values")
    if not isinstance(texts, list) or not isinstance(values, dict):
        return None
    fitting = {
        str(name): [_number(value) for value in numbers]
        for name, numbers in values.items()
        if isinstance(numbers, list) and len(numbers) == len(texts)
    }
    return {"texts": [str(text) for text in texts], "values": fitting} if fitting else None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return value if is_number else None
