"""Share a rollout budget over the prompts of a batch in exact integers.

Unlike the paper's code, the sizes add up to the budget and stay within their bounds for every batch, a short last one
too, and they depend on the prompts' ids only, never on their order: every rank and every rerun gets the same.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from dynamo_lightning.allocation.records import AllocationProblem, Estimate, FloatArray, IntArray
from dynamo_lightning.allocation.rules import SMALLEST_GROUP, AllocationRule
from dynamo_lightning.allocation.variance import (
    best_variance_ratio,
    leave_one_out_variance,
    sample_bernoulli_variance,
    variance_ratio,
)
from dynamo_lightning.errors import UserError

__all__ = [
    "Cost",
    "allocate_rollouts",
    "best_variance_ratio",
    "leave_one_out_variance",
    "sample_bernoulli_variance",
    "variance_ratio",
]

Cost = Literal["rollouts", "tokens"]


def allocate_rollouts(
    estimate: Estimate | ArrayLike,
    prompt_ids: ArrayLike,
    budget: int,
    min_rollouts: int,
    max_rollouts: int,
    rule: AllocationRule,
    cost: Cost = "rollouts",
    accept_skip_bias: bool = False,
) -> IntArray:
    """Return how many rollouts each prompt gets, `n_i`: `min_rollouts ≤ n_i ≤ max_rollouts`, always.

    With `cost="rollouts"` they add up to the budget: `Σ n_i = B`. With `cost="tokens"` the expected tokens stay within
    it, `Σ n_i E[T_i] ≤ B · mean E[T]`, and gains are compared per expected token; what is left would not pay for one
    more response of any prompt below its cap. (Unequal costs make a knapsack: greedy is then optimal but for the value
    of that one response.) As long as no length was seen at all, in the first batch, all count as equally long.

    Args:
        estimate: What is expected of each prompt; or only its variance `E[p(1 − p)]`, `[num_prompts]`. Only proportions
            of the variances count; they are floored at 1e-6, success rates kept as far from 0 and 1, so if all are 0
            the prompts get equal shares.
        prompt_ids: Distinct ids, `[num_prompts]`; they break ties.
        budget: Rollouts of the whole batch, `B`.
        min_rollouts: Smallest group size, at least `rule.minimum_group_size`. With 0 a prompt gets no rollouts or at
            least two; the gradient is then a mean over the prompts that are generated.
        max_rollouts: Largest group size.
        rule: What the group sizes minimise.
        cost: What the budget counts.
        accept_skip_bias: Whether a rule that promises an unbiased gradient may skip prompts all the same.

    Returns:
        Group sizes, `[num_prompts]`, in the order of the prompts.

    Raises:
        UserError: If the bounds contradict each other, the rule or the budget, an id occurs twice, what the rule uses
            is missing, out of range or not finite, or the budget counts tokens and the estimate has no lengths.
    """
    prompt_ids = np.asarray(prompt_ids, dtype=np.int64)
    if not isinstance(estimate, Estimate):
        weights = np.asarray(estimate, dtype=np.float64)
        estimate = Estimate(np.full(weights.shape, np.nan), weights, np.zeros(weights.shape, dtype=bool))
    assert prompt_ids.ndim == 1 and estimate.bernoulli_variance.shape == prompt_ids.shape, prompt_ids.shape
    num_prompts = len(prompt_ids)

    ids, counts = np.unique(prompt_ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"prompt id {ids[counts > 1][0]} occurs {counts.max()} times in one batch")
    _check_bounds(num_prompts, budget, min_rollouts, max_rollouts, rule, accept_skip_bias)
    used = getattr(estimate, rule.uses)
    bad = ~(np.isfinite(used) & (used >= 0))
    if bad.any():
        raise UserError(
            f"{type(rule).__name__} needs a {rule.uses} that is finite and at least 0, prompt id {prompt_ids[bad][0]} "
            f"has {used[bad][0]}"
        )
    costs = _token_costs(estimate, prompt_ids, rule) if cost == "tokens" else np.ones(num_prompts)
    problem = AllocationProblem(estimate.floored(), prompt_ids, costs, budget, min_rollouts, max_rollouts)
    sizes = rule.allocate(problem)
    assert not problem.counts_rollouts or sizes.sum() == budget
    assert float((sizes * costs).sum()) <= problem.capacity * (1 + 1e-6)
    assert num_prompts == 0 or (min_rollouts <= sizes.min() and sizes.max() <= max_rollouts)
    return sizes


def _check_bounds(
    num_prompts: int, budget: int, min_rollouts: int, max_rollouts: int, rule: AllocationRule, accept_skip_bias: bool
) -> None:
    """Raise a ValueError if no allocation, or none that the rule allows, meets the bounds and the budget."""
    name, least = type(rule).__name__, rule.minimum_group_size
    if min_rollouts == 0 and rule.skipping_biases and not accept_skip_bias:
        raise UserError(
            f"data.min_rollouts=0 leaves prompts out, and the gradient that {name} keeps unbiased becomes biased: set "
            f"data.accept_skip_bias=true to accept that, or data.min_rollouts to at least {least}"
        )
    if min_rollouts < least and not (min_rollouts == 0 and rule.skips):
        raise UserError(f"data.min_rollouts={min_rollouts} is less than {least}, which {name} needs")
    if max(min_rollouts, SMALLEST_GROUP if min_rollouts == 0 else 0) > max_rollouts:
        raise UserError(f"data.min_rollouts={min_rollouts} is more than data.max_rollouts={max_rollouts} allows")
    if not num_prompts * min_rollouts <= budget <= num_prompts * max_rollouts:
        raise UserError(
            f"a budget of {budget} rollouts (data.rollouts_per_prompt times {num_prompts} prompts) is not between "
            f"{num_prompts} × {min_rollouts} (data.min_rollouts) = {num_prompts * min_rollouts} and "
            f"{num_prompts} × {max_rollouts} (data.max_rollouts) = {num_prompts * max_rollouts}"
        )
    if min_rollouts == 0 and (budget == 1 or (max_rollouts == SMALLEST_GROUP and budget % 2)):
        raise UserError(
            f"a budget of {budget} rollouts cannot be split into groups of {SMALLEST_GROUP} to "
            f"{max_rollouts} (data.max_rollouts), which data.min_rollouts=0 asks for"
        )


def _token_costs(estimate: Estimate, prompt_ids: IntArray, rule: AllocationRule) -> FloatArray:
    """Return the expected tokens of one response of each prompt; 1 for all as long as no length was seen."""
    if not rule.counts_tokens:
        raise UserError(f"data.cost=tokens does not apply to {type(rule).__name__}, which counts rollouts only")
    lengths = estimate.response_length
    if lengths is None:
        raise UserError("data.cost=tokens needs expected response lengths, the estimate has none")
    if np.isnan(lengths).all() or ((lengths == lengths[0]).all() and lengths[0] > 0):
        return np.ones(len(lengths))
    bad = ~(np.isfinite(lengths) & (lengths > 0))
    if bad.any():
        raise UserError(
            f"expected response lengths must be finite and positive, prompt id {prompt_ids[bad][0]} has "
            f"{lengths[bad][0]}"
        )
    return lengths
