"""The policy loss put together from its replaceable parts.

`L = −Σ w · objective(r, A_final) + Σ w · penalty + c_kl Σ w · k3 − c_H · mean H`, with `w` the global token weights of
`weights.py`. A new loss is a subclass of one of the parts, in a file of its own: docs/new_loss.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jsonargparse import lazy_instance
from torch import Tensor

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.advantages import RLOO, Advantage
from dynamo_lightning.losses.engine_mismatch import EngineMismatch
from dynamo_lightning.losses.modulation import DynamoModulation, Modulation
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.penalty import Penalty
from dynamo_lightning.losses.surrogate import ClippedSurrogate, Surrogate
from dynamo_lightning.losses.token_statistics import TokenStatistics
from dynamo_lightning.losses.weights import Aggregation, LengthNormalisation
from dynamo_lightning.types import IterationRecord


def k3_divergence(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate of `KL(π ‖ π_ref)` at each sampled token: `e^d − d − 1`, `d = log π_ref − log π` (never negative).

    Source: Schulman, “Approximating KL divergence”, 2020, the estimator k3. Shapes `[num_tokens]`, nats.
    """
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1.0


@dataclass(frozen=True)
class LossInputs:
    """Input of the loss besides the current statistics; all `[num_tokens]`, without gradient."""

    old_logprobs: Tensor | None
    """log π_old(a) of the policy that sampled the tokens, nats; `None` where it has not moved since."""
    advantages: Tensor
    """Final token advantages, modulated; raw ones if the modulation is recomputed."""
    weights: Tensor
    """Weight of each token, see `token_weights`."""
    reference_logprobs: Tensor | None
    """log π_ref(a), nats; only with a KL term."""
    sequence_indices: Tensor | None = None
    """Which rollout a token belongs to, int64, any numbers from 0; a micro-batch holds whole rollouts."""
    token_selection: Tensor | None = None
    """The penalty's `token_selection`; only with a penalty that selects tokens."""

    def __getitem__(self, tokens: slice | Tensor) -> LossInputs:
        """Those of some of the tokens."""
        values = (getattr(self, part.name) for part in fields(self))
        return LossInputs(*(None if value is None else value[tokens] for value in values))  # type: ignore[arg-type]


