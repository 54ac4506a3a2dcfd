"""Collects a run's numbers as it goes, and shows and saves them at its end."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from dynamo_lightning.runs.commands import commands
from dynamo_lightning.runs.curves import PANELS, draw_curves
from dynamo_lightning.runs.summary import LAST_ITERATIONS, mean_metrics, write_summary
from dynamo_lightning.runs.table import print_summary


class RunReport(Callback):
    """Prints a table at the end of `fit`; writes `summary.json` and `curves.png` into the log folder.

    "Before" is the sanity check, if it covered the whole validation set (`num_sanity_val_steps: -1`); "after" is the
    last validation. In `summary.json`, `final` holds means over the last 10 iterations, weighted by rollouts, and
    `counts` the right responses and responses of each validation problem, before and after, by data set and prompt id:
    `report` compares runs problem by problem. Everything is in the checkpoint: the report of a resumed run covers the
    whole of it. An interrupted run still gets its report. List it after the monitors: it sees what was logged before
    its turn.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] | None = None
        self.after: dict[str, float] | None = None
        self.validated_at = 0
        self.iterations: list[int] = []
        self.history: dict[str, list[float]] = {}
        self.validations: list[tuple[int, dict[str, float]]] = []
        self.counts: dict[str, Any] = {"before": None, "after": None}
        self.recent: list[tuple[int, dict[str, float]]] = []
        self._earlier_seconds: dict[str, float] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._checkpoints: list[Checkpoint] = []
        self._started = 0.0
        self._validation_started = 0.0
        self._folder: Path | None = None
        self._is_new = True
        """Something was measured that is not in the files of an earlier process."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the clock and notes the log folder: on every rank, because `trainer.log_dir` waits for all."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._folder = folder if stage == "fit" and not trainer.fast_dev_run else None  # type: ignore[attr-defined]
        self._checkpoints = trainer.checkpoint_callbacks
        self._started = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the phase `setup`: loading the policy and the data, without the validation that came before."""
        self._seconds["setup"] = time.monotonic() - self._started - self._seconds["validation"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Appends the iteration to the curves."""
        record = outputs["record"]
        self._is_new = True
        for phase, seconds in record.seconds.items():
            self._seconds[phase] += seconds
        monitored = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("alloc/", "stability/", "perf/"))
        }
        current = monitored | {name: float(value) for name, value in record.metrics.items()}
        self.recent = [*self.recent, (len(record.outcomes), current)][-LAST_ITERATIONS:]
        self.iterations.append(record.batch.iteration + 1)
        drawn = {name for _, lines in PANELS for name in lines}
        for name in drawn & current.keys():
            curve = self.history.setdefault(name, [math.nan] * (len(self.iterations) - 1))
            curve.append(current[name])
        for curve in self.history.values():
            curve.extend([math.nan] * (len(self.iterations) - len(curve)))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of the validation."""
        self._validation_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the validation's metrics, those of the sanity check as "before"."""
        self._seconds["validation"] += time.monotonic() - self._validation_started
        self._is_new = True
        metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        iteration = self.iterations[-1] if self.iterations else 0
        if trainer.sanity_checking:
            if trainer.num_sanity_val_batches != trainer.num_val_batches:
                return  # a few batches are no measurement
            self.before = metrics
        else:
            self.after, self.validated_at = metrics, iteration
        self.counts["before" if trainer.sanity_checking else "after"] = getattr(pl_module, "problem_counts", None)
        self.validations.append((iteration, metrics))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes and prints the report, after the progress bar's last word."""
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.teardown(trainer, pl_module, "fit")
        self._report(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes and prints what there is."""
        if self._is_new and (
            self.iterations or self.validations
        ):  # a run that failed to start must not overwrite an earlier report
            self._report(trainer, f"interrupted by {type(exception).__name__}")

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds by phase, over all resumptions; the phases do not overlap."""
        session = dict(self._seconds)
        session["checkpoint"] = sum(getattr(checkpoint, "save_seconds", 0.0) for checkpoint in self._checkpoints)
        session["other"] = max(0.0, time.monotonic() - self._started - sum(session.values()))
        names = {**self._earlier_seconds, **session}
        return {name: self._earlier_seconds.get(name, 0.0) + session.get(name, 0.0) for name in names}

    def _report(self, trainer: Trainer, status: str) -> None:
        if self._folder is None or not trainer.is_global_zero:
            return
        folder = os.path.abspath(self._folder)
        self._folder = None  # once: an exception in here calls `on_exception`
        newest = trainer.checkpoint_callback
        checkpoint = getattr(newest, "last_model_path", "") or getattr(newest, "best_model_path", "")
        config, follow_ups = commands(folder, checkpoint, getattr(trainer, "datamodule", None))
        seed = os.environ.get("PL_GLOBAL_SEED")
        summary = {
            "status": status,
            "iterations": self.iterations[-1] if self.iterations else 0,
            "before": self.before,
            "after": self.after,
            "validated_at": self.validated_at,
            "seconds": self.seconds(),
            "final": mean_metrics(self.recent),
            "final_iterations": len(self.recent),
            "seed": int(seed) if seed else None,
            "config": config,
            "checkpoint": checkpoint or None,
            "commands": follow_ups,
            "counts": self.counts,
        }
        if not self._is_new:  # a finished run was resumed: its files are as they were
            print_summary(summary)
            return
        write_summary(Path(folder, "summary.json"), summary)
        draw_curves(Path(folder, "curves.png"), self.iterations, self.history, self.validations)
        names = ("summary.json", "curves.png", "metrics.csv", "rollouts.jsonl")
        written = [os.path.join(folder, name) for name in names if os.path.exists(os.path.join(folder, name))]
        print_summary(summary, [*written, checkpoint] if checkpoint else written)

    def state_dict(self) -> dict[str, Any]:
        """Everything collected, as primitives: restricted loading of checkpoints takes nothing else."""
        return {
            "before": self.before,
            "after": self.after,
            "validated_at": self.validated_at,
            "iterations": self.iterations,
            "history": self.history,
            "validations": [list(validation) for validation in self.validations],
            "counts": self.counts,
            "recent": [list(row) for row in self.recent],
            "seconds": self.seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with a saved collection."""
        for name in ("before", "after", "validated_at", "iterations", "history"):
            setattr(self, name, state_dict[name])
        self.validations = [(iteration, metrics) for iteration, metrics in state_dict["validations"]]
        self.counts = state_dict.get("counts", self.counts)  # not in checkpoints of version 0.1
        self.recent = [(num_rollouts, metrics) for num_rollouts, metrics in state_dict.get("recent", ())]
        self._earlier_seconds = state_dict["seconds"]
        self._is_new = False
