"""Gradient clipping before each optimizer step, and the end of a run whose gradient is not finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dynamo_lightning.errors import RunError
from dynamo_lightning.policy.sharding import clip_gradient

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_OVERFLOWS_IN_A_ROW = 20
"""The scaler starts at 2¹⁶ and halves at each overflow: then the gradient itself is too large for float16."""


class GradientClipping:
    """Clips the total gradient norm and keeps what it was before.

    Args:
        max_norm: Total norm above which gradients are scaled down; `None` never does.
    """

    def __init__(self, max_norm: float | None = None) -> None:
        self.max_norm = max_norm
        self.norm = 0.0
        """Norm at the last optimizer step, before clipping."""
        self.num_overflows_in_a_row = 0
        """Optimizer steps skipped by the gradient scaler since the last that was taken."""

    def clip(self, policy: PreTrainedModel, optimizer_step: int, scaler: Any = None) -> None:
        """Clip the policy's gradient; called right before the optimizer step, after gradients are unscaled.

        With `16-mixed` a norm that is not finite is an overflow: the gradient scaler skips the step and lowers its
        scale. That is common in the first steps and rare later.

        Args:
            policy: Holds the gradient.
            optimizer_step: Steps taken so far, for messages.
            scaler: The gradient scaler of `16-mixed`; `None` in other precisions.

        Raises:
            RunError: If the norm is not finite: a step would ruin the policy; with a scaler if 21 in a row are not.
        """
        self.norm = float(clip_gradient(policy, self.max_norm))
        if math.isfinite(self.norm):
            self.num_overflows_in_a_row = 0
            return
        self.num_overflows_in_a_row += 1
        if scaler is None:
            raise RunError(
                f"the gradient norm is {self.norm} at optimizer step {optimizer_step}: training stops before the "
                "policy is lost; the last checkpoint is intact"
            )
        if self.num_overflows_in_a_row > MAX_OVERFLOWS_IN_A_ROW:
            raise RunError(
                f"trainer.precision=16-mixed: the gradient overflowed in {self.num_overflows_in_a_row} optimizer steps "
                f"in a row, at last with a scale of {scaler.get_scale():g}: training stops at optimizer step "
                f"{optimizer_step}; use bf16-mixed"
            )
