"""Fork tokens: train only on tokens at which the policy hesitates (arXiv 2506.01939)."""

from __future__ import annotations

from typing_extensions import override

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.modulation import ModulatedAdvantages, Modulation, nearest_rank_quantile
from dynamo_lightning.losses.modulation_inputs import ModulationInputs


class ForkTokens(Modulation):
    """Only the tokens with the highest entropies keep their advantage: `A · 1[H ≥ τ_ρ]` (arXiv 2506.01939).

    `τ_ρ` is the largest threshold that a share ρ of the batch's response tokens reaches, on all ranks; tokens of equal
    entropy at the threshold all count. Only these tokens count in the denominators, as the authors have it: under
    `token_mean` the loss is divided by their number, with `length_normalisation: response_length` the sum of a rollout
    by the number of its own. The constant `max_response_length` does not depend on tokens and stays.

    Args:
        fork_share: ρ; the share of tokens that keep their advantage.

    Raises:
        UserError: If ρ is not in (0, 1].
    """

    def __init__(self, fork_share: float = 0.2) -> None:
        if not 0 < fork_share <= 1:
            raise UserError(f"fork tokens need fork_share in (0, 1], got {fork_share}")
        self.fork_share = fork_share

    @override
    def __call__(self, inputs: ModulationInputs) -> ModulatedAdvantages:
        entropy = inputs.statistics.entropy
        threshold = -nearest_rank_quantile(-inputs.gather(entropy), self.fork_share)
        is_fork = entropy >= threshold
        indicators = {"mod/frac_fork_tokens": is_fork.float()}
        return ModulatedAdvantages(inputs.advantages * is_fork, indicators=indicators, kept=is_fork)
