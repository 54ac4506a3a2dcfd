"""Measures how steady the gradient is, from its norm before clipping."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from dynamo_lightning.errors import UserError
from dynamo_lightning.runs.step_metrics import log_step_metrics


class GradientStabilityMonitor(Callback):
    """Logs three measures of the gradient norms `g` of the last `window` optimizer steps.

    - `stability/grad_norm_cv`: coefficient of variation, SD(g) / mean(g), with n − 1 in the SD;
    - `stability/log_grad_norm_sd`: SD of log g_t − log g_(t−1), so it is blind to a slow trend of the scale;
    - `stability/grad_norm_p99_over_p50`: 99 % quantile over median, linearly interpolated: the weight of the tail.

    An iteration without an optimizer step has no norm and is skipped, as are norms that are zero or not finite (their
    logarithm says nothing). Each is logged as soon as it is defined: from two norms on, the second from three.

    Args:
        window: Optimizer steps looked back on, at least 3.
    """

    def __init__(self, window: int = 100) -> None:
        if window < 3:
            raise UserError(f"window must be at least 3 optimizer steps, got {window}")
        self.window = window
        self._norms: deque[float] = deque(maxlen=window)

    def measures(self) -> dict[str, float]:
        """The measures that are defined so far, by metric name."""
        norms = np.array(self._norms)
        if len(norms) < 2:
            return {}
        measures = {
            "stability/grad_norm_cv": norms.std(ddof=1) / norms.mean(),
            "stability/grad_norm_p99_over_p50": np.divide(*np.quantile(norms, [0.99, 0.5])),
        }
        if len(norms) >= 3:
            measures["stability/log_grad_norm_sd"] = np.diff(np.log(norms)).std(ddof=1)
        return {name: float(value) for name, value in measures.items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes in the iteration's norms and logs the measures."""
        norms = outputs["record"].gradient_norms
        self._norms.extend(norm for norm in norms if math.isfinite(norm) and norm > 0)
        log_step_metrics(pl_module, self.measures())

    def state_dict(self) -> dict[str, Any]:
        """The window, so that a resumed run logs what an uninterrupted one does."""
        return {"norms": list(self._norms)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved window; one that became smaller keeps the newest norms."""
        self._norms = deque(state_dict["norms"], maxlen=self.window)
