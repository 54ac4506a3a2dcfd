"""STEER: tokens whose update would change the entropy much weigh less (arXiv 2510.10150)."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import override

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.modulation import ModulatedAdvantages, Modulation
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.token_statistics import TokenStatistics


def steer_entropy_change(statistics: TokenStatistics, advantages: Tensor, exponent: int) -> Tensor:
    """STEER's estimate of a token's entropy change: `Ω = (A / π_old) π (1 − π)^e (log π + H)`, at `π = π_old`.

    It uses the sampled token alone, where `entropy_change` takes the whole vocabulary into account.

    Args:
        statistics: Of the policy that sampled the tokens, `[num_tokens]` each.
        advantages: `[num_tokens]`.
        exponent: e.

    Returns:
        `[num_tokens]`.
    """
    probs = statistics.logprobs.exp()
    return advantages * (1.0 - probs) ** exponent * (statistics.logprobs + statistics.entropy)


class Steer(Modulation):
    """STEER: `A · e^(−k |Ω|)` with `k = −ln(w_min) / max(|Ω|_max, floor)` (arXiv 2510.10150, exponential mapping).

    The token with the largest entropy change of the batch weighs w_min, one without any weighs 1. `|Ω|_max` is that of
    the whole batch on all ranks; the authors' code takes it from each micro-batch.

    Args:
        min_weight: w_min; 0.8 in the authors' scripts.
        exponent: e of Ω: 2 is the paper's formula, 1 what the authors' code computes (in a variable that is called
            `x_one_minus_x_squared`).
        smallest_change: Floor of the scale, so that tiny changes are not damped only for being the largest.

    Raises:
        UserError: If w_min is not in (0, 1], e below 1 or the floor not positive.
    """

    def __init__(self, min_weight: float = 0.8, exponent: int = 2, smallest_change: float = 0.02) -> None:
        if not 0 < min_weight <= 1 or exponent < 1 or smallest_change <= 0:
            raise UserError(
                "STEER needs min_weight in (0, 1], exponent ≥ 1 and smallest_change > 0, got "
                f"{min_weight}, {exponent} and {smallest_change}"
            )
        self.min_weight = min_weight
        self.exponent = exponent
        self.smallest_change = smallest_change

    @override
    def __call__(self, inputs: ModulationInputs) -> ModulatedAdvantages:
        change = steer_entropy_change(inputs.statistics, inputs.advantages, self.exponent).abs()
        decay = -math.log(self.min_weight) / max(float(inputs.gather(change).max()), self.smallest_change)
        weight = (-decay * change).exp()
        return ModulatedAdvantages(
            inputs.advantages * weight, factors={"steer_weight": weight}, indicators={"mod/steer_weight_mean": weight}
        )
