"""Saves what `predict` sampled."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer


class PredictionWriter(Callback):
    """Writes the rollouts of `predict` to `predictions.jsonl` in the trainer's log folder, batch by batch.

    `predict_step` returns a list of dicts, one per rollout (question, response, answer, reward, …); each is a line.
    With several processes each one writes the rollouts it sampled: rank 0 to that file, rank 3 to
    `predictions.rank3.jsonl`. Where there is such a file already, a number is added: `predictions-1.jsonl`.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the log folder; on every rank, because `trainer.log_dir` is a broadcast and would wait for them."""
        name = "predictions.jsonl" if trainer.is_global_zero else f"predictions.rank{trainer.global_rank}.jsonl"
        self._path = Path(trainer.log_dir or trainer.default_root_dir) / name

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the file."""
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        path, number = self._path, 0
        while path.exists():
            number += 1
            path = self._path.with_stem(f"{self._path.stem}-{number}")
        self._path = path
        self._file = path.open("x", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[dict[str, Any]] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Appends the batch and flushes, so that a killed run leaves all finished batches."""
        assert self._file is not None
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in outputs or ())
        self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says where the rollouts are, after the progress bar's last word."""
        self._close()
        if trainer.is_global_zero:
            print(f"wrote    {str(self._path).removeprefix(os.getcwd() + os.sep)}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the file."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the file."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
