"""Pilot-Commit's choice of prompts (arXiv 2605.26606), for comparison."""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from dynamo_lightning.allocation.records import Estimate, FloatArray, IntArray
from dynamo_lightning.allocation.rules import MarginalGainRule
from dynamo_lightning.errors import UserError

KEPT = 1e6
"""Added to the gain of kept prompts: more than any group has rollouts."""


class PilotCommitRule(MarginalGainRule):
    """Equal groups for prompts with `lower ≤ p ≤ 1 − upper`, the least for all others.

    As in the authors' code (`recipe/pc` of databricks/pilot-commit): prompts whose success rate in a pilot is outside
    the thresholds are skipped, the others get the same number of further rollouts. Take `data.pilot` with it: p is then
    the posterior mean after the pilot instead of the pilot's own mean. Prompts outside get `data.min_rollouts` (with
    `data.min_rollouts: 0`, and no pilot, none); what kept prompts cannot take goes round among the others.

    Not taken over: the authors' groups hold pilot and commit rollouts with one baseline (`data.pilot_baseline: pooled`
    does that, with its bias), easy prompts may leave the data set, and a buffer replays old rollouts.

    Args:
        lower: Least success rate of a kept prompt; 0.25 in their configuration, 0.1 in their function.
        upper: 1 less the largest one; as `lower`.

    Raises:
        UserError: If the thresholds leave nothing between them.
    """

    uses = "success_rate"
    skips = True

    def __init__(self, lower: float = 0.25, upper: float = 0.25) -> None:
        if not (lower >= 0 and upper >= 0 and lower + upper < 1):
            raise UserError(f"data.rule needs lower ≥ 0, upper ≥ 0 and lower + upper < 1, got {lower} and {upper}")
        self.lower = lower
        self.upper = upper

    @override
    def marginal_gain(self, estimate: Estimate, size: IntArray) -> FloatArray:
        """Return `−n`, and `KEPT` more for kept prompts: they are served first, round robin."""
        p = estimate.success_rate
        return np.where((p >= self.lower) & (p <= 1 - self.upper), KEPT, 0.0) - size

    @override
    def group_gain(self, estimate: Estimate, size: int) -> FloatArray:
        """Return the gain of as many rollouts of an existing group: a skipped prompt is no better and no worse."""
        return size * self.marginal_gain(estimate, np.full(len(estimate.success_rate), size))

    @override
    def per_cost(self, gain: FloatArray, cost: FloatArray) -> FloatArray:
        """Return the gain: groups are equal whatever they cost."""
        return gain
