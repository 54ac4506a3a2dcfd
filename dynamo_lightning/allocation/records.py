"""The records that travel between estimators, rules and the store: a row per prompt, float64 and int64 arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

WEIGHT_FLOOR = 1e-6
"""Least variance, and distance of a success rate from 0 and 1, that rules see: rollouts left over by capped prompts
still go round among those that seem to have no variance."""


@dataclass(frozen=True)
class Estimate:
    """Expectations about some prompts before their rollouts; a row per prompt, in the order asked for."""

    success_rate: FloatArray
    """`E[p]`, `[num_prompts]`, in [0, 1]."""
    bernoulli_variance: FloatArray
    """`E[p(1 − p)]`, the allocation weight, `[num_prompts]`; in [0, 1/4] but for `PaperBernoulli`."""
    unseen: BoolArray
    """True if the prompt has no outcome yet, `[num_prompts]`."""
    response_length: FloatArray | None = None
    """Expected tokens `E[T]` of one response, `[num_prompts]`; all NaN as long as no length was seen at all."""

    def take(self, rows: IntArray) -> Estimate:
        """Return the estimate of the prompts at these positions, repeated ones too."""
        length = self.response_length
        return Estimate(
            self.success_rate[rows],
            self.bernoulli_variance[rows],
            self.unseen[rows],
            None if length is None else length[rows],
        )

    def floored(self) -> Estimate:
        """Return the estimate with variances of at least 1e-6 and success rates in [1e-6, 1 − 1e-6]."""
        return replace(
            self,
            success_rate=np.clip(self.success_rate, WEIGHT_FLOOR, 1 - WEIGHT_FLOOR),
            bernoulli_variance=np.maximum(self.bernoulli_variance, WEIGHT_FLOOR),
        )


@dataclass(frozen=True)
class AllocationProblem:
    """A budget and what it may be spent on; `allocate_rollouts` checks and builds it."""

    estimate: Estimate
    """Estimate of the batch's prompts, `[num_prompts]`, floored."""
    prompt_ids: IntArray
    """Distinct, `[num_prompts]`; they break ties, so that the order of the prompts never matters."""
    cost: FloatArray
    """Cost of one rollout of each prompt, positive, `[num_prompts]`: 1, or the expected tokens."""
    budget: int
    """Rollouts to allocate, or whose mean cost is to be spent."""
    min_rollouts: int
    """Smallest group size; 0 if prompts may be skipped."""
    max_rollouts: int
    """Largest group size."""

    @property
    def counts_rollouts(self) -> bool:
        """True if all rollouts cost the same: then the sizes sum to the budget exactly."""
        return bool((self.cost == self.cost[:1]).all())

    @property
    def capacity(self) -> float:
        """Largest total cost of the rollouts: the budget times the mean cost, and 1e-9 of it for rounding."""
        return self.budget * float(self.cost.mean()) * (1 + 1e-9) if len(self.cost) else 0.0
