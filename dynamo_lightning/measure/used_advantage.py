"""Variance of the gradient with the advantages that were really used, and its noise scale, from rollouts' scores.

A prompt's gradient is the mean of its rollouts' contributions `y_j = A_j s_j`, with score s and advantage
`A_j = r_j − b_j`. A baseline from the other rollouts makes contributions dependent, but hardly correlated: `E s_j = 0`
whatever the others did, so of two contributions only the terms in which both baselines hold the other's reward remain,
`E⟨y_1, y_2⟩ = ‖∇J‖² + ‖E φ s‖²/(n − 1)²` (for leave-one-out `E φ s = ∇J`). Their sample variance over n,
`Σ_j ‖y_j − ȳ‖²/(n(n − 1))`, thus estimates the variance of the prompt's gradient, too small by `‖E φ s‖²/(n − 1)²`;
without a bias for a baseline that was known before. No model of rewards or scores is assumed, nor which advantage.

Source of the noise scale: McCandlish et al., “An Empirical Model of Large-Batch Training”, arXiv 1812.06162.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.errors import UserError

NEAR = 4.0
"""A batch counts as near the noise scale within this factor of it."""


def used_contribution(advantages: FloatArray, scores: FloatArray) -> tuple[FloatArray, float]:
    """Gradient of a prompt and the estimate of its variance.

    Args:
        advantages: A of each rollout, `[num_rollouts]`, at least 2.
        scores: s, `[num_rollouts, num_dimensions]`.

    Returns:
        `ȳ`, `[num_dimensions]`, and `Σ_j ‖y_j − ȳ‖²/(n(n − 1))`.

    Raises:
        UserError: If there is one rollout only, whose variance cannot be told.
    """
    size = len(advantages)
    if size < 2:
        raise UserError(f"{size} rollouts are too few, at least 2 are needed")
    contributions = advantages[:, None] * scores
    mean = contributions.mean(0)
    return mean, float(((contributions - mean) ** 2).sum() / (size * (size - 1)))


@dataclass(frozen=True)
class VarianceSplit:
    """Sums over measured prompts; sums of several measurements add up."""

    used: float = 0.0
    """Variance with the advantages that were used."""
    placed: float = 0.0
    """Variance with leave-one-out advantages at the same sizes; of prompts with earlier rollouts."""
    equal: float = 0.0
    """Variance with leave-one-out advantages and equal groups; of prompts with earlier rollouts."""
    unseen_placed: float = 0.0
    """As `placed`, of unseen prompts."""
    unseen_equal: float = 0.0
    """As `equal`, of unseen prompts."""
    noise: float = 0.0
    """Variance of the gradient of a group of one rollout's cost: the mean group size times the variance of the
    prompts' gradients, prompts drawn anew."""
    signal: float = 0.0
    """‖∇J‖² of the mean over prompts; unbiased, hence sometimes negative."""

    @classmethod
    def pooled(cls, splits: Iterable[VarianceSplit]) -> VarianceSplit:
        """Sums over several measurements."""
        return cls(*np.sum([astuple(split) for split in splits], axis=0).tolist())

    def ratios(self) -> dict[str, float]:
        """Ratios by metric name, those that are defined."""
        pairs = {
            "alloc/total_variance_ratio": (self.used, self.equal + self.unseen_equal),
            "alloc/baseline_variance_ratio": (self.used, self.placed + self.unseen_placed),
            "alloc/placing_variance_ratio": (self.placed, self.equal),
            "alloc/cold_start_variance_ratio": (self.unseen_placed, self.unseen_equal),
        }
        return {name: above / below for name, (above, below) in pairs.items() if below > 0 and above >= 0}

    def noise_scale(self) -> float | None:
        """`tr Σ/‖∇J‖²` in rollouts; `None` while ‖∇J‖² cannot be told from 0."""
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else None


def variance_split(groups: Sequence[tuple[FloatArray, float, float, float, bool]], mean_size: float) -> VarianceSplit:
    """Sums over the prompts of one measurement.

    Both parts of the noise scale are unbiased, for groups of different prompts are independent whatever happens within
    them: with gradients g_i of N prompts, `‖∇J‖² = (‖Σ g_i‖² − Σ ‖g_i‖²)/(N(N − 1))`, and the variance of one g_i,
    prompts drawn anew, is `Σ ‖g_i − ḡ‖²/(N − 1)`; a rollout costs the n̄-th part of a group.

    Args:
        groups: Of each prompt: gradient and variance as used, variance of leave-one-out at its own size and at the
            mean size, and true if the prompt had no earlier rollout.
        mean_size: n̄, rollouts of a group on average.
    """
    sums: FloatArray = np.zeros(5)
    for _, used, placed, equal, is_unseen in groups:
        sums += (used, *((0.0, 0.0, placed, equal) if is_unseen else (placed, equal, 0.0, 0.0)))
    number = len(groups)
    used, placed, equal, unseen_placed, unseen_equal = sums.tolist()
    if number < 2:
        return VarianceSplit(used, placed, equal, unseen_placed, unseen_equal)
    gradients = np.stack([gradient for gradient, *_ in groups])
    total, squares = gradients.sum(0), (gradients**2).sum()
    signal = ((total**2).sum() - squares) / (number * (number - 1))
    noise = mean_size * ((gradients - total / number) ** 2).sum() / (number - 1)
    return VarianceSplit(used, placed, equal, unseen_placed, unseen_equal, float(noise), float(signal))


def noise_hint(num_rollouts: int, scale: float) -> tuple[str, str]:
    """How a batch compares with the noise scale: `above`, `near` or `below`, and a line that says what follows.

    Args:
        num_rollouts: Rollouts of the batch.
        scale: The noise scale, rollouts.
    """
    if num_rollouts > NEAR * scale:
        kind, advice = "above", "far above: fewer prompts per batch, or a larger learning rate, would waste less"
    elif num_rollouts * NEAR < scale:
        kind, advice = (
            "below",
            "far below: a step is mostly noise; a larger batch or a baseline of less variance (OptimalBaseline) pays",
        )
    else:
        kind, advice = "near", "near it: less variance (allocation, OptimalBaseline) saves rollouts here"
    return kind, f"the gradient noise scale is about {scale:.0f} rollouts, the batch has {num_rollouts}, {advice}"
