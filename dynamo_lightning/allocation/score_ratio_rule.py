"""Group sizes of least variance where right responses have smaller scores than wrong ones, or larger ones."""

from __future__ import annotations

import math

import numpy as np
from typing_extensions import override

from dynamo_lightning.allocation.records import AllocationProblem, Estimate, FloatArray, IntArray
from dynamo_lightning.allocation.rules import MarginalGainRule
from dynamo_lightning.errors import UserError


class ScoreRatioRule(MarginalGainRule):
    """Minimize `Σ a_i/(n_i − 1)` with `a ∝ p(1 − p)[(1 − p)ρ + p]`, `ρ = S₁/S₀`: `RLOORule` for unequal scores.

    With leave-one-out advantages a prompt's variance is `a = p(1 − p)[(1 − p)S₁ + pS₀] − ‖∇J‖²`, S₁ and S₀ the mean
    squared score norms of right and of wrong responses; `p(1 − p)` takes the two as equal. A policy that mostly knows
    the answer gives right responses small scores, and its rare mistakes large ones: `RLOORule` then spends too much on
    prompts that are hardly ever solved, and too little on those nearly always solved. All prompts are taken to have the
    same S₀ and ρ, and ‖∇J‖² to be small against the variance of one rollout; p and p(1 − p) are the expected ones.

    Derived here; benchmarks/variance_remedies.py has what other ways to estimate S₀ and S₁ give.

    Args:
        score_ratio: ρ. A run with `model.loss.advantage: OptimalBaseline` logs it as `baseline/score_ratio`, of the
            logits' gradient. 1 is `RLOORule`.

    Raises:
        UserError: If `score_ratio` is not positive and finite.
    """

    minimum_group_size = 2

    def __init__(self, score_ratio: float = 0.1) -> None:
        if not (score_ratio > 0 and math.isfinite(score_ratio)):
            raise UserError(f"data.rule.score_ratio={score_ratio} must be positive and finite")
        self.score_ratio = score_ratio

    @override
    def allocate(self, problem: AllocationProblem) -> IntArray:
        if not np.isfinite(problem.estimate.success_rate).all():
            raise UserError(f"data.rule.score_ratio={self.score_ratio} needs success rates; an estimate has none")
        return super().allocate(problem)

    @override
    def marginal_gain(self, estimate: Estimate, size: IntArray) -> FloatArray:
        return self.variance(estimate) / (size * (size - 1))

    def variance(self, estimate: Estimate) -> FloatArray:
        """Return `a` up to the factor S₀ that all prompts share, `[num_prompts]`."""
        rate = estimate.success_rate
        return estimate.bernoulli_variance * ((1 - rate) * self.score_ratio + rate)
