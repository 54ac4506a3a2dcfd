"""Saves checkpoints every so many RL iterations, such that a kill at any moment leaves one to resume from.

Five things differ from Lightning's `ModelCheckpoint` under manual optimization:

- it counts optimizer steps, of which an iteration has several, or none when no rollout has an advantage; these must
  be saved too, since it advanced the prompt stream and the prompt statistics;
- it has no rule to keep the newest k files; here the iteration number is itself the default metric to rank by;
- saved before a validation, a resumed run skips that validation; here such a checkpoint is saved after it instead;
- it writes through a temporary file that may lie on another disk, so that the last move is a copy which a kill cuts
  short; a sharded checkpoint is written in place. Here both are written beside their final name and renamed;
- signals to terminate wait for the end of the iteration, which is then saved: see `deferred_signals.py`.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from dynamo_lightning.callbacks.deferred_signals import DeferredSignals
from dynamo_lightning.distributed import stop_together
from dynamo_lightning.errors import UserError
from dynamo_lightning.files import delete, partial_path, publish
from dynamo_lightning.runs.csv_log import AppendingCSVLogger


class IterationCheckpoint(ModelCheckpoint):
    """Keeps the newest (or best) checkpoints, and `last.ckpt` to resume from.

    Also saves after the last iteration of training, and when a process is told to terminate (SIGTERM, as schedulers do
    before they take a machine away) or to stop (Ctrl-C): the running iteration is finished and saved, and the run ends;
    a second Ctrl-C ends it at once. A file that bears
    the same name is overwritten: resuming from an older checkpoint replaces the newer ones as the run passes them.

    Args:
        every_n_iterations: RL iterations from one checkpoint to the next; None leaves it to `train_time_interval`.
        train_time_interval: Save when this much time has passed since the last checkpoint, counted too when
            `every_n_iterations` is set.
        save_top_k: How many checkpoints to keep, beside `last.ckpt`; -1 keeps all, 0 only `last.ckpt`.
        monitor: Metric that ranks the checkpoints. The default, the iteration number, keeps the newest. For a `val/…`
            metric let `every_n_iterations` be a multiple of the validation interval: its latest value counts.
        mode: Whether a `max` or a `min` of the metric is best.
        save_last: `link` makes `last.ckpt` a link to the newest checkpoint, true a copy (twice the space and time),
            false leaves it out.
        dirpath: Folder for the checkpoints; by default `checkpoints` in the log folder.
        filename: Name of a checkpoint, in which metrics may stand in braces.
        save_weights_only: Leaves out optimizer, statistics and position: smaller, but not to be resumed from.
        verbose: Prints each checkpoint as it is saved.
    """

    def __init__(
        self,
        every_n_iterations: int | None = 20,
        train_time_interval: timedelta | None = None,
        save_top_k: int = 2,
        monitor: str = "iteration",
        mode: Literal["min", "max"] = "max",
        save_last: bool | Literal["link"] = "link",
        dirpath: str | None = None,
        filename: str = "{iteration:06d}",
        save_weights_only: bool = False,
        verbose: bool = False,
    ) -> None:
        if every_n_iterations is not None and every_n_iterations < 1:
            raise UserError(f"every_n_iterations must be at least 1 or null, got {every_n_iterations}")
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            verbose=verbose,
            save_last=save_last,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            mode=mode,
            every_n_train_steps=0,  # the parent's own trigger is never used
            train_time_interval=train_time_interval,
            enable_version_counter=False,  # a `last-v1.ckpt` beside `last.ckpt` invites resuming from the wrong one
        )
        self.every_n_iterations = every_n_iterations
        self.save_seconds = 0.0
        """Wall-clock seconds this process has spent on saving."""
        self._iterations = 0
        self._last_iteration_saved = 0
        self._obsolete: list[str] = []
        self._signals = DeferredSignals()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """By default checkpoints lie in the log folder, whatever the loggers are."""
        folder = getattr(trainer, "folder", None)
        if self.dirpath is None and folder is not None and stage == "fit":
            assert trainer.log_dir is not None
            self.dirpath = os.path.join(os.path.abspath(trainer.log_dir), "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on signals wait for the end of an iteration."""
        super().on_train_start(trainer, pl_module)
        self._signals.install(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Signals are Lightning's again."""
        self._signals.restore()
        super().teardown(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if it is time; leaves it to `on_validation_end` if a validation follows."""
        self._iterations = outputs["record"].batch.iteration + 1
        self._heed_signals(trainer)
        if not self._is_due(trainer):
            return
        epoch_loop = trainer.fit_loop.epoch_loop
        data_fetcher = trainer.fit_loop._data_fetcher
        assert data_fetcher is not None
        if epoch_loop._should_check_val_fx(data_fetcher):
            self._defer_save_until_validation = True
        else:
            self._write_row(trainer)
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was due at the end of the iteration, or if the validation made a callback stop the training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            if self._defer_save_until_validation or trainer.should_stop:
                self._save(trainer)
            self._defer_save_until_validation = False
            self._heed_signals(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Epochs have no meaning here."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if a callback stopped the training after the last chance above."""
        self._save(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the list of kept files; in another folder with an empty one, leaving the earlier run's alone."""
        if state_dict["dirpath"] == self.dirpath:
            super().load_state_dict(state_dict)

    def _heed_signals(self, trainer: Trainer) -> None:
        device = trainer.strategy.root_device
        self._signals.requeue_if_asked(device)
        number = self._signals.must_stop(device)
        if number:
            self._save(trainer)
            self._log_metrics(trainer)
            cause = "Ctrl-C" if number == signal.SIGINT else "told to terminate"
            rank_zero_info(
                f"{cause}: stopped after iteration {self._iterations}, resume with --ckpt_path "
                f"{self.last_model_path or self.best_model_path}, which goes on with iteration {self._iterations + 1}"
            )
            raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException

    @staticmethod
    def _write_row(trainer: Trainer) -> None:
        """Write the row of `metrics.csv` first: a kill right after the checkpoint would leave a gap in it."""
        connector = trainer._logger_connector
        for logger in trainer.loggers if connector.should_update_logs else ():
            if isinstance(logger, AppendingCSVLogger):
                metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
                logger.log_metrics(metrics, trainer.fit_loop.epoch_loop._batches_that_stepped)

    @staticmethod
    def _log_metrics(trainer: Trainer) -> None:
        """Log the iteration's metrics: Lightning does so after the hooks, which a signal leaves for good."""
        if trainer.training:  # a validation comes after
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()

    def _is_due(self, trainer: Trainer) -> bool:
        every, interval = self.every_n_iterations, self._train_time_interval
        due = every is not None and self._iterations % every == 0
        if interval is not None:
            assert self._last_time_checked is not None
            late = time.monotonic() - self._last_time_checked >= interval.total_seconds()
            due |= trainer.strategy.broadcast(late)  # rank 0 decides: clocks differ, and saving needs all ranks
        out_of_steps = 0 <= trainer.max_steps <= trainer.global_step
        max_epochs = trainer.max_epochs
        last_epoch = max_epochs is not None and 0 <= max_epochs <= trainer.current_epoch + 1
        return due or trainer.should_stop or out_of_steps or (trainer.is_last_batch and last_epoch)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or self._iterations == self._last_iteration_saved:  # type: ignore[attr-defined]
            return
        started = time.monotonic()
        metrics = self._monitor_candidates(trainer)
        if self.monitor in metrics:  # a validation metric does not exist before the first validation
            self._save_topk_checkpoint(trainer, metrics)
        self._save_last_checkpoint(trainer, metrics)
        self._last_iteration_saved = self._iterations
        for path in self._obsolete:  # only now does nothing, `last.ckpt` included, point to them
            super()._remove_checkpoint(trainer, path)
        self._obsolete.clear()
        self._last_time_checked = time.monotonic()
        self.save_seconds += self._last_time_checked - started

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        return super()._monitor_candidates(trainer) | {"iteration": torch.tensor(self._iterations)}

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if not self.save_last:
            return
        path = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
        self.last_model_path = path
        newest = self.format_checkpoint_name(monitor_candidates)
        if self.save_last == "link" and self._last_checkpoint_saved == newest:
            self._link_checkpoint(trainer, newest, path)
        else:  # the newest was not among the best, or a copy is wanted
            self._save_checkpoint(trainer, path)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if "://" in filepath:  # a remote store has its own transactions
            super()._save_checkpoint(trainer, filepath)
            return
        partial, final = partial_path(Path(filepath)), Path(filepath)
        if trainer.is_global_zero:
            delete(partial)  # of an earlier run that was killed
        trainer.strategy.barrier("IterationCheckpoint.clear")
        problem = ""
        try:
            # `Trainer.save_checkpoint` without its barrier, at which others would wait for a process that failed.
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
            trainer.strategy.save_checkpoint(checkpoint, partial)
            if trainer.is_global_zero:
                publish(partial, final)
        except (OSError, RuntimeError, CheckpointException) as failure:
            error: BaseException = failure
            if isinstance(failure, CheckpointException):  # its own text has the tracebacks of all processes
                error, _ = next(iter(failure.failures.values()))
            free = shutil.disk_usage(partial.parent).free / 2**30
            problem = (
                f"the checkpoint {final} could not be written ({type(error).__name__}: {error}; {free:.1f} GiB are "
                "free there): training stops, earlier checkpoints are intact"
            )
        stop_together(problem)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))  # loggers may keep it; it must not keep us alive

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            partial = partial_path(Path(linkpath))
            delete(partial)
            partial.symlink_to(os.path.relpath(filepath, os.path.dirname(linkpath)))
            publish(partial, Path(linkpath))
        trainer.strategy.barrier("IterationCheckpoint.link")

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self._obsolete.append(filepath)
