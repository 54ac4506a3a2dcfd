"""Counts sudden jumps of the policy's entropy, the first sign of a run that is coming apart.

The threshold is relative to the median absolute deviation (MAD), which a spike cannot inflate as it does a standard
deviation. The count is a measurement for comparing runs: nothing is done about a spike.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dynamo_lightning.errors import UserError
from dynamo_lightning.runs.step_metrics import log_step_metrics


class EntropySpikeMonitor(Callback):
    """Logs `stability/entropy_spikes` and `stability/entropy_change_max`.

    With `H` the mean policy entropy of an iteration (nats) and the window its last `window` values, `H` included,

        spike  ⇔  |H − median| > threshold · MAD,        MAD = median(|H_k − median|).

    Nothing is judged before the window is full. If more than half of the window is one value, the MAD is 0 and would
    call any rounding a spike: 0.1 % of the median stands in for it. Iterations without a finite entropy are skipped.

    Args:
        window: Iterations in the rolling median, at least 3.
        threshold: Distance from the median, in MADs, above which an iteration is a spike; positive.
    """

    def __init__(self, window: int = 21, threshold: float = 5.0) -> None:
        if window < 3:
            raise UserError(f"window must be at least 3 to have a median and a deviation, got {window}")
        if not threshold > 0:
            raise UserError(f"threshold must be positive, got {threshold}")
        self.window = window
        self.threshold = threshold
        self.spikes = 0
        self.largest_change = 0.0
        self._entropies: deque[float] = deque(maxlen=window)

    def observe(self, entropy: float) -> bool:
        """Takes in one iteration.

        Args:
            entropy: Mean policy entropy of the iteration, nats.

        Returns:
            Whether it is a spike.
        """
        if not math.isfinite(entropy):
            return False
        if self._entropies:
            self.largest_change = max(self.largest_change, abs(entropy - self._entropies[-1]))
        self._entropies.append(entropy)
        if len(self._entropies) < self.window:
            return False
        centre = median(self._entropies)
        deviation = median(abs(value - centre) for value in self._entropies) or 1e-3 * abs(centre)
        spike = abs(entropy - centre) > self.threshold * deviation
        self.spikes += spike
        return spike

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes in the iteration and logs the count and the largest one-step change |ΔH| so far (nats)."""
        self.observe(outputs["record"].entropy)
        measures = {"stability/entropy_spikes": self.spikes, "stability/entropy_change_max": self.largest_change}
        log_step_metrics(pl_module, measures)

    def state_dict(self) -> dict[str, Any]:
        """The window and the counts, so that a resumed run counts as an uninterrupted one."""
        return {
            "entropies": list(self._entropies),
            "spikes": self.spikes,
            "largest_change": self.largest_change,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved state; a window that became smaller keeps the newest values."""
        self._entropies = deque(state_dict["entropies"], maxlen=self.window)
        self.spikes = state_dict["spikes"]
        self.largest_change = state_dict["largest_change"]
