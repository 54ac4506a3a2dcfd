"""A configuration for the check: one small iteration on one process, nothing written outside a temporary folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def only_results() -> Iterator[None]:
    """Lightning's messages below warnings are left out within the context."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def prepare(config: Any, folder: str) -> dict[str, Any]:
    """Change a configuration that is about to be instantiated.

    Args:
        config: The configuration of the subcommand.
        folder: The temporary folder.

    Returns:
        The planned run's own values that the check reports on.
    """
    trainer = config.trainer
    planned = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps, "devices": trainer.devices}
    trainer.logger = False
    trainer.callbacks = []
    trainer.profiler = None
    trainer.default_root_dir = folder
    trainer.enable_checkpointing = False
    trainer.enable_progress_bar = False
    trainer.enable_model_summary = False
    trainer.num_sanity_val_steps = 0
    trainer.limit_val_batches = 0
    trainer.val_check_interval = None
    trainer.check_val_every_n_epoch = 1
    trainer.max_epochs, trainer.max_steps = 1, -1
    trainer.devices, trainer.num_nodes = 1, 1
    config.model.dynamic_sampling = None
    config.model.max_staleness = 0
    return planned
