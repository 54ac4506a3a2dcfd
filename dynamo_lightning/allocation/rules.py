"""Rules that share a rollout budget over prompts: what each minimises, and how it hands the rollouts out.

Symbols: `a_i ∝ p_i(1 − p_i)` is the weight of prompt `i`, `n_i` its group size, `N` the number of prompts, `B = Σ n_i`.
A rule that minimises a sum of convex functions of `n_i` only has to name the marginal gain of the next rollout; since
that gain strictly falls with `n_i`, giving rollouts one at a time to the largest gain is the exact integer optimum.

The paper (arXiv 2602.19208) states `n_i ∝ σ_i` and its code hands out `∝ σ_i²`; neither respects the bounds exactly.
Here both are choices, and the default is the exact optimum for the advantages that are really used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class AllocationRule(ABC):
    """How a budget of rollouts is shared. Subclass `MarginalGainRule` where a marginal gain says it all."""

    minimum_group_size: ClassVar[int] = 1
    """Smallest group for which the rule's objective is finite; `min_rollouts` may not be less."""

    @abstractmethod
    def allocate(
        self, weights: FloatArray, prompt_ids: IntArray, budget: int, min_rollouts: int, max_rollouts: int
    ) -> IntArray:
        """Return the group sizes; `allocate_rollouts` has checked the arguments, call that.

        Args:
            weights: Finite and positive, `[num_prompts]`.
            prompt_ids: Distinct, `[num_prompts]`; they settle ties, so that the order of the prompts never matters.
            budget: Rollouts to hand out, within the bounds.
            min_rollouts: Smallest group size.
            max_rollouts: Largest group size.

        Returns:
            Group sizes with sum `budget`, `[num_prompts]`.
        """


