"""The callback that judges every RL iteration by the tripwires."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dynamo_lightning.callbacks.learning_signal import LearningSignalMonitor
from dynamo_lightning.callbacks.tripwires.observation import (
    NAN,
    NUM_FIRST,
    NUM_RECENT,
    History,
    Observation,
    Validation,
)
from dynamo_lightning.callbacks.tripwires.observe import Context, observe
from dynamo_lightning.callbacks.tripwires.stream_watch import Place, StreamWatch
from dynamo_lightning.callbacks.tripwires.table import check_names, chosen
from dynamo_lightning.callbacks.tripwires.tripwire import Measurement, Tripwire
from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.runs.json_lines import JsonLinesLog
from dynamo_lightning.types import IterationRecord


class Tripwires(Callback):
    """Warns of what fails silently, once each, with numbers and the option to change; docs/tripwires.md has the table.

    A tripwire that has gone off is silent until its measure has recovered. Each time is a line of `tripwires.jsonl` in
    the log folder: `iteration` (from 1), `tripwire`, `level`, `message`, `value` and `threshold`.

    Args:
        stop_on: Names of tripwires that end the run.
        leave_out: Names of tripwires that are not judged.
        thresholds: By name another threshold; the value at which it is armed again keeps its ratio to it.

    Raises:
        UserError: If a name is no tripwire's, or one is both left out and to end the run.
        RunError: In training, if a tripwire of `stop_on` goes off; on all ranks.
    """

    def __init__(
        self,
        stop_on: list[str] | None = None,
        leave_out: list[str] | None = None,
        thresholds: dict[str, float] | None = None,
    ) -> None:
        self.stop_on, self.leave_out, self.thresholds = stop_on or [], leave_out or [], thresholds or {}
        for option in ("stop_on", "leave_out", "thresholds"):
            check_names(option, getattr(self, option))
        if both := sorted(set(self.stop_on) & set(self.leave_out)):
            raise UserError(f"Tripwires: {both[0]} is in stop_on and in leave_out: take it out of one of them")
        self.tripwires = chosen(self.leave_out, self.thresholds)
        self.gone_off: set[str] = set()
        """Names of tripwires that have gone off and have not recovered."""
        self.signal = LearningSignalMonitor()
        self.stream = StreamWatch()
        self._log_file: JsonLinesLog | None = None
        self._first: list[Observation] = []
        self._recent: deque[Observation] = deque(maxlen=NUM_RECENT)
        self._validations: list[Validation] = []
        self._rewards: list[float] = []
        """Training rewards since the last validation."""
        self._of_stream = NAN, NAN

    @property
    def history(self) -> History:
        """All that the tripwires may look at."""
        return History(tuple(self._first), tuple(self._recent), tuple(self._validations))

    def judge(self) -> list[tuple[Tripwire, Measurement]]:
        """The tripwires that go off now, and have not gone off without recovery."""
        history = self.history
        found = []
        for tripwire in self.tripwires:
            measured = tripwire.measure(history)
            if measured is None or math.isnan(measured.value):
                continue
            if tripwire.name in self.gone_off:
                if tripwire.has_recovered(measured.value):
                    self.gone_off.discard(tripwire.name)
            elif tripwire.is_beyond(measured.value):
                self.gone_off.add(tripwire.name)
                found.append((tripwire, measured))
        return found

    # --- training -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the log folder; on every rank, because `trainer.log_dir` is a broadcast and would wait for them."""
        path = Path(trainer.log_dir or trainer.default_root_dir) / "tripwires.jsonl"
        self._log_file = None if trainer.fast_dev_run else JsonLinesLog(path)  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compares the batch with those before it."""
        if not hasattr(batch, "prompts"):
            return
        found = self.stream.begin(
            batch.iteration,
            [prompt.prompt_id for prompt in batch.prompts],
            _place(trainer),
            trainer.num_training_batches,
        )
        self._of_stream = found if not trainer.overfit_batches else (NAN, NAN)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judges the iteration."""
        record: IterationRecord = outputs["record"]
        self.stream.end(_place(trainer))
        context = context_of(trainer, pl_module)
        self.signal.observe(record, context.success_threshold, context.equal_rewards_give_zero)
        observation = observe(record, context, *self._of_stream)
        self._of_stream = NAN, NAN
        if len(self._first) < NUM_FIRST:
            self._first.append(observation)
        self._recent.append(observation)
        self._rewards.append(observation.reward)
        self._report(trainer, record.batch.iteration)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the success rates with their intervals."""
        if not trainer.state.fn == "fit":
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        estimates = {
            name: (value, metrics[f"{name}_low"], metrics[f"{name}_high"])
            for name, value in metrics.items()
            if "/pass@" in name and f"{name}_low" in metrics and f"{name}_high" in metrics
        }
        iteration = self._recent[-1].iteration if self._recent else 0
        if not estimates or (self._validations and self._validations[-1].iteration >= iteration):
            return
        self._validations.append(Validation(iteration, fmean(self._rewards) if self._rewards else NAN, estimates))
        self._rewards = []

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so if the whole run learned nothing."""
        self.signal.on_fit_end(trainer, pl_module)

    def _report(self, trainer: Trainer, iteration: int) -> None:
        """Write and say what has gone off.

        Args:
            trainer: The trainer.
            iteration: RL iterations finished before this one.
        """
        rows = [
            {
                "iteration": iteration + 1,
                "tripwire": tripwire.name,
                "level": "error" if tripwire.name in self.stop_on else tripwire.level,
                "message": measured.message,
                "value": measured.value,
                "threshold": tripwire.threshold,
            }
            for tripwire, measured in self.judge()
        ]
        if rows and trainer.is_global_zero and self._log_file is not None:
            self._log_file.append(rows, iteration)
        for row in rows:
            words = f"tripwire {row['tripwire']}, iteration {row['iteration']}: {row['message']}"
            if row["tripwire"] not in self.stop_on:
                rank_zero_warn(words)
        for row in rows:
            if row["tripwire"] in self.stop_on:
                raise RunError(
                    f"tripwire {row['tripwire']} (Tripwires.stop_on) ends the run at iteration {row['iteration']}: "
                    f"{row['message']}; the last checkpoint is intact"
                )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that was seen, as plain values, so that a resumed run judges as an uninterrupted one."""
        return {
            "gone_off": sorted(self.gone_off),
            "first": [asdict(observation) for observation in self._first],
            "recent": [asdict(observation) for observation in self._recent],
            "validations": [asdict(validation) for validation in self._validations],
            "rewards": list(self._rewards),
            "stream": self.stream.state_dict(),
            "signal": self.signal.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self.gone_off = set(state_dict["gone_off"])
        self._first = [Observation(**_known(values)) for values in state_dict["first"]]
        self._recent = deque((Observation(**_known(values)) for values in state_dict["recent"]), maxlen=NUM_RECENT)
        self._validations = [Validation(**values) for values in state_dict["validations"]]
        self._rewards = list(state_dict["rewards"])
        self.stream.load_state_dict(state_dict["stream"])
        self.signal.load_state_dict(state_dict["signal"])


def context_of(trainer: Trainer, pl_module: LightningModule) -> Context:
    """Facts about the run that its numbers are judged by, with defaults for modules that are not ours."""
    loss = getattr(pl_module, "loss", None)
    collector = getattr(pl_module, "collector", None)
    generator = getattr(collector, "generator", None)
    return Context(
        success_threshold=getattr(getattr(trainer, "datamodule", None), "success_threshold", 0.5),
        equal_rewards_give_zero=loss is None or loss.advantage.equal_rewards_give_zero,
        samples_from_policy=generator is None or generator.samples_from_policy,
        trains_on_all=collector is None or collector.dynamic_sampling is None,
        ratio_per_token=loss is None or loss.engine_mismatch.level == "token",
    )


def _place(trainer: Trainer) -> Place | None:
    """The place in the stream of prompts, if it has one."""
    stream = trainer.train_dataloader
    epoch, position = getattr(stream, "epoch", None), getattr(stream, "position", None)
    return (epoch, position) if isinstance(epoch, int) and isinstance(position, int) else None


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that this version has, of a state that another one may have written."""
    return {name: value for name, value in values.items() if name in Observation.__dataclass_fields__}
