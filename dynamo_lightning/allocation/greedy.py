"""Spend a budget on the steps of best value, one prompt's steps in order: the exact core of every greedy rule.

A prompt's first step may cost more than the others (a skipped prompt has to get a whole group at once). Values never
rise from one step of a prompt to the next, so taking the best step that still fits, again and again, needs no look
ahead. With equal costs the result has the largest total value of all; with unequal ones it is that of the fractional
problem, rounded down, and less than the value of the one step that did not fit below the best (Dantzig, 1957).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dynamo_lightning.allocation.records import FloatArray, IntArray


@dataclass(frozen=True)
class Steps:
    """Steps that can be bought."""

    value: Callable[[IntArray, IntArray], FloatArray]
    """Value per cost of step `step` (from 0) of the prompts at `rows`; both `[num_steps]`, as is the result."""
    first_cost: FloatArray
    """Cost of each prompt's step 0, at least `cost`, `[num_prompts]`."""
    cost: FloatArray
    """Cost of each of a prompt's later steps, `[num_prompts]`."""
    limit: int
    """Steps that there are of each prompt."""
    prompt_ids: IntArray
    """Ids that break ties: of equal values, the prompt with fewer steps taken comes first, then the smaller id."""

    def total_cost(self, taken: IntArray) -> float:
        """Return what these numbers of steps cost together."""
        return float(np.where(taken > 0, self.first_cost + (taken - 1) * self.cost, 0.0).sum())


def take_best_steps(steps: Steps, capacity: float) -> IntArray:
    """Return how many steps of each prompt are taken, `[num_prompts]`; together they cost at most `capacity`.

    Instead of taking them one by one, the result is enclosed, `low ≤ taken ≤ high`: all steps above a value either fit
    into the capacity (then all are taken) or do not (then no others are). Each value tried is the median of what is
    still open, so a few rounds leave about two steps per prompt open, and those are sorted. Values are only ever
    compared with values: no tolerance, no rounding.
    """
    num_prompts = len(steps.cost)
    low = np.zeros(num_prompts, dtype=np.int64)
    high = np.minimum(steps.limit, capacity // steps.cost).astype(np.int64)
    while (high - low).sum() > 2 * num_prompts:
        taken = _steps_above(_median_value(steps, low, high), steps, low, high)
        fits = steps.total_cost(taken) <= capacity
        if np.array_equal(taken, low if fits else high):
            break  # only values that do not strictly fall can get here; sorting all that is open is still exact
        low, high = (taken, high) if fits else (low, taken)

    num_open = high - low
    row = np.repeat(np.arange(num_prompts), num_open)
    step = low[row] + np.arange(len(row)) - np.repeat(np.cumsum(num_open) - num_open, num_open)
    order = np.lexsort((steps.prompt_ids[row], step, -steps.value(row, step)))
    row, step = row[order], step[order]
    spent = steps.total_cost(low) + np.cumsum(np.where(step == 0, steps.first_cost[row], steps.cost[row]))
    num_fitting = int(np.searchsorted(spent, capacity, side="right"))
    low += np.bincount(row[:num_fitting], minlength=num_prompts)
    return _fill(steps, low, capacity - steps.total_cost(low))


def _fill(steps: Steps, taken: IntArray, left: float) -> IntArray:
    """Go on, past steps that do not fit, with the best of those that do."""
    next_cost = np.where(taken == 0, steps.first_cost, steps.cost)
    rows = np.flatnonzero((taken < steps.limit) & (next_cost <= left))
    if not len(rows):
        return taken
    values = steps.value(rows, taken[rows])
    queue = [(-value, taken[row], steps.prompt_ids[row], row) for row, value in zip(rows.tolist(), values, strict=True)]
    heapq.heapify(queue)
    while queue:
        _, step, prompt_id, row = heapq.heappop(queue)
        cost = (steps.first_cost if step == 0 else steps.cost)[row]
        if cost > left:
            continue  # what is left only shrinks: this prompt is done
        taken[row] += 1
        left -= cost
        if taken[row] < steps.limit:
            value = steps.value(np.array([row]), taken[[row]])[0]
            heapq.heappush(queue, (-value, taken[row], prompt_id, row))
    return taken


def _median_value(steps: Steps, low: IntArray, high: IntArray) -> float:
    """Return the median of the values halfway between `low` and `high`, each counted `high − low` times."""
    values = steps.value(np.arange(len(low)), (low + high) // 2)
    order = np.argsort(values)
    counts = np.cumsum((high - low)[order])
    return float(values[order[np.searchsorted(counts, counts[-1] / 2)]])


def _steps_above(level: float, steps: Steps, low: IntArray, high: IntArray) -> IntArray:
    """Return, by bisection within `[low, high]`, the numbers of steps that take every value above `level`."""
    rows = np.arange(len(low))
    while (low < high).any():
        middle = (low + high) // 2
        above = steps.value(rows, middle) > level
        low = np.where(above & (low < high), middle + 1, low)
        high = np.where(above, high, middle)
    return low
