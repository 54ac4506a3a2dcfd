"""Logs of JSON objects, one a line, that a resumed run goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dynamo_lightning.files import write_atomically
from dynamo_lightning.runs.csv_log import superseded_path

Row = dict[str, Any]


class JsonLinesLog:
    """A log of iterations.

    The first row written decides what is kept of an existing file: rows of later iterations, which a run wrote between
    its last checkpoint and its end, move to `{name}.superseded-1.jsonl`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = False

    def append(self, rows: Iterable[Mapping[str, Any]], iteration: int) -> None:
        """Write rows; they are on disk when it returns.

        Args:
            rows: Plain values, with `iteration` counted from 1.
            iteration: RL iterations finished before these rows.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._opened:
            self._opened = True
            set_aside(self.path, iteration)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def set_aside(path: Path, iteration: int) -> None:
    """Moves the rows of a resumed run that it replaces to a file beside: those of iterations it had begun and lost.

    Args:
        path: The log.
        iteration: RL iterations finished before the first row that is to be written.
    """
    if not path.is_file():
        return
    kept: list[str] = []
    later: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:  # `str.splitlines` would split at U+2028 in a response
        for line in file:
            try:
                is_later = json.loads(line)["iteration"] > iteration
            except (ValueError, KeyError, TypeError):  # torn by a kill
                is_later = True
            (later if is_later else kept).append(line)
    if later:
        superseded_path(path).write_text("".join(later), encoding="utf-8")
        write_atomically(path, "".join(kept))


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a log; lines that are no JSON object, such as one torn by a kill, are left out.

    Args:
        path: The log, which need not exist.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