class MarginalGainRule(AllocationRule):
    """A rule whose objective falls by `marginal_gain(a_i, n_i)` when prompt `i` gets one rollout more."""

    @abstractmethod
    def marginal_gain(self, variance: FloatArray, size: IntArray) -> FloatArray:
        """Return what going from `size` to `size + 1` rollouts gains; it must strictly fall with `size`.

        Args:
            variance: Weight `a` of each prompt, positive, `[num_prompts]`.
            size: Rollouts that each prompt has already, at least `minimum_group_size`, `[num_prompts]`.

        Returns:
            The gains, `[num_prompts]`.
        """

    def allocate(
        self, weights: FloatArray, prompt_ids: IntArray, budget: int, min_rollouts: int, max_rollouts: int
    ) -> IntArray:
        """Return the exact integer optimum; equal gains go to the smaller group first, then to the smaller prompt id.

        The optimum takes the largest gains. Instead of taking them one by one, it is enclosed, `low ≤ n ≤ high`: all
        gains above a level either fit into the budget (then they belong to the optimum) or do not (then they contain
        it). Each level is the median of what is still open, so a few rounds leave about two rollouts per prompt
        open, and those are sorted. Levels only ever compare gains with gains: no rounding, no tolerance.
        """
        num_prompts = len(weights)
        low = np.full(num_prompts, min_rollouts, dtype=np.int64)
        spare = budget - num_prompts * min_rollouts
        high = np.full(num_prompts, min(max_rollouts, min_rollouts + spare), dtype=np.int64)
        while (high - low).sum() > 2 * num_prompts:
            sizes = self._sizes_above(self._median_gain(weights, low, high), weights, low, high)
            fits = sizes.sum() <= budget
            if np.array_equal(sizes, low if fits else high):
                break  # only gains that do not strictly fall can get here; sorting all that is open is still exact
            low, high = (sizes, high) if fits else (low, sizes)

        open_rollouts = high - low
        prompt = np.repeat(np.arange(num_prompts), open_rollouts)
        first = np.repeat(np.cumsum(open_rollouts) - open_rollouts, open_rollouts)
        size = low[prompt] + np.arange(len(prompt)) - first
        order = np.lexsort((prompt_ids[prompt], size, -self.marginal_gain(weights[prompt], size)))
        return low + np.bincount(prompt[order[: budget - low.sum()]], minlength=num_prompts)

    def _median_gain(self, weights: FloatArray, low: IntArray, high: IntArray) -> float:
        """Return the median of the gains halfway between `low` and `high`, each counted `high − low` times."""
        gains = self.marginal_gain(weights, (low + high) // 2)
        order = np.argsort(gains)
        counts = np.cumsum((high - low)[order])
        return float(gains[order[np.searchsorted(counts, counts[-1] / 2)]])

    def _sizes_above(self, level: float, weights: FloatArray, low: IntArray, high: IntArray) -> IntArray:
        """Return, by bisection within `[low, high]`, the sizes that take every gain above `level`."""
        while (low < high).any():
            middle = (low + high) // 2
            above = self.marginal_gain(weights, middle) > level
            low = np.where(above & (low < high), middle + 1, low)
            high = np.where(above, high, middle)
        return low


class RLOORule(MarginalGainRule):
    """Minimise `Σ a_i/(n_i − 1)`, the variance of the gradient with leave-one-out advantages: gain `a/(n(n − 1))`.

    With `A_ij = r_ij − mean of the others` the gradient of prompt `i` is unbiased for any `n_i ≥ 2` and has the
    variance `≈ a_i/(n_i − 1)`. The continuous optimum without bounds is `n_i − 1 ∝ √a_i`: the paper's `n_i ∝ σ_i`
    (arXiv 2602.19208), with the rollout that the leave-one-out baseline costs taken into account.
    """

    minimum_group_size = 2

    def marginal_gain(self, variance: FloatArray, size: IntArray) -> FloatArray:
        """Return `a/(n − 1) − a/n = a/(n(n − 1))`; arguments as in `MarginalGainRule`."""
        return variance / (size * (size - 1))


class NeymanRule(MarginalGainRule):
    """Minimise `Σ a_i/n_i`, the variance of a stratified mean (Neyman, 1934): gain `a/(n(n + 1))`.

    The objective that the paper states (arXiv 2602.19208): `min Σ σ_i²/n_i`, with `n_i ∝ σ_i` as continuous optimum.
    """

    def marginal_gain(self, variance: FloatArray, size: IntArray) -> FloatArray:
        """Return `a/n − a/(n + 1) = a/(n(n + 1))`; arguments as in `MarginalGainRule`."""
        return variance / (size * (size + 1))


class UniformRule(MarginalGainRule):
    """Give every prompt the same, whatever its weight: round robin by prompt id, the GRPO baseline."""

    def marginal_gain(self, variance: FloatArray, size: IntArray) -> FloatArray:
        """Return `−n`, so that the smallest group is always next; arguments as in `MarginalGainRule`."""
        return -size.astype(np.float64)


class ProportionalRule(AllocationRule):
    """Give `n_min + (B − N n_min) a_i/Σa`, at most `n_max`: what the paper's code does, minimising nothing.

    It is proportional to the variance, not to its root. Without bounds `Σ a_i/n_i` is then `(Σa)N/B`: exactly that of
    equal groups, so nothing is won. What a capped prompt cannot take is shared among the others by the same
    proportion; fractions are settled by largest remainder, equal ones by smaller group, then prompt id.
    """

    def allocate(
        self, weights: FloatArray, prompt_ids: IntArray, budget: int, min_rollouts: int, max_rollouts: int
    ) -> IntArray:
        """Return the group sizes; arguments as in `AllocationRule`."""
        room = max_rollouts - min_rollouts
        spare = budget - len(weights) * min_rollouts
        shares = np.full(len(weights), float(room))
        uncapped = np.ones(len(weights), dtype=bool)
        while uncapped.any():
            rest = spare - room * np.count_nonzero(~uncapped)
            shares[uncapped] = rest * (weights[uncapped] / weights[uncapped].sum())
            if not (shares > room).any():
                break
            uncapped &= shares <= room
            shares[~uncapped] = room
        extra = np.floor(shares).astype(np.int64)
        order = np.lexsort((prompt_ids, extra, extra - shares))
        order = order[extra[order] < room]
        extra[order[: spare - extra.sum()]] += 1
        return min_rollouts + extra
