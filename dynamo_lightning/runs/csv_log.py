"""Metrics as `metrics.csv`, one row per step, that a resumed run goes on with.

Lightning's `CSVLogger` deletes the file when it is opened again, keeps up to 100 rows in memory, and writes training
and validation metrics of one step as two rows.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dynamo_lightning.files import write_atomically

Row = dict[str, Any]


def superseded_path(path: Path) -> Path:
    """First free path beside a log for rows that a resumed run replaces: `metrics.superseded-1.csv` and so on."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.superseded-{number}{path.suffix}")).exists():
        number += 1
    return aside


class MetricsFile(ExperimentWriter):
    """`metrics.csv` of a log folder: a row is on disk when `log_metrics` returns.

    The first row written decides what is kept of an existing file: rows of later steps, which a run wrote between its
    last checkpoint and its end, move to `metrics.superseded-1.csv`; all others stay.

    Args:
        log_dir: The folder.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)
        self._last: Row | None = None
        self._last_offset = 0
        self._opened = False

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Write the metrics into the row of their step."""
        if step is None:
            step = int(self._last["step"]) + 1 if self._last is not None else 0
        row: Row = {name: getattr(value, "item", lambda value=value: value)() for name, value in metrics_dict.items()}
        row["step"] = step
        if not self._opened:
            self._open(step)
        new_names = row.keys() - set(self.metrics_keys)
        last_step = -1 if self._last is None else int(self._last["step"])
        if new_names or step < last_step:
            self._rewrite(row)
            return
        merged = step == last_step
        with self._path.open("r+", encoding="utf-8", newline="") as file:
            file.seek(self._last_offset if merged else 0, os.SEEK_SET if merged else os.SEEK_END)
            offset = file.tell()
            row = {**(self._last or {}), **row} if merged else row
            file.write(self._text([row]))
            file.truncate()
        self._last, self._last_offset = row, offset

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write `hparams.yaml`; that of a run that is resumed stays as it is."""
        if not os.path.exists(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE)):
            super().log_hparams(params)

    def save(self) -> None:
        """Nothing is kept in memory."""

    def _check_log_dir_exists(self) -> None:
        """Leave an existing folder as it is."""

    def _open(self, step: int) -> None:
        """Take over an existing file up to this step."""
        self._opened = True
        rows = self._read()
        if not rows:
            return
        self.metrics_keys = list(rows[0])
        kept = [row for row in rows if int(row["step"]) <= step]
        if len(kept) < len(rows):
            later = [row for row in rows if int(row["step"]) > step]
            superseded_path(self._path).write_text(self._text(later, header=True), encoding="utf-8", newline="")
        self._write(kept)

    def _rewrite(self, row: Row) -> None:
        """Write the whole file with one more row, or one more column."""
        rows = {int(old["step"]): old for old in self._read()}
        rows[row["step"]] = {**rows.get(row["step"], {}), **row}
        self.metrics_keys = sorted({*self.metrics_keys, *row})
        self._write([rows[step] for step in sorted(rows)])

    def _write(self, rows: list[Row]) -> None:
        text = self._text(rows[:-1], header=True)
        write_atomically(self._path, text + self._text(rows[-1:]))
        self._last, self._last_offset = (rows[-1] if rows else None), len(text.encode())

    def _read(self) -> list[Row]:
        """Rows of the file; several of one step, as Lightning writes them, become one, and a torn one is left out."""
        if not self._path.is_file():
            return []
        rows: dict[int, Row] = {}
        with self._path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if re.fullmatch(r"\d+", row.get("step") or "") and None not in row.values() and None not in row:
                    filled = {name: value for name, value in row.items() if value != ""}
                    rows[int(row["step"])] = {**dict.fromkeys(row, ""), **rows.get(int(row["step"]), {}), **filled}
        return [rows[step] for step in sorted(rows)]

    def _text(self, rows: list[Row], header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys, restval="")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


class AppendingCSVLogger(CSVLogger):
    """Lightning's `CSVLogger` that a resumed run goes on with, one row per step, each on disk at once.

    Args:
        save_dir: Folder of all runs.
        name: Name of the run; none leaves it to the command line's `--name`.
        version: Name or number of the folder in it; none takes the next number.
        prefix: Put before every metric's name.
    """

    def __init__(
        self, save_dir: str, name: str | None = "lightning_logs", version: int | str | None = None, prefix: str = ""
    ) -> None:
        super().__init__(save_dir, name=name, version=version, prefix=prefix)

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The file; on other ranks than 0 a stand-in that does nothing."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = MetricsFile(self.log_dir)
        assert isinstance(self._experiment, MetricsFile)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        """Write metrics into the row of their step."""
        prefix = f"{self._prefix}{self.LOGGER_JOIN_CHAR}" if self._prefix else ""
        self.experiment.log_metrics({f"{prefix}{name}": value for name, value in metrics.items()}, step)
