"""Token-level advantage modulation: compensate attenuated gradients, damp excessive entropy changes (arXiv 2602.19208).

`A_final = A · β_comp · β_stab`, all factors detached. Departures from the paper's code:

- the expectation in the entropy change is over the vocabulary, not over the positions of the sequence;
- the normalisers come from the whole rollout batch on all ranks, so results do not depend on micro-batches or ranks;
- they are quantiles by default: under the maximum, one outlier token sets the scale and hardly any token is damped;
- β is computed once per rollout batch, at the policy that sampled it, and kept for all its updates.

The last three are options (`paper_code.yaml` sets them as the paper's code has them); the first is a mistake of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.token_statistics import TokenStatistics
from dynamo_lightning.types import IterationRecord

NormaliserKind = Literal["quantile", "max"]
NormaliserScope = Literal["batch", "micro_batch"]


def entropy_change(statistics: TokenStatistics, advantages: Tensor) -> Tensor:
    """First-order change of the policy's entropy at a token under a step along its own policy gradient.

    `ΔH = −ξ [π(a) Λ(a) − Σ_k π_k² Λ_k]` with `Λ = log π + H` and ξ the token's advantage: the policy that
    sampled the tokens has importance ratio 1 and clips nothing. The change per unit of step size on the token's logits.

    Args:
        statistics: Of the policy that sampled the tokens, `[num_tokens]` each.
        advantages: Raw advantage of each token's rollout, or ξ at a policy that has moved on, `[num_tokens]`.

    Returns:
        `[num_tokens]`.
    """
    taken = statistics.logprobs.exp() * (statistics.logprobs + statistics.entropy)
    return -advantages * (taken - statistics.squared_prob_lambda)


def compensation_factor(
    entropy: Tensor, advantages: Tensor, *, alpha: float, entropy_min: float, entropy_max: float
) -> Tensor:
    """Factor that restores the gradient of confident correct tokens.

    The expected squared gradient of log π is `1 − Σ π² ≤ 1 − e^(−H)`: it vanishes where entropy does. Therefore
    `β_comp = 1 + α (H_max − H) / (H_max − H_min)` where `A > 0`, else 1; 1 everywhere when `H_max = H_min`.

    Args:
        entropy: `[num_tokens]`, nats; clamped to the two bounds.
        advantages: `[num_tokens]`.
        alpha: Strength; the factor lies in [1, 1 + α].
        entropy_min: H_min, nats.
        entropy_max: H_max, nats.

    Returns:
        `[num_tokens]`.
    """
    if entropy_max <= entropy_min:
        return torch.ones_like(entropy)
    confidence = (entropy_max - entropy.clamp(entropy_min, entropy_max)) / (entropy_max - entropy_min)
    return torch.where(advantages > 0, 1.0 + alpha * confidence, 1.0)


def step_lengthening(factor: Tensor, inputs: ModulationInputs) -> float:
    """How much longer factors make a step: `√(Σ ω²A²β²q / Σ ω²A²q)` over the tokens of all ranks; 1 for an empty step.

    With `q = 1 − 2π(a) + Σπ²`, the squared gradient of log π(a) by the logits: gradients of different tokens are taken
    as orthogonal.

    Args:
        factor: β, `[num_tokens]`.
        inputs: With the tokens' weights ω and statistics.
    """
    energy = (inputs.loss_weights() * inputs.advantages).double().square()
    energy = energy * inputs.statistics.squared_logit_gradient().double()
    before = float(inputs.gather(energy).sum())
    after = float(inputs.gather(energy * factor.double().square()).sum())
    return math.sqrt(after / before) if before > 0 else 1.0


def stabilisation_factor(change: Tensor, *, alpha: float, gamma: float, tau: float, change_max: float) -> Tensor:
    """Factor that damps tokens whose update would change the entropy too much.

    `β_stab = (1 − α) + α / (1 + e^{γ (x − τ)})`, `x = |ΔH| / Ξ_max` clamped to [0, 1]; 1 everywhere when `Ξ_max = 0`.

    Args:
        change: ΔH of each token, `[num_tokens]`.
        alpha: Strength; the factor lies in [1 − α, 1].
        gamma: Steepness of the threshold.
        tau: Threshold on x.
        change_max: Ξ_max.

    Returns:
        `[num_tokens]`.
    """
    if change_max <= 0:
        return torch.ones_like(change)
    share = (change.abs() / change_max).clamp(0.0, 1.0)
    return (1.0 - alpha) + alpha * torch.sigmoid(gamma * (tau - share))


def nearest_rank_quantile(values: Tensor, q: float) -> float:
    """The smallest value that at least a share q of the values does not exceed.

    By `kthvalue`: `torch.quantile` refuses more than 2²⁴ values.

    Args:
        values: `[num_values]`, at least one.
        q: In [0, 1].
    """
    rank = math.ceil(round(q * len(values), 6))
    return float(values.kthvalue(min(max(rank, 1), len(values))).values)


@dataclass(frozen=True)
class ModulatedAdvantages:
    """Token advantages after modulation, with what made them for the log."""

    advantages: Tensor
    """Final advantage of each token, `[num_tokens]`."""
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    """By name the factors whose histograms are worth seeing, `[num_tokens]` each."""
    indicators: Mapping[str, Tensor] = field(default_factory=dict)
    """By metric name a value for each token, `[num_tokens]`, whose mean over the batch is logged."""
    kept: Tensor | None = None
    """Tokens that count in the denominators of the loss, `[num_tokens]`, bool; `None`: all of them."""
    candidates: Tensor | None = None
    """Tokens that `at_later_step` may choose from, `[num_tokens]`, bool; `None`: it is not called."""


class Modulation(ABC):
    """How token advantages are changed before the surrogate sees them.

    Called once for each batch of rollouts, before its first update, unless `is_recomputed`.
    """

    vanishes_without_advantage: ClassVar[bool] = True
    """True if a token whose advantage is 0 keeps it, so that updates may skip its rollout."""

    # A method and no property: a default made by jsonargparse's `lazy_instance` is set up when a method is called.
    def is_recomputed(self) -> bool:
        """True if it is called on each micro-batch of an update instead.

        The result then depends on how micro-batches are cut, and no rollout is skipped: all have a say in it.
        """
        return False

    def num_probe_rollouts(self, iteration: int) -> int:
        """Rollouts of the batch whose entropy is measured again after the steps of an iteration; 0 measures nothing.

        The change of their mean token entropy, nats, is then in the record's metrics as `probe/entropy_change`.
        """
        return 0

    def after_iteration(self, record: IterationRecord) -> None:  # noqa: B027 - most modulations do not learn
        """Learn from a finished iteration; called once, on every rank, with the same metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Its memory of earlier iterations, tensors and primitives only; empty if nothing."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            UserError: If there is something to remember, and this modulation cannot.
        """
        if state_dict:
            raise UserError(f"{type(self).__name__} remembers nothing, but the checkpoint has {sorted(state_dict)}")

    @abstractmethod
    def __call__(self, inputs: ModulationInputs) -> ModulatedAdvantages:
        """Modulate the advantages of this rank's tokens, or of a micro-batch's if `is_recomputed`."""

    def at_later_step(
        self, inputs: ModulationInputs, modulated: ModulatedAdvantages, *, is_clipped: Tensor, in_step: Tensor
    ) -> Tensor:
        """Token advantages of an optimizer step after the first of a batch, where they depend on what is clipped.

        Called only if the first call returned `candidates`.

        Args:
            inputs: Those of the first call, at the policy that sampled the tokens.
            modulated: Its result.
            is_clipped: Tokens that get no gradient because the surrogate clips them at the current policy,
                `[num_tokens]`, bool.
            in_step: Tokens of this step, `[num_tokens]`, bool.

        Returns:
            `[num_tokens]`; those of the first call, as here, if the modulation does not look at clipping.
        """
        return modulated.advantages


class DynamoModulation(Modulation):
    """Gradient compensation and update stabilisation of DynaMO; either is switched off by setting its α to 0.

    Args:
        compensation_alpha: Strength of the gradient compensation; confident correct tokens gain up to this share.
        stabilisation_alpha: Strength of the damping; tokens with the largest entropy change lose up to this share.
        gamma: Steepness of the damping threshold.
        tau: Entropy change, as a share of the largest one, at which half of the damping sets in.
        normaliser: How the largest and smallest values of the batch are defined: `quantile` or `max`.
        quantile: q with `normaliser: quantile`: H_max is the q, H_min the 1 − q quantile of the entropies of all
            response tokens, and Ξ_max the q quantile of `|ΔH|` over the tokens with `ΔH ≠ 0` only: rollouts of zero
            advantage, however many there are, do not change how the others are damped. Quantiles are nearest ranks,
            the smallest value that a share q of the values does not exceed; below `1 / (1 − q)` values (100 at the
            default) that is the maximum.
        scope: Over which tokens they are taken: the whole `batch`, at the policy that sampled it, or each
            `micro_batch` of an update anew, at the current policy, as in the paper's code; the gradient then depends on
            micro-batches and ranks, and nothing is skipped.
        equal_step_energy: Divide β_comp by `√(Σ ω²A²β_comp²q / Σ ω²A²q)`, ω the token's weight in the loss and
            `q = 1 − 2π(a) + Σπ²` its squared logit gradient: compensation then shifts the step towards confident
            tokens without making it longer. Not with `scope: micro_batch`.
    """

    def __init__(
        self,
        compensation_alpha: float = 0.4,
        stabilisation_alpha: float = 0.4,
        gamma: float = 50.0,
        tau: float = 0.9,
        normaliser: NormaliserKind = "quantile",
        quantile: float = 0.99,
        scope: NormaliserScope = "batch",
        equal_step_energy: bool = False,
    ) -> None:
        if compensation_alpha < 0 or not 0 <= stabilisation_alpha <= 1:
            raise UserError(
                "modulation needs compensation_alpha ≥ 0 and stabilisation_alpha in [0, 1], got "
                f"{compensation_alpha} and {stabilisation_alpha}"
            )
        if normaliser == "quantile" and not 0.5 < quantile <= 1:
            raise UserError(f"modulation needs quantile in (0.5, 1], got {quantile}")
        self.compensation_alpha = compensation_alpha
        self.stabilisation_alpha = stabilisation_alpha
        self.gamma = gamma
        self.tau = tau
        self.normaliser = normaliser
        self.quantile = quantile
        self.upper_share = quantile if normaliser == "quantile" else 1.0
        self.scope = scope
        if equal_step_energy and scope == "micro_batch":
            raise UserError(
                "model.loss.modulation.equal_step_energy=true does not go with scope=micro_batch, which does not know "
                "the batch's step: set model.loss.modulation.scope to batch"
            )
        self.equal_step_energy = equal_step_energy

    @override
    def is_recomputed(self) -> bool:
        return self.scope == "micro_batch"

    @override
    def __call__(self, inputs: ModulationInputs) -> ModulatedAdvantages:
        # The normalisers are taken over all response tokens that `gather` reaches.
        statistics, advantages = inputs.statistics, inputs.advantages
        change = entropy_change(statistics, inputs.sizes)
        all_entropies, all_changes = inputs.gather(statistics.entropy), inputs.gather(change.abs())
        moved = all_changes[all_changes > 0]
        compensation = compensation_factor(
            statistics.entropy,
            advantages,
            alpha=self.compensation_alpha,
            entropy_min=nearest_rank_quantile(all_entropies, 1.0 - self.upper_share),
            entropy_max=nearest_rank_quantile(all_entropies, self.upper_share),
        )
        if self.equal_step_energy:
            compensation = compensation / step_lengthening(compensation, inputs)
        stabilisation = stabilisation_factor(
            change,
            alpha=self.stabilisation_alpha,
            gamma=self.gamma,
            tau=self.tau,
            change_max=nearest_rank_quantile(moved, self.upper_share) if len(moved) else 0.0,
        )
        damped = stabilisation < 1.0 - 0.5 * self.stabilisation_alpha
        return ModulatedAdvantages(
            advantages * compensation * stabilisation,
            factors={"beta_comp": compensation, "beta_stab": stabilisation},
            indicators={
                "mod/beta_comp_mean": compensation,
                "mod/beta_stab_mean": stabilisation,
                "mod/frac_damped": damped.float(),
            },
        )
