"""Penalties: loss terms beside the surrogate that hold some tokens where the sampling policy had them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from dynamo_lightning.losses.token_statistics import TokenStatistics


class Penalty(ABC):
    """A term of each token, added to the loss with the token's weight: `L = −Σ w · objective + Σ w · penalty`."""

    vanishes_without_advantage: ClassVar[bool] = False
    """Whether the penalty is 0 for every token of a rollout whose advantage is 0, so that updates may skip it."""

    couples_tokens: ClassVar[bool] = False
    """Whether a token's penalty depends on other tokens of its rollout; then it is not evaluated chunk by chunk."""

    def marks(
        self,
        statistics: TokenStatistics,
        advantages: Tensor,
        gather: Callable[[Tensor], Tensor],
        token_keys: Callable[[], Tensor],
    ) -> Tensor | None:
        """A number for each token that needs the whole batch to be found, computed once in the scoring pass.

        Args:
            statistics: Of the policy that sampled the tokens, detached, `[num_tokens]` each.
            advantages: Raw advantage of each token's rollout, `[num_tokens]`.
            gather: Gives the values of all ranks for the values of this one; called equally often on every rank.
            token_keys: Gives a random number for each token, `[num_tokens]`, int64, not negative: the same however
                the batch is cut and spread, new in every iteration.

        Returns:
            `[num_tokens]`; `None`, as here, if the penalty needs no marks.
        """
        return None

    @abstractmethod
    def __call__(self, log_ratio: Tensor, marks: Tensor | None) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Penalty of each token, to be minimised.

        Args:
            log_ratio: `log π(a) − log π_old(a)`, `[num_tokens]`, with gradient.
            marks: What the method above returned for these tokens.

        Returns:
            Penalty, `[num_tokens]`, and by metric name the value of each token, `[num_tokens]`, whose mean over all
            tokens of the batch is logged; tokens of skipped rollouts count as 0.
        """
