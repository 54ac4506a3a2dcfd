"""The record that modulations and penalties read: everything known of the tokens before the loss is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dynamo_lightning.losses.token_statistics import TokenStatistics


def own_values(values: Tensor) -> Tensor:
    """The values themselves: the `gather` of a single process, and of a micro-batch that stands for itself."""
    return values


@dataclass(frozen=True)
class ModulationInputs:
    """Statistics and raw advantages of this rank's response tokens, with access to those of the other ranks.

    Example:
        A modulation that compares each entropy with the mean over the tokens of all ranks:
        `inputs.advantages * (inputs.statistics.entropy > inputs.gather(inputs.statistics.entropy).mean())`
    """

    statistics: TokenStatistics
    """Statistics of the policy that sampled the tokens, detached, `[num_tokens]` each; of the current policy and the
    micro-batch's tokens if the modulation is recomputed."""
    advantages: Tensor
    """Raw advantage of each token's rollout, `[num_tokens]`."""
    gather: Callable[[Tensor], Tensor] = own_values
    """Gives the values of all ranks for the values of this one; called equally often on every rank."""
    token_keys: Callable[[], Tensor] | None = None
    """Gives a random number for each token, `[num_tokens]`, int64, not negative: the same however the batch is cut and
    spread, new in every iteration. `None` if the modulation is recomputed."""
    update_sizes: Tensor | None = None
    """ξ, the derivative of each token's objective by log π, `[num_tokens]`: `I_clip r A`. `None` before the first
    update, where it is the advantage."""

    token_weights: Callable[[], Tensor] | None = None
    """Gives the weight of each token in the loss, `[num_tokens]`, as if the batch were one optimizer step. `None` if
    the modulation is recomputed."""

    @property
    def sizes(self) -> Tensor:
        """ξ of each token, `[num_tokens]`: `update_sizes`, or the advantages where there are none yet."""
        return self.advantages if self.update_sizes is None else self.update_sizes

    def loss_weights(self) -> Tensor:
        """The weight ω of each token in the loss, `[num_tokens]`.

        Raises:
            TypeError: If the modulation is recomputed.
        """
        if self.token_weights is None:
            raise TypeError("weights of the whole batch exist once for a batch of rollouts, not for each micro-batch")
        return self.token_weights()

    def keys(self) -> Tensor:
        """The random number of each token, `[num_tokens]`, int64.

        Raises:
            TypeError: If the modulation is recomputed: a micro-batch has no random numbers.
        """
        if self.token_keys is None:
            raise TypeError("token keys exist once for a batch of rollouts, not for each micro-batch")
        return self.token_keys()
