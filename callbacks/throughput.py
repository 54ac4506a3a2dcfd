"""Measures speed and memory of whole iterations; the seconds of each phase are logged by the policy module."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dynamo_lightning.runs.step_metrics import log_step_metrics


def peak_memory(device: torch.device) -> float:
    """Largest memory use so far, in GB (10⁹ bytes).

    Args:
        device: A CUDA device: most memory ever allocated to tensors on it. Otherwise: most resident memory that this
            process ever had.

    Returns:
        The high-water mark of this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # does not exist on Windows, where only CUDA is supported

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class ThroughputMonitor(Callback):
    """Logs how fast iterations are and how much memory they needed.

    - `perf/iteration_seconds`: wall clock of one iteration, from rollouts to the last optimizer step;
    - `perf/throughput`: prompt and response tokens of the iteration, per second and process;
    - `perf/total_num_tokens`: tokens of all processes since the start of training, over all resumptions;
    - `perf/peak_memory`: GB, see `peak_memory`.
    """

    def __init__(self) -> None:
        self.total_num_tokens = 0
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clock and logs."""
        seconds = time.perf_counter() - self._started
        num_tokens = outputs["record"].num_tokens
        self.total_num_tokens += num_tokens
        metrics = {
            "perf/iteration_seconds": seconds,
            "perf/throughput": num_tokens / seconds / trainer.world_size,
            "perf/total_num_tokens": float(self.total_num_tokens),
            "perf/peak_memory": peak_memory(pl_module.device),
        }
        log_step_metrics(pl_module, metrics)

    def state_dict(self) -> dict[str, Any]:
        """The tokens so far."""
        return {"total_num_tokens": self.total_num_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting tokens from a saved state."""
        self.total_num_tokens = state_dict["total_num_tokens"]
