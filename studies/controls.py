"""Controls: what an arm would be without the part that is said to help. For studies only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.allocation import BetaPosterior
from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.losses.modulation import DynamoModulation, ModulatedAdvantages
from dynamo_lightning.losses.modulation_inputs import ModulationInputs


class PermutedBetaPosterior(BetaPosterior):
    """`BetaPosterior`, its weights permuted over the prompts of a batch: as many large and small groups, not placed.

    Args:
        half_life: RL iterations after which an outcome counts half.
    """

    def __init__(self, half_life: float = 32.0) -> None:
        super().__init__(half_life)
        self._generator = np.random.default_rng(0)

    @override
    def bernoulli_variance(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        return self._generator.permutation(super().bernoulli_variance(state, elapsed, population))


def factors_of(inputs: ModulationInputs, modulated: ModulatedAdvantages) -> tuple[Tensor, Tensor]:
    """Factor of each token, `[num_tokens]`, and which tokens have an advantage, `[num_tokens]`, bool."""
    counted = inputs.advantages != 0
    return torch.where(counted, modulated.advantages / inputs.advantages, 1.0), counted


class ScalarModulation(DynamoModulation):
    """DynaMO's factors, each replaced by their mean: the same mean step, without a choice among tokens."""

    @override
    def __call__(self, inputs: ModulationInputs) -> ModulatedAdvantages:
        factors, counted = factors_of(inputs, super().__call__(inputs))
        every, all_counted = inputs.gather(factors), inputs.gather(counted.float())
        mean = float((every * all_counted).sum() / all_counted.sum().clamp(min=1.0))
        return ModulatedAdvantages(inputs.advantages * mean)


class ShuffledModulation(DynamoModulation):
    """DynaMO's factors, permuted over the tokens that have an advantage: the same factors on other tokens."""

    @override
    def __call__(self, inputs: ModulationInputs) -> ModulatedAdvantages:
        factors, counted = factors_of(inputs, super().__call__(inputs))
        values = factors[counted]
        order = np.random.default_rng(len(values)).permutation(len(values))
        factors[counted] = values[torch.from_numpy(order).to(values.device)]
        return ModulatedAdvantages(inputs.advantages * factors)