@dataclass(frozen=True)
class PolicyLoss:
    """The modulated policy-gradient loss."""

    advantage: Advantage = lazy_instance(RLOO)
    """How rewards become advantages."""
    modulation: Modulation | None = lazy_instance(DynamoModulation)
    """How token advantages are modulated; `null` leaves them as they are."""
    surrogate: Surrogate = lazy_instance(ClippedSurrogate)
    """How far the update may move the policy."""
    penalty: Penalty | None = None
    """A further term of each token that holds the policy back."""
    aggregation: Aggregation = "prompt_mean"
    """`prompt_mean`: every prompt weighs the same, whatever its group size; `sequence_mean`: every rollout;
    `token_mean`: every token."""
    length_normalisation: LengthNormalisation = "max_response_length"
    """Divisor of a rollout's token sum: the constant limit or its own length; without effect under
    `token_mean`."""
    entropy_coefficient: float = 0.0
    """c_H: adds `−c_H · mean token entropy` to the loss."""
    kl_coefficient: float = 0.0
    """c_kl: adds `c_kl · KL` to a frozen copy of the starting policy (estimator k3)."""
    mask_truncated: bool = False
    """Leave responses that the length limit cut off out of the loss (DAPO's overlong filtering, TRL's
    `mask_truncated_completions`). As in TRL, their rewards still count in the baseline, and they and their tokens in
    the denominators: the other responses weigh what they would weigh without the option."""
    engine_mismatch: EngineMismatch = field(default_factory=EngineMismatch)
    """Weights for tokens that another engine sampled."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.kl_coefficient < 0:
            raise UserError(f"model.loss.kl_coefficient must not be negative, got {self.kl_coefficient}")

    def check_pilot(self, pilot: int) -> None:
        """Refuse a pilot (`data.pilot` rollouts per prompt) whose outcomes would bias the gradient.

        Raises:
            UserError: Names the options.
        """
        if pilot and not self.advantage.is_unbiased:
            raise UserError(
                f"model.loss.advantage={type(self.advantage).__name__} does not go with data.pilot={pilot}: two groups "
                "of different sizes for each prompt bias its gradient; use RLOO or OptimalBaseline, or data.pilot=0"
            )

    def num_probe_rollouts(self, iteration: int) -> int:
        """Rollouts whose entropy is measured again after the iteration's steps, see `Modulation`."""
        return 0 if self.modulation is None else self.modulation.num_probe_rollouts(iteration)

    def after_iteration(self, record: IterationRecord) -> None:
        """Let the modulation learn from a finished iteration; called on every rank."""
        if self.modulation is not None:
            self.modulation.after_iteration(record)

    def state_dict(self) -> dict[str, Any]:
        """Memory of its parts of earlier iterations, by part, with their class names; empty if none has any."""
        parts = {"advantage": self.advantage, "modulation": self.modulation}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {name: {"class": type(parts[name]).__name__, "state": state} for name, state in states.items() if state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; what another class remembered is left out, with a warning."""
        for name, part in (("advantage", self.advantage), ("modulation", self.modulation)):
            saved = state_dict.get(name)
            if saved is None:
                continue
            if part is None or saved["class"] != type(part).__name__:
                warnings.warn(
                    f"model.loss.{name} is not the {saved['class']} of the checkpoint: what that one remembered of "
                    "earlier iterations is left out",
                    stacklevel=2,
                )
            else:
                part.load_state_dict(saved["state"])

    @property
    def batch_modulation(self) -> Modulation | None:
        """The modulation if it is computed once for a batch of rollouts, else `None`."""
        return None if self.modulation is None or self.modulation.is_recomputed() else self.modulation

    @property
    def vanishes_without_advantage(self) -> bool:
        """True if a rollout of advantage 0 adds nothing to the gradient, so that the update may skip it."""
        parts = [part for part in (self.modulation, self.surrogate, self.penalty) if part is not None]
        every_rollout_counts = self.modulation is not None and self.modulation.is_recomputed()
        no_terms = self.entropy_coefficient == 0 and self.kl_coefficient == 0
        return no_terms and not every_rollout_counts and all(part.vanishes_without_advantage for part in parts)

    @property
    def couples_tokens(self) -> bool:
        """True if a token's share of the loss depends on other tokens of its micro-batch."""
        is_recomputed = self.modulation is not None and self.modulation.is_recomputed()
        penalty_couples = self.penalty is not None and self.penalty.couples_tokens
        return self.surrogate.couples_tokens or penalty_couples or is_recomputed

    def __call__(
        self, statistics: TokenStatistics, inputs: LossInputs, num_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """These tokens' share of the loss of an optimizer step.

        Args:
            statistics: Of the current policy, with gradient, `[num_tokens of the micro-batch]` each; of a chunk of the
                micro-batch unless the loss `couples_tokens`.
            inputs: The rest, in the same order.
            num_tokens: Response tokens of the whole optimizer step, all ranks: the denominator of the metrics and of
                the mean entropy.

        Returns:
            The share, a scalar; shares of all micro-batches and ranks add up to the loss. And their share of
            each metric; these add up in the same way.
        """
        old_logprobs = statistics.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
        log_ratio = statistics.logprobs - old_logprobs
        advantages, indicators = inputs.advantages, {}
        if self.modulation is not None and self.modulation.is_recomputed():
            sizes = self.update_sizes(log_ratio.detach(), inputs)
            modulated = self.modulation(ModulationInputs(statistics.detach(), advantages, update_sizes=sizes))
            advantages, indicators = modulated.advantages, dict(modulated.indicators)
        importance_ratio = self.surrogate.importance_ratio(log_ratio, inputs.sequence_indices)
        objective, more_indicators = self.surrogate(importance_ratio, advantages)
        indicators.update(more_indicators)
        loss = -(inputs.weights * objective).sum()
        values = {"policy_loss": loss}
        if self.penalty is not None:
            penalty, more_indicators = self.penalty(log_ratio, inputs.token_selection)
            indicators.update(more_indicators)
            loss = loss + (inputs.weights * penalty).sum()
        values.update({name: value.sum() / num_tokens for name, value in indicators.items()})
        if self.entropy_coefficient != 0:
            loss = loss - self.entropy_coefficient * statistics.entropy.sum() / num_tokens
        if inputs.reference_logprobs is not None:
            divergence = k3_divergence(statistics.logprobs, inputs.reference_logprobs)
            loss = loss + self.kl_coefficient * (inputs.weights * divergence).sum()
            values["kl"] = divergence.sum() / num_tokens
        if inputs.old_logprobs is None:  # these tokens have no other forward pass
            values["entropy"] = statistics.entropy.sum() / num_tokens
        values["loss"] = loss
        return loss, {name: torch.as_tensor(value).detach() for name, value in values.items()}

    def update_sizes(self, log_ratio: Tensor, inputs: LossInputs) -> Tensor:
        """ξ, how strongly the surrogate moves each token: the derivative of its objective by log π.

        `I_clip r A` for PPO's clip, whatever the surrogate: the raw advantage at ratio 1, 0 where it clips.

        Args:
            log_ratio: Without gradient, `[num_tokens]`.
            inputs: With raw advantages.

        Returns:
            `[num_tokens]`, without gradient.
        """
        with torch.enable_grad():
            log_ratio = log_ratio.clone().requires_grad_()
            ratio = self.surrogate.importance_ratio(log_ratio, inputs.sequence_indices)
            objective, _ = self.surrogate(ratio, inputs.advantages)
            return torch.autograd.grad(objective.sum(), log_ratio)[0]
