"""Penalties: loss terms beside the surrogate that hold some tokens where the sampling policy had them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from dynamo_lightning.losses.modulation_inputs import ModulationInputs


class Penalty(ABC):
    """A term of each token, added to the loss with the token's weight: `L = −Σ w · objective + Σ w · penalty`."""

    vanishes_without_advantage: ClassVar[bool] = False
    """True if the penalty is 0 for every token of a rollout whose advantage is 0, so that updates may skip it."""

    couples_tokens: ClassVar[bool] = False
    """True if a token's penalty depends on other tokens of its rollout; then it is not evaluated chunk by chunk."""

    def token_selection(self, inputs: ModulationInputs) -> Tensor | None:
        """A number for each token that depends on the whole batch, computed once before its first update.

        Args:
            inputs: At the policy that sampled the tokens.

        Returns:
            `[num_tokens]`; `None`, as here, if the penalty selects no tokens.
        """
        return None

    @abstractmethod
    def __call__(self, log_ratio: Tensor, token_selection: Tensor | None) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Penalty of each token, to be minimised.

        Args:
            log_ratio: `log π(a) − log π_old(a)`, `[num_tokens]`, with gradient.
            token_selection: What the method above returned for these tokens.

        Returns:
            Penalty, `[num_tokens]`, and by metric name the value of each token, `[num_tokens]`, whose mean over all
            tokens of the batch is logged; tokens of skipped rollouts count as 0.
        """
