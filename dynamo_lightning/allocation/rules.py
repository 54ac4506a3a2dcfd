"""Rules that allocate a rollout budget to prompts: what each minimizes, and how.

Symbols: `p_i` is the success rate of prompt `i`, `a_i ∝ p_i(1 − p_i)` its variance, `n_i` its group size, `N` the
number of prompts, `B` the budget. A rule that minimises a sum of convex functions of `n_i` only has to name the
marginal gain of the next rollout; since that gain strictly falls with `n_i`, giving rollouts one at a time to the
largest gain, per cost of the rollout, is the exact integer optimum at equal costs.

The paper (arXiv 2602.19208) states `n_i ∝ σ_i` and its code allocates `∝ σ_i²`; neither respects the bounds exactly.
Here both are choices, and the default is the exact optimum for the advantages that are really used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from dynamo_lightning.allocation.greedy import Steps, take_best_steps
from dynamo_lightning.allocation.records import AllocationProblem, Estimate, FloatArray, IntArray

SMALLEST_GROUP = 2
"""Where prompts may be skipped, a group that is generated has at least two: a group of one has no gradient."""


class AllocationRule(ABC):
    """How a budget of rollouts is allocated. Subclass `MarginalGainRule` where a marginal gain says it all."""

    minimum_group_size: ClassVar[int] = 1
    """Smallest group for which the rule's objective is finite; `min_rollouts` may not be less, unless it is 0."""
    uses: ClassVar[str] = "bernoulli_variance"
    """The field of `Estimate` that the rule reads: it must be finite."""
    counts_tokens: ClassVar[bool] = True
    """True if the budget may be one of tokens."""
    skips: ClassVar[bool] = False
    """True if the rule can leave prompts out (`min_rollouts` 0)."""
    skipping_biases: ClassVar[bool] = False
    """True if that breaks what the rule promises, an unbiased gradient of least variance."""

    @abstractmethod
    def allocate(self, problem: AllocationProblem) -> IntArray:
        """Return the group sizes, `[num_prompts]`; `allocate_rollouts` has checked the problem, call that."""


class MarginalGainRule(AllocationRule):
    """A rule whose objective falls by `marginal_gain(estimate, n)` when prompts get one rollout more than `n`."""

    @abstractmethod
    def marginal_gain(self, estimate: Estimate, size: IntArray) -> FloatArray:
        """Return what going from `size` to `size + 1` rollouts gains; it must strictly fall with `size`.

        Args:
            estimate: Of the prompts, floored, `[num_prompts]`.
            size: Rollouts that each prompt has already, at least `minimum_group_size`, `[num_prompts]`.

        Returns:
            The gains, `[num_prompts]`.
        """

    def group_gain(self, estimate: Estimate, size: int) -> FloatArray:
        """Return what a group of `size` gains over none, `[num_prompts]`, for rules that can leave prompts out."""
        raise NotImplementedError(f"{type(self).__name__} leaves no prompt out")

    def per_cost(self, gain: FloatArray, cost: FloatArray) -> FloatArray:
        """Return the value by which rollouts are compared: `gain/cost`."""
        return gain / cost

    def allocate(self, problem: AllocationProblem) -> IntArray:
        """Return the greedy optimum; equal gains go to the smaller group first, then to the smaller prompt id.

        A skipped prompt jumps from 0 to 2 rollouts by the average gain of the two: with fewer than two a group never
        has both outcomes, so its first rollout gains nothing by itself. That is a heuristic, not called optimal.
        """
        may_skip = problem.min_rollouts == 0
        first = SMALLEST_GROUP if may_skip else problem.min_rollouts

        def value(rows: IntArray, steps: IntArray) -> FloatArray:
            estimate = problem.estimate.take(rows)
            if not may_skip:
                return self.per_cost(self.marginal_gain(estimate, first + steps), problem.cost[rows])
            gain = self.marginal_gain(estimate, first + np.maximum(steps - 1, 0))
            # Never less than the gain after it, not even by rounding: nothing is bought before its jump.
            jump = np.maximum(self.group_gain(estimate, first) / first, gain)
            return self.per_cost(np.where(steps == 0, jump, gain), problem.cost[rows])

        steps = Steps(
            value,
            first_cost=first * problem.cost if may_skip else problem.cost,
            cost=problem.cost,
            limit=problem.max_rollouts - first + may_skip,
            prompt_ids=problem.prompt_ids,
        )
        if not may_skip:
            return first + take_best_steps(steps, problem.capacity - first * float(problem.cost.sum()))
        taken = take_best_steps(steps, problem.capacity)
        if problem.counts_rollouts and np.where(taken > 0, first - 1 + taken, 0).sum() < problem.budget:
            # One rollout is left, and all groups are full: with one given back it makes another group.
            rows = np.flatnonzero(taken > 1)
            order = np.lexsort((problem.prompt_ids[rows], taken[rows], value(rows, taken[rows] - 1)))
            taken[rows[order[0]]] -= 1
            rows = np.flatnonzero(taken == 0)
            order = np.lexsort((problem.prompt_ids[rows], -value(rows, taken[rows])))
            taken[rows[order[0]]] += 1
        return np.where(taken > 0, first - 1 + taken, 0)


