"""The surrogate objective: what of a token's advantage the update may use, given how far the policy has moved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.errors import UserError


class Surrogate(ABC):
    """Objective of each token as a function of its importance ratio and advantage."""

    vanishes_without_advantage: ClassVar[bool] = True
    """True if the objective is 0 wherever the advantage is, so that updates may skip such rollouts."""

    couples_tokens: ClassVar[bool] = False
    """True if a token's objective depends on other tokens of its rollout; then it is not evaluated chunk by chunk. A
    class that overrides `importance_ratio` is taken to, unless it says otherwise."""

    def __init_subclass__(cls, **options: Any) -> None:
        """See `couples_tokens`."""
        super().__init_subclass__(**options)
        if "importance_ratio" in vars(cls):
            cls.couples_tokens = vars(cls).get("couples_tokens", True)

    def importance_ratio(self, log_ratio: Tensor, sequence_indices: Tensor | None) -> Tensor:
        """The ratio that the objective is a function of: by default the token's own, `r = π(a) / π_old(a)`.

        Args:
            log_ratio: `log π(a) − log π_old(a)`, `[num_tokens]`, with gradient.
            sequence_indices: Which rollout a token belongs to, `[num_tokens]`, int64, any numbers from 0. A
                micro-batch holds whole rollouts.

        Returns:
            `[num_tokens]`, with gradient.
        """
        return log_ratio.exp()

    @abstractmethod
    def __call__(self, importance_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Objective of each token, to be maximised.

        Args:
            importance_ratio: What the method above returned, `[num_tokens]`, with gradient.
            advantages: Final token advantages, `[num_tokens]`.

        Returns:
            Objective, `[num_tokens]`, and by metric name the indicator (or value) of each token, `[num_tokens]`,
            whose mean over all tokens of the batch is logged; tokens of skipped rollouts count as 0.
        """


def clip_indicators(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """The metrics of tokens clipped below and above, from `[num_tokens]` booleans; named as in TRL."""
    return {
        "clip_ratio/low_mean": low.float(),
        "clip_ratio/high_mean": high.float(),
        "clip_ratio/region_mean": (low | high).float(),
    }


class ClippedSurrogate(Surrogate):
    """PPO's clip with separate bounds, and the dual clip.

    `min(r A, clip(r, 1 − ε_low, 1 + ε_high) A)`, and for `A < 0` at least `c A`, which bounds the update of a token
    whose ratio has exploded (arXiv 1707.06347, 1912.09729; a wider upper bound is DAPO's Clip-Higher, 2503.14476).

    Args:
        clip_low: ε_low; the ratio counts down to 1 − ε_low.
        clip_high: ε_high; the ratio counts up to 1 + ε_high.
        dual_clip: c > 1; largest ratio that counts where the advantage is negative. `null` switches it off.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = 10.0) -> None:
        if not 0 < clip_low <= 1 or clip_high <= 0:
            raise UserError(f"surrogate needs 0 < clip_low ≤ 1 and clip_high > 0, got {clip_low} and {clip_high}")
        if dual_clip is not None and dual_clip <= 1 + clip_high:
            raise UserError(f"surrogate needs dual_clip > 1 + clip_high = {1 + clip_high}, got {dual_clip}")
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip

    @override
    def __call__(self, importance_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        clipped = importance_ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        objective = torch.minimum(importance_ratio * advantages, clipped * advantages)
        if self.dual_clip is not None:
            bounded = torch.maximum(objective, self.dual_clip * advantages)
            objective = torch.where(advantages < 0, bounded, objective)
        low = (importance_ratio < 1.0 - self.clip_low) & (advantages < 0)
        high = (importance_ratio > 1.0 + self.clip_high) & (advantages > 0)
        return objective, clip_indicators(low, high)


class UnclippedSurrogate(Surrogate):
    """Plain importance sampling: `r A`. What holds the policy back has to be elsewhere, as the penalty of KL-Cov is."""

    @override
    def __call__(self, importance_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return importance_ratio * advantages, {}
