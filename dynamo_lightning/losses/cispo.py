"""CISPO: clip the weight of a token's gradient, never the gradient itself (arXiv 2506.13585)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.surrogate import Surrogate, clip_indicators


class CISPO(Surrogate):
    """REINFORCE with clipped importance weights: gradient `sg[clip(r, r_min, r_max)] · A ∇log π` (arXiv 2506.13585).

    PPO's clip drops a token for good once its ratio is out of bounds, which hits the rare tokens that matter most; here
    every token goes on contributing. Meant for `aggregation: token_mean`. The objective's value is `clip(r) A`.

    Args:
        max_ratio: r_max, the paper's `1 + ε_high`. The paper tunes it and prints no number; 5 is what the scaling study
            arXiv 2510.13786 found robust.
        min_ratio: r_min, the paper's `1 − ε_low`; 0, as in the paper, is no bound.

    Raises:
        UserError: If the bounds do not enclose 1.
    """

    def __init__(self, max_ratio: float = 5.0, min_ratio: float = 0.0) -> None:
        if not 0 <= min_ratio <= 1 <= max_ratio:
            raise UserError(f"CISPO needs 0 ≤ min_ratio ≤ 1 ≤ max_ratio, got {min_ratio} and {max_ratio}")
        self.max_ratio = max_ratio
        self.min_ratio = min_ratio

    @override
    def __call__(self, importance_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        values = importance_ratio.detach()
        weight = values.clamp(self.min_ratio, self.max_ratio)
        # r / sg[r] is 1 with the gradient of log π. The floor keeps a ratio that underflowed from giving 0 / 0.
        logprob_gradient = importance_ratio / values.clamp(min=torch.finfo(values.dtype).tiny)
        counts = advantages != 0
        indicators = clip_indicators((values < self.min_ratio) & counts, (values > self.max_ratio) & counts)
        return weight * advantages * logprob_gradient, indicators