class RLOORule(MarginalGainRule):
    """Minimise `Σ a_i/(n_i − 1)`, the variance of the gradient with leave-one-out advantages: gain `a/(n(n − 1))`.

    With `A_ij = r_ij − mean of the others` the gradient of prompt `i` is unbiased for any `n_i ≥ 2` and has the
    variance `≈ a_i/(n_i − 1)`. The continuous optimum without bounds is `n_i − 1 ∝ √a_i`: the paper's `n_i ∝ σ_i`
    (arXiv 2602.19208), with the rollout that the leave-one-out baseline costs taken into account.

    A skipped prompt (`min_rollouts` 0) is left out of the gradient, which then is biased. By convention it counts as
    twice the variance of a pair: the jump's average gain `a/2` is that of the third rollout.
    """

    minimum_group_size = 2
    skips = True
    skipping_biases = True

    def marginal_gain(self, estimate: Estimate, size: IntArray) -> FloatArray:
        """Return `a/(n − 1) − a/n = a/(n(n − 1))`; arguments as in `MarginalGainRule`."""
        return estimate.bernoulli_variance / (size * (size - 1))

    def group_gain(self, estimate: Estimate, size: int) -> FloatArray:
        """Return `2a − a/(n − 1)`."""
        return estimate.bernoulli_variance * (2 - 1 / (size - 1))


class NeymanRule(MarginalGainRule):
    """Minimise `Σ a_i/n_i`, the variance of a stratified mean (Neyman, 1934): gain `a/(n(n + 1))`.

    The objective that the paper states (arXiv 2602.19208): `min Σ σ_i²/n_i`, with `n_i ∝ σ_i` as continuous optimum.
    A skipped prompt (`min_rollouts` 0) counts by convention as much as one with a single rollout.
    """

    skips = True
    skipping_biases = True

    def marginal_gain(self, estimate: Estimate, size: IntArray) -> FloatArray:
        """Return `a/n − a/(n + 1) = a/(n(n + 1))`; arguments as in `MarginalGainRule`."""
        return estimate.bernoulli_variance / (size * (size + 1))

    def group_gain(self, estimate: Estimate, size: int) -> FloatArray:
        """Return `a − a/n`."""
        return estimate.bernoulli_variance * (1 - 1 / size)


class SignalRule(MarginalGainRule):
    """Maximise `Σ p_i(1 − p_i)² P(group i has both outcomes)`, Knapsack-RL's value (arXiv 2509.25849).

    For advantages divided by the group's standard deviation (GRPO): `p(1 − p)` cancels there and minimum variance says
    nothing, but a group whose outcomes are all equal has no gradient. With q = 1 − p, `P(both) = 1 − pⁿ − qⁿ`, so the
    next rollout gains `pq²(pⁿq + qⁿp)`. That strictly falls for n ≥ 1, and greedy is optimal. Only the first rollout
    gains nothing (P(both) = 0 for n < 2): a skipped prompt gets two at once or none; their average gain `pq²·pq` is
    that of the third. `p` is the posterior mean; hard prompts are preferred to easy ones with the same variance.
    """

    uses = "success_rate"
    skips = True

    def marginal_gain(self, estimate: Estimate, size: IntArray) -> FloatArray:
        """Return `pq²(pⁿq + qⁿp)`; arguments as in `MarginalGainRule`."""
        p, q = estimate.success_rate, 1 - estimate.success_rate
        return p * q**2 * (p**size * q + q**size * p)

    def group_gain(self, estimate: Estimate, size: int) -> FloatArray:
        """Return `pq²(1 − pⁿ − qⁿ)`."""
        p, q = estimate.success_rate, 1 - estimate.success_rate
        return p * q**2 * (1 - p**size - q**size)


class UniformRule(MarginalGainRule):
    """Give every prompt the same, whatever its weight and cost: round robin by prompt id, the GRPO baseline."""

    def marginal_gain(self, estimate: Estimate, size: IntArray) -> FloatArray:
        """Return `−n`, so that the smallest group is always next; arguments as in `MarginalGainRule`."""
        return -size.astype(np.float64)

    def per_cost(self, gain: FloatArray, cost: FloatArray) -> FloatArray:
        """Return the gain: equal groups cost the budget times the mean cost, whatever each costs."""
        return gain


class ProportionalRule(AllocationRule):
    """Give `n_min + (B − N n_min) a_i/Σa`, at most `n_max`: what the paper's code does, minimising nothing.

    It is proportional to the variance, not to its root. Without bounds `Σ a_i/n_i` is then `(Σa)N/B`: exactly that of
    equal groups, so nothing is won. What a capped prompt cannot take is shared among the others by the same
    proportion; fractions are settled by largest remainder, equal ones by smaller group, then prompt id.
    """

    counts_tokens = False

    def weights(self, estimate: Estimate) -> FloatArray:
        """Return what shares are proportional to, positive, `[num_prompts]`."""
        return estimate.bernoulli_variance

    def allocate(self, problem: AllocationProblem) -> IntArray:
        """Return the group sizes; arguments as in `AllocationRule`."""
        weights = self.weights(problem.estimate)
        room = problem.max_rollouts - problem.min_rollouts
        remainder = problem.budget - len(weights) * problem.min_rollouts
        shares = np.full(len(weights), float(room))
        uncapped = np.ones(len(weights), dtype=bool)
        while uncapped.any():
            rest = remainder - room * np.count_nonzero(~uncapped)
            shares[uncapped] = rest * (weights[uncapped] / weights[uncapped].sum())
            if not (shares > room).any():
                break
            uncapped &= shares <= room
            shares[~uncapped] = room
        extra = np.floor(shares).astype(np.int64)
        order = np.lexsort((problem.prompt_ids, extra, extra - shares))
        order = order[extra[order] < room]
        extra[order[: remainder - extra.sum()]] += 1
        return problem.min_rollouts + extra
