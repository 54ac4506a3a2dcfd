"""Reinforce-Ada's sequential stopping (arXiv 2510.04996) as group sizes planned ahead, for comparison."""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from dynamo_lightning.allocation.records import Estimate, FloatArray, IntArray
from dynamo_lightning.allocation.rules import MarginalGainRule
from dynamo_lightning.errors import UserError


class ReinforceAdaRule(MarginalGainRule):
    """Rollouts for the prompts that are the most likely not to have enough successes and failures yet.

    Reinforce-Ada samples a prompt round by round until it has `positives` successes and `negatives` failures (half of
    a fixed group each, “balanced”; one success and no failure, “positive-focused”). With success rate p a prompt is
    still sampled after n rollouts with probability

        P(K < positives) + P(K > n − negatives),   K ~ Binomial(n, p),

    which never rises with n: it is the gain of the next rollout. The sizes maximize the expected number of rollouts
    that sequential sampling would have drawn, `Σ_i E min(N_i, n_i)`, N_i its stopping time: hard and easy prompts get
    the most, as there.

    Not taken over: sampling in rounds, whose number of rollouts is not known before (here the budget is exact, and
    `data.pilot` makes two rounds at most); the fixed-size group that is drawn from all rollouts in the end, and the
    baseline from all of them.

    Args:
        positives: Successes that end the sampling of a prompt; 2 in the authors' configuration.
        negatives: Failures that end it.

    Raises:
        UserError: If there is nothing to wait for.
    """

    uses = "success_rate"

    def __init__(self, positives: int = 2, negatives: int = 2) -> None:
        if min(positives, negatives) < 0 or positives + negatives < 1:
            raise UserError(
                f"data.rule needs positives and negatives of at least 0, not both 0, got {positives} and {negatives}"
            )
        self.positives = positives
        self.negatives = negatives

    @override
    def marginal_gain(self, estimate: Estimate, size: IntArray) -> FloatArray:
        """Return the probability that sampling has not stopped after `size` rollouts."""
        p = estimate.success_rate
        too_few = fewer_than(self.positives, size, p) + fewer_than(self.negatives, size, 1 - p)
        # Both at once only where the group is smaller than what is waited for: then nothing can have stopped.
        return np.where(size < self.positives + self.negatives, 1.0, np.minimum(too_few, 1.0))


def fewer_than(count: int, size: IntArray, rate: FloatArray) -> FloatArray:
    """`P(K < count)` of `K ~ Binomial(size, rate)`, `[num_prompts]`; rates in (0, 1)."""
    term = (1 - rate) ** size
    total = np.zeros(len(rate))
    for k in range(count):
        total += term
        term = term * np.maximum(size - k, 0) / (k + 1) * rate / (1 - rate)
    return total
