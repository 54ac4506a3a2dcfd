"""Clip-Cov and KL-Cov: hold back the few tokens that drive the entropy down (arXiv 2505.22617).

To first order a policy-gradient step changes the entropy by minus the covariance of log π and the change of the
logits, which is proportional to the advantage. A few tokens make up most of that covariance. One departure from the
authors' code: covariances are those of the whole rollout batch on all ranks, at the policy that sampled it, not of each
micro-batch anew. Which tokens are chosen therefore depends neither on micro-batches nor on ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.modulation import ModulatedAdvantages, Modulation
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.penalty import Penalty


def token_covariance(logprobs: Tensor, advantages: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Each token's part of the covariance: `(A − mean A)(log π − mean log π)`, the means over all tokens of the batch.

    Args:
        logprobs: `[num_tokens]`, nats.
        advantages: `[num_tokens]`.
        gather: Gives the values of all ranks for the values of this one.

    Returns:
        `[num_tokens]`, float64: sums then do not depend on the order of the tokens.
    """
    mean_logprob, mean_advantage = gather(logprobs).double().mean(), gather(advantages).double().mean()
    return (advantages - mean_advantage) * (logprobs - mean_logprob)


def choose_tokens(candidates: Tensor, number: int, keys: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Choose tokens at random out of the candidates of all ranks: those with the smallest keys.

    Args:
        candidates: `[num_tokens]`, bool.
        number: How many to choose on all ranks together; all candidates if there are no more.
        keys: Random number of each token, `[num_tokens]`, int64.
        gather: Gives the values of all ranks for the values of this one.

    Returns:
        `[num_tokens]`, bool.
    """
    all_keys = gather(keys[candidates])
    if number <= 0:
        return torch.zeros_like(candidates)
    if len(all_keys) <= number:
        return candidates
    return candidates & (keys <= all_keys.kthvalue(number).values)


class ClipCov(Modulation):
    """Clip-Cov: some tokens of high covariance get no gradient, `A = 0`; the others keep theirs (arXiv 2505.22617).

    The chosen are `share · num_tokens` (at least one) tokens of the batch, at random among those with a covariance
    between the two bounds. As the authors choose only among tokens that PPO does not clip, chosen tokens that the
    surrogate clips by a later optimizer step of the batch are replaced in it by the next ones that it does not clip, in
    the same random order. That takes one more forward pass per such step, over the rollouts that have a candidate.

    Args:
        clipped_share: Share of all tokens of the batch that is chosen.
        covariance_low: Least covariance of a token that may be chosen.
        covariance_high: Largest one; beyond it the few outliers are left alone.

    Raises:
        UserError: If the share is not in (0, 1] or the bounds are in the wrong order.
    """

    def __init__(self, clipped_share: float = 2e-4, covariance_low: float = 1.0, covariance_high: float = 5.0) -> None:
        if not 0 < clipped_share <= 1 or covariance_low >= covariance_high:
            raise UserError(
                f"Clip-Cov needs clipped_share in (0, 1] and covariance_low < covariance_high, got {clipped_share}, "
                f"{covariance_low} and {covariance_high}"
            )
        self.clipped_share = clipped_share
        self.covariance_low = covariance_low
        self.covariance_high = covariance_high

    @override
    def __call__(self, inputs: ModulationInputs) -> ModulatedAdvantages:
        covariance = token_covariance(inputs.statistics.logprobs, inputs.advantages, inputs.gather)
        in_band = (covariance > self.covariance_low) & (covariance < self.covariance_high)
        number = max(1, int(self.clipped_share * len(inputs.gather(covariance))))
        clipped = choose_tokens(in_band, number, inputs.keys(), inputs.gather)
        return ModulatedAdvantages(
            inputs.advantages.masked_fill(clipped, 0.0),
            indicators={"mod/frac_clip_cov": clipped.float(), "mod/frac_in_band": in_band.float()},
            candidates=in_band,
        )

    @override
    def at_later_step(
        self, inputs: ModulationInputs, modulated: ModulatedAdvantages, *, is_clipped: Tensor, in_step: Tensor
    ) -> Tensor:
        # As many tokens of the step as were chosen in it, among the candidates that the surrogate does not clip.
        assert modulated.candidates is not None
        chosen = modulated.indicators["mod/frac_clip_cov"].bool() & in_step
        number = int(inputs.gather(chosen.long()).sum())
        candidates = modulated.candidates & in_step & ~is_clipped
        return inputs.advantages.masked_fill(choose_tokens(candidates, number, inputs.keys(), inputs.gather), 0.0)


class KLCov(Penalty):
    """KL-Cov: the tokens of highest covariance are penalized for moving, `c · |log r|` (arXiv 2505.22617).

    They are the `share · num_tokens` (at least one) tokens of the batch with the largest covariance. The penalty stays
    where the advantage is 0, so no rollout is skipped. One departure from the authors' code: the kink at `log r = 0` is
    smoothed, `c · (√(x² + ε²) − ε)` with `x = log r`. Before the first update x is the rounding noise of two forward
    passes (about 1e-6), whose sign would otherwise decide the direction of a full-size gradient; beyond a few ε the two
    are the same. The penalty works from the second update of a rollout batch on (`model.updates.num_mini_batches` or
    `num_epochs` above 1).

    Args:
        penalised_share: Share of all tokens of the batch.
        coefficient: c.
        smoothing: ε, nats; well above the rounding noise of log-probabilities.

    Raises:
        UserError: If the share is not in (0, 1], c is negative or ε is not positive.
    """

    def __init__(self, penalised_share: float = 2e-3, coefficient: float = 1.0, smoothing: float = 1e-3) -> None:
        if not 0 < penalised_share <= 1 or coefficient < 0 or smoothing <= 0:
            raise UserError(
                "KL-Cov needs penalised_share in (0, 1], coefficient ≥ 0 and smoothing > 0, got "
                f"{penalised_share}, {coefficient} and {smoothing}"
            )
        self.penalised_share = penalised_share
        self.coefficient = coefficient
        self.smoothing = smoothing

    @override
    def token_selection(self, inputs: ModulationInputs) -> Tensor:
        """1 for the tokens that are penalized, 0 for the others."""
        covariance = token_covariance(inputs.statistics.logprobs, inputs.advantages, inputs.gather)
        everything = inputs.gather(covariance)
        number = max(1, int(self.penalised_share * len(everything)))
        smallest = everything.kthvalue(len(everything) - number + 1).values
        above = covariance > smallest
        # Equal covariances are common, all are 0 when no advantage differs: chance decides, not the order of tokens.
        open_places = number - int((everything > smallest).sum())
        chosen = above | choose_tokens(covariance == smallest, open_places, inputs.keys(), inputs.gather)
        return chosen.float()

    @override
    def __call__(self, log_ratio: Tensor, token_selection: Tensor | None) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert token_selection is not None
        # √(x² + ε²) − ε without its cancellation.
        root = (log_ratio.square() + self.smoothing**2).sqrt()
        penalty = self.coefficient * log_ratio.square() / (root + self.smoothing) * token_selection
        return penalty, {"kl_cov": penalty}
