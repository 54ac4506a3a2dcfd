"""GVM's allocation (arXiv 2505.02391) with equal gradient norms, for comparison."""

from __future__ import annotations

from typing_extensions import override

from dynamo_lightning.allocation.records import Estimate, FloatArray
from dynamo_lightning.allocation.rules import ProportionalRule
from dynamo_lightning.errors import UserError


class GVMRule(ProportionalRule):
    """`n_i ∝ G_i/√(p_i + α/p_i^(β − 1))` above the least size, as in the authors' code (RLHFlow/GVM).

    The sizes that minimize the variance of a gradient of accepted responses only (rejection sampling), with a penalty
    on prompts that are hardly ever answered. G_i, the norm of the gradient of prompt i's accepted responses, takes a
    backward pass over a pilot's responses before anything is allocated; it is **taken as equal for all prompts** here,
    so that the rule gives the most to prompts with p near α^(1/β), 0.03 with the authors' numbers.

    Args:
        alpha: α, weight of the penalty; 1e-3 in the authors' code.
        beta: β, its exponent; 2 there.

    Raises:
        UserError: If α is negative or β less than 1.
    """

    uses = "success_rate"

    def __init__(self, alpha: float = 1e-3, beta: float = 2.0) -> None:
        if not (alpha >= 0 and beta >= 1):
            raise UserError(f"data.rule needs alpha ≥ 0 and beta ≥ 1, got {alpha} and {beta}")
        self.alpha = alpha
        self.beta = beta

    @override
    def weights(self, estimate: Estimate) -> FloatArray:
        """Return `1/√(p + α/p^(β − 1))`."""
        p = estimate.success_rate
        return (p + self.alpha / p ** (self.beta - 1)) ** -0.5
