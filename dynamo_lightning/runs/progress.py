"""Lightning's counters of a resumed run, kept in step with the RL iterations, and the end of a run.

After a resume at an epoch's end Lightning counts one begun epoch too few for the rest of the run. The next resume then
takes a finished epoch for one that was never begun, and trains on past `max_epochs`; its log repeats a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker


def mend_epochs(checkpoint: Mapping[str, Any]) -> None:
    """Mend the epoch counters of a checkpoint that was saved at the end of an iteration, in place.

    Args:
        checkpoint: A Lightning checkpoint; one without counters is left as it is.
    """
    state = checkpoint.get("loops", {}).get("fit_loop")
    if not state:
        return
    batches = state["epoch_loop.batch_progress"]["current"]
    epochs = state["epoch_progress"]
    saved_at_batch_end = batches["completed"] == batches["processed"] - 1
    if saved_at_batch_end and epochs["current"]["completed"] == epochs["current"]["processed"]:
        for counter in (epochs["current"], epochs["total"]):
            counter["ready"] = counter["started"] = epochs["current"]["processed"] + 1


def keep_counters(trainer: Trainer, iteration: int) -> None:
    """Set what Lightning counts by the iteration that begins: its number in the log, and the epoch that it belongs to.

    Args:
        trainer: Runs the fit.
        iteration: RL iterations finished before.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = iteration
    progress = trainer.fit_loop.epoch_progress
    for counter in (progress.current, progress.total):
        assert isinstance(counter, _ProcessedTracker)
        counter.ready = counter.started = counter.processed + 1


def reason_to_stop(trainer: Trainer) -> str | None:
    """The option that a resumed run has exhausted already; none if it has something left to do.

    Args:
        trainer: Has restored a checkpoint, and not yet begun to train.
    """
    loop = trainer.fit_loop
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps={trainer.max_steps}"
    loop.setup_data()  # Lightning does it a little later otherwise
    if trainer.max_epochs is None or trainer.max_epochs < 0 or not loop.max_batches:
        return None
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    assert isinstance(epochs, _ProcessedTracker)
    ends_with_epoch = epochs.ready > epochs.processed and batches.current.ready >= loop.max_batches
    iterations = finished_iterations(trainer)
    if epochs.processed + ends_with_epoch >= trainer.max_epochs or iterations >= trainer.max_epochs * loop.max_batches:
        return f"trainer.max_epochs={trainer.max_epochs}"
    return None


def finished_iterations(trainer: Trainer) -> int:
    """RL iterations that the run has finished."""
    stream = getattr(trainer, "datamodule", None)
    position = stream.state_dict().get("stream") if stream is not None else None
    return int(position["iteration"]) if position else 0
