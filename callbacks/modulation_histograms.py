"""Histograms of the modulation factors: how many tokens each factor touches, and how strongly."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dynamo_lightning.errors import UserError


class ModulationHistograms(Callback):
    """Sends the factors of rank 0's response tokens to every logger that draws histograms (TensorBoard does).

    Args:
        every_n_iterations: RL iterations from one histogram to the next.
    """

    def __init__(self, every_n_iterations: int = 10) -> None:
        if every_n_iterations < 1:
            raise UserError(f"every_n_iterations must be at least 1, got {every_n_iterations}")
        self.every_n_iterations = every_n_iterations

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log `mod/{factor}` of every n-th iteration."""
        record = outputs["record"]
        if record.batch.iteration % self.every_n_iterations or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            draw = getattr(getattr(logger, "experiment", None), "add_histogram", None)
            if draw is None:
                continue
            for name, values in record.factors.items():
                draw(f"mod/{name}", values.float().cpu(), global_step=record.batch.iteration)
