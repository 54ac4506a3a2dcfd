"""Progress as plain lines, where the output is a file or a pipe and a progress bar cannot be drawn."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


def format_duration(seconds: float) -> str:
    """Such as `8 s`, `3 min` or `1 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def total_batches(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """Batches (RL iterations) of the whole run by its limits on epochs and optimizer steps; `None` if it has none."""
    bounds: list[int] = []
    per_epoch = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(per_epoch):
        bounds.append(trainer.max_epochs * int(per_epoch))
    if trainer.max_steps >= 0:
        updates = getattr(pl_module, "update_config", None)
        bounds.append(-(-trainer.max_steps // (updates.num_mini_batches * updates.num_epochs if updates else 1)))
    return min(bounds, default=None)


class ProgressLines(Callback):
    """Prints a line every few seconds if standard output is no terminal; on a terminal the progress bar shows it.

    During training: iteration, reward, entropy, seconds for each iteration and the time left without validations
    (`warm_start`: step and loss). In validation, test and prediction: batches and prompts so far. During an iteration
    or batch that takes longer, a line says for how long it has been running.

    Args:
        every_n_seconds: Shortest time between two lines; 0 prints one at the end of every iteration and batch.
    """

    def __init__(self, every_n_seconds: float = 10.0) -> None:
        self.every_n_seconds = every_n_seconds
        self._last = -math.inf
        self._durations: deque[float] = deque(maxlen=10)
        self._batch_started = 0.0
        self._loop_started = 0.0
        self._num_batches = 0
        self._num_prompts = 0
        self._running = ""
        """Name of the iteration or batch that is running, if one is."""
        self._stop: threading.Event | None = None

    # --- lines --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the thread that watches over long iterations."""
        self.stop_watching()
        if self.every_n_seconds > 0 and trainer.is_global_zero and not sys.stdout.isatty():
            self._stop = threading.Event()
            threading.Thread(target=self._watch, args=(trainer, self._stop), daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the thread."""
        self.stop_watching()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the thread: `teardown` is not called after an exception."""
        self.stop_watching()

    def stop_watching(self) -> None:
        """Ends the thread, if there is one."""
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def _watch(self, trainer: Trainer, stop: threading.Event) -> None:
        while not stop.wait(self.every_n_seconds):
            name, started = self._running, self._batch_started
            if name and time.monotonic() - started >= self.every_n_seconds:
                self._print(trainer, f"{name}: running for {format_duration(time.monotonic() - started)}")

    def _print(self, trainer: Trainer, line: str, *, always: bool = False) -> None:
        now = time.monotonic()
        if (
            not trainer.is_global_zero
            or sys.stdout.isatty()
            or not (always or now - self._last >= self.every_n_seconds)
        ):
            return
        self._last = now
        print(line, flush=True)

    # --- training -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says how much there is to do."""
        total = total_batches(trainer, pl_module)
        unit = "iterations" if hasattr(pl_module, "update_config") else "steps"
        self._print(
            trainer, f"training begins, {total} {unit}" if total is not None else "training begins", always=True
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock."""
        self._batch_started = time.monotonic()
        iteration = getattr(batch, "iteration", None)
        self._running = f"step {trainer.global_step + 1}" if iteration is None else f"iteration {iteration + 1}"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints how training goes."""
        self._running = ""
        self._durations.append(time.monotonic() - self._batch_started)
        seconds = sum(self._durations) / len(self._durations)
        record = outputs.get("record") if isinstance(outputs, dict) else None
        if record is not None:
            unit, number = "iteration", record.batch.iteration + 1
            shown = {name: record.metrics[name] for name in ("reward", "entropy") if name in record.metrics}
        else:
            unit, number = "step", trainer.global_step
            shown = {"loss": float(outputs["loss"])} if isinstance(outputs, dict) and "loss" in outputs else {}
        total = total_batches(trainer, pl_module)
        parts = [f"{unit} {number}" + (f"/{total}" if total is not None else "")]
        parts += [f"{name} {value:.3f}" for name, value in shown.items()]
        parts.append(f"{seconds:.3g} s/{unit}")
        if total is not None:
            parts.append(f"{format_duration(seconds * max(total - number, 0))} left")
        self._print(trainer, "  ".join(parts), always=len(self._durations) == 1 or number == total)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        self._loop_started = self._last = self._batch_started = time.monotonic()
        self._running = f"{name}: batch 1"
        self._num_batches = self._num_prompts = 0

    def _evaluated(self, trainer: Trainer, name: str, totals: int | float | Sequence[int | float], batch: Any) -> None:
        self._num_batches += 1
        self._num_prompts += len(getattr(batch, "prompts", ()))
        total = sum(totals) if isinstance(totals, Sequence) else totals
        of_all = f"/{total:.0f}" if math.isfinite(total) else ""
        prompts = f", {self._num_prompts} prompts" if self._num_prompts else ""
        elapsed = time.monotonic() - self._loop_started
        left = ""
        if math.isfinite(total):
            left = f", {format_duration(elapsed / self._num_batches * (total - self._num_batches))} left"
        line = f"{name}: batch {self._num_batches}{of_all}{prompts}, {format_duration(elapsed)}{left}"
        self._print(trainer, line)
        self._batch_started = time.monotonic()
        self._running = f"{name}: batch {self._num_batches + 1}" if self._num_batches < total else ""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._begin("validation")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints how far the validation is."""
        before = trainer.sanity_checking
        totals = trainer.num_sanity_val_batches if before else trainer.num_val_batches
        self._evaluated(trainer, "validation before training" if before else "validation", totals, batch)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._begin("test")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints how far the test is."""
        self._evaluated(trainer, "test", trainer.num_test_batches, batch)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._begin("prediction")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints how far the prediction is."""
        self._evaluated(trainer, "prediction", trainer.num_predict_batches, batch)
