"""Shows and saves what `test` measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dynamo_lightning.evaluation.table import print_results, write_results


class BenchmarkReport(Callback):
    """Prints the table of a `test` and writes `results.json` and `results.csv`.

    They go where the responses are kept (`model.evaluation.folder`), or else into the trainer's log folder.
    """

    def __init__(self) -> None:
        self._log_folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the log folder; on every rank, because `trainer.log_dir` is a broadcast and would wait for them."""
        self._log_folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints and writes the results, after the progress bar's last word."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self._log_folder is not None
        run: Any = pl_module.benchmark_run
        results = run.results()
        print_results(results)
        folder = run.folder or self._log_folder
        for path in write_results(folder, results, {**run.settings, "checkpoint": trainer.ckpt_path}):
            print(f"wrote     {str(path).removeprefix(os.getcwd() + os.sep)}")
        if run.folder is not None:
            print(f"responses {run.folder}")
