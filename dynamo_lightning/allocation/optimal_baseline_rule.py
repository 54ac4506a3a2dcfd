"""Group sizes of least variance for the variance-minimizing baseline, whose variance is not that of leave-one-out."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from typing_extensions import override

from dynamo_lightning.allocation.records import AllocationProblem, Estimate, FloatArray, IntArray
from dynamo_lightning.allocation.rules import MarginalGainRule
from dynamo_lightning.errors import UserError


class OptimalBaselineRule(MarginalGainRule):
    """Minimize `Σ a_i/n_i`, or `Σ a_i/n_i + c_i/(n_i(n_i − 1))` where the baseline comes from the group itself.

    For `model.loss.advantage: OptimalBaseline`. Write s for a rollout's score, `w = ‖s‖²`, `W = E w`, `b* = E[w r]/W`,
    `e = r − b*`, `φ = w e/W` (so that `E φ = 0`), and S₁, S₀ for the mean of w of successes and of failures.

    **History.** With b* known, the gradient is a mean of n independent `e s`, of variance `a/n` with
    `a = E[w e²] − ‖∇J‖² = p(1 − p) S₁S₀/W − ‖∇J‖²`, `W = pS₁ + (1 − p)S₀`. A group of one is allowed.

    **Group.** The leave-one-out baseline is a ratio of means; to first order (delta method)
    `b_j − b* = Σ_{k≠j} φ_k/(n − 1)`. Then `ĝ = (1/n) Σ_j e_j s_j − Σ_{j≠k} φ_k s_j/(n(n − 1))`: a U-statistic with the
    kernel `h(x, y) = ½(e s + e' s') − ½(φ s' + φ' s)`. As `E s = E φ = 0`, the projection of h is `½(e s + ∇J)`, so
    `ζ₁ = a/4`; the two halves of h are uncorrelated, so `ζ₂ = a/2 + c/2` with `c = E[w² e²]/W + ‖E φ s‖²`. Hoeffding's
    formula `[4(n − 2)ζ₁ + 2ζ₂]/(n(n − 1))` gives `a/n + c/(n(n − 1))`, with `E[w² e²]/W = p(1 − p) S₁²S₀²/W³`.
    With `S₁ = S₀` that is `a/(n − 1)`, the `rloo` rule. The next terms are of order 1/n³: for groups of two or three
    the formula is rough, and too small where failures have much larger scores than successes.

    Prompts are taken to have the same S₀ and the ratio `ρ = S₁/S₀` of `score_ratio`, and ‖∇J‖² to be small against the
    variance of one rollout: `a ∝ p(1 − p) ρ/u`, `c ∝ a ρ/u²` with `u = pρ + 1 − p`, of the expected p. Gains of the
    next rollout: `a/(n(n + 1))` and `2c/((n − 1)n(n + 1))`, which strictly fall.

    Args:
        baseline: Where the baseline comes from: `history`, with `half_life` set in the advantage, or the `group`.
        score_ratio: ρ, mean squared score norm of right responses over that of wrong ones; a run logs it as
            `baseline/score_ratio`. 1 takes them as equal.

    Raises:
        UserError: If `score_ratio` is not positive and finite.
    """

    def __init__(self, baseline: Literal["group", "history"] = "group", score_ratio: float = 1.0) -> None:
        if not (score_ratio > 0 and math.isfinite(score_ratio)):
            raise UserError(f"data.rule.score_ratio={score_ratio} must be positive and finite")
        self.baseline = baseline
        self.score_ratio = score_ratio
        self.minimum_group_size = 1 if baseline == "history" else 2  # type: ignore[misc]

    @override
    def allocate(self, problem: AllocationProblem) -> IntArray:
        if self.score_ratio != 1.0 and not np.isfinite(problem.estimate.success_rate).all():
            raise UserError(f"data.rule.score_ratio={self.score_ratio} needs success rates; an estimate has none")
        return super().allocate(problem)

    @override
    def marginal_gain(self, estimate: Estimate, size: IntArray) -> FloatArray:
        scale, noise = self.coefficients(estimate)
        gain = scale / (size * (size + 1))
        return gain if self.baseline == "history" else gain + 2 * noise / ((size - 1) * size * (size + 1))

    def coefficients(self, estimate: Estimate) -> tuple[FloatArray, FloatArray]:
        """Return `a` and `c` up to the factor S₀ that all prompts share, `[num_prompts]` each."""
        if self.score_ratio == 1.0:
            return estimate.bernoulli_variance, estimate.bernoulli_variance
        mean = estimate.success_rate * (self.score_ratio - 1) + 1
        scale = estimate.bernoulli_variance * self.score_ratio / mean
        return scale, scale * self.score_ratio / mean**2
