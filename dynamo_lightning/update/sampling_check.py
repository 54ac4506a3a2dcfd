"""The tripwire of every iteration: the log-probabilities of sampling against those of training.

Both are the same policy's, computed in two ways: token by token with a cache, and packed in one pass. If they differ by
more than rounding, one of them is wrong (an attention kernel, positions, dropout, scaled logits, stale weights), and
every importance ratio and gradient with it. Nothing else would show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynamo_lightning.distributed import gather_objects
from dynamo_lightning.errors import RunError
from dynamo_lightning.losses.token_statistics import TokenStatistics, columns_of
from dynamo_lightning.types import FloatArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynamo_lightning.engines.engine import Engine
    from dynamo_lightning.update.settings import UpdateSettings

FULL_PRECISION_TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 0.05
METRIC = "sampling/sampling_logp_difference"


@dataclass(frozen=True)
class LogpDifference:
    """Sum, largest and number of `|log π_trained − log π_sampled|` of some response tokens, nats."""

    total: float = 0.0
    largest: float = 0.0
    num_tokens: int = 0

    def __add__(self, other: LogpDifference) -> LogpDifference:
        """The difference over the tokens of both."""
        return LogpDifference(
            self.total + other.total, max(self.largest, other.largest), self.num_tokens + other.num_tokens
        )

    @classmethod
    def of(cls, trained: Tensor, sampled: Tensor) -> LogpDifference:
        """The difference over these tokens, `[num_tokens]` each."""
        if not len(trained):
            return cls()
        difference = (trained.detach().double() - sampled.to(trained.device, torch.float64)).abs()
        return cls(float(difference.sum()), float(difference.max()), len(difference))


def global_difference(own: LogpDifference) -> LogpDifference:
    """Over the tokens of all ranks; called on all at once."""
    return sum(gather_objects([own]), LogpDifference())


def difference_metrics(difference: LogpDifference) -> dict[str, float]:
    """Mean and maximum over all tokens; names as in TRL."""
    mean = difference.total / max(1, difference.num_tokens)
    return {f"{METRIC}/mean": mean, f"{METRIC}/max": difference.largest}


def sampling_tolerance(
    configured: float | None, generator: Engine, policy: PreTrainedModel, staleness: int
) -> float | None:
    """The largest mean difference that the run goes on with, nats; `None` if there is nothing to compare.

    Rollouts that older weights sampled on purpose (`model.max_staleness`) and tokens drawn from a filtered distribution
    (`model.generator.token_filter`) differ rightly.

    Args:
        configured: `model.sampling.logp_tolerance`; `None` takes the default of the coarser precision.
        generator: The engine that sampled the tokens.
        policy: The policy under training; called in the precision context of training.
        staleness: Optimizer steps between the weights that sampled and those of now.
    """
    if staleness or not generator.samples_from_policy:
        return None
    if configured is not None:
        return configured
    return FULL_PRECISION_TOLERANCE if is_exact(generator, policy) else HALF_PRECISION_TOLERANCE


def is_exact(generator: Engine, policy: PreTrainedModel) -> bool:
    """True if sampling and training both compute in float32 or better; called in the precision context of training."""
    device = policy.device.type
    trained = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else policy.dtype
    return all(dtype in (torch.float32, torch.float64) for dtype in (trained, generator.engine_dtype(policy)))


def takes_engine_statistics(generator: Engine, policy: PreTrainedModel, settings: UpdateSettings) -> bool:
    """True if log-probabilities and entropies need no pass of their own, because the sampler has them exactly.

    Args:
        generator: The engine.
        policy: The policy under training; called in the precision context of training.
        settings: The options of updates.
    """
    if settings.uses_external_engine or settings.config.recompute_logprobs:
        return False
    return generator.gives_statistics and is_exact(generator, policy)


def check_difference(difference: LogpDifference, tolerance: float | None, policy: PreTrainedModel) -> None:
    """Stop a run whose log-probabilities of sampling and of training are not the same policy's.

    Args:
        difference: Over all ranks.
        tolerance: See `sampling_tolerance`; `None` checks nothing.
        policy: For its name and kernel.

    Raises:
        RunError: Naming possible reasons and the options that help.
    """
    mean = difference.total / max(1, difference.num_tokens)
    if tolerance is None or mean <= tolerance:
        return
    raise RunError(
        f"the log-probabilities with which responses were sampled differ from those of training by {mean:.1e} "
        f"nats on average, {difference.largest:.1e} at most (model.sampling.logp_tolerance allows {tolerance:.0e} on "
        f"average): {type(policy).__name__} with attention kernel {policy.config._attn_implementation!r} does not "
        "compute the same token by token as in one pass, so every gradient would be wrong, and no step is taken. Try "
        "model.policy.attn_implementation=eager, shorter responses (model.sampling.max_response_length) if the model's "
        "positions depend on the length, another model.generator or its dtype; raise model.sampling.logp_tolerance "
        "only if the precision explains the difference"
    )


def check_statistics(
    given: TokenStatistics, computed: TokenStatistics, chosen: Tensor, tolerance: float | None, policy: PreTrainedModel
) -> None:
    """Stop a run whose engine gives other statistics of its distributions than the policy has; called on all ranks.

    Args:
        given: By the engine, `[num_tokens]` each.
        computed: By the policy in one pass, `[num_tokens]` each.
        chosen: Tokens to compare, `[num_tokens]`, bool.
        tolerance: Largest mean difference, nats; `None` checks nothing.
        policy: For its name and kernel.

    Raises:
        RunError: As `check_difference` does.
    """
    for one, other in zip(columns_of(given), columns_of(computed), strict=True):
        check_difference(global_difference(LogpDifference.of(other[chosen], one[chosen])), tolerance, policy)


def sampled_logprobs(logprobs: Sequence[FloatArray], like: Tensor) -> Tensor:
    """The generator's log-probabilities of rollouts end to end, `[num_tokens]`, of the type and device of `like`."""
    values = np.concatenate([np.empty(0, dtype=np.float32), *logprobs])
    return torch.from_numpy(values).to(like.device, like.dtype)
