"""Entropy advantages: what the policy hesitated over counts for more, or as less of a mistake (arXiv 2506.14758)."""

from __future__ import annotations

import torch
from typing_extensions import override

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.modulation import ModulatedAdvantages, Modulation
from dynamo_lightning.losses.modulation_inputs import ModulationInputs


class EntropyAdvantages(Modulation):
    """Adds the entropy to the advantage, bounded so that its sign stays: `A + min(α H, |A| / κ)` (arXiv 2506.14758).

    H is detached: the entropy scales the update, it is not itself made larger.

    Args:
        alpha: α, per nat; the authors take 0.4 with GRPO and 0.1 with PPO.
        kappa: κ > 1; the bonus is at most the advantage's κ-th part.

    Raises:
        UserError: If α is negative or κ not above 1.
    """

    def __init__(self, alpha: float = 0.4, kappa: float = 2.0) -> None:
        if alpha < 0 or kappa <= 1:
            raise UserError(f"entropy advantages need alpha ≥ 0 and kappa > 1, got {alpha} and {kappa}")
        self.alpha = alpha
        self.kappa = kappa

    @override
    def __call__(self, inputs: ModulationInputs) -> ModulatedAdvantages:
        advantages = inputs.advantages
        bonus = torch.minimum(self.alpha * inputs.statistics.entropy, advantages.abs() / self.kappa)
        return ModulatedAdvantages(
            advantages + bonus, factors={"entropy_bonus": bonus}, indicators={"mod/entropy_bonus_mean": bonus}
        )
