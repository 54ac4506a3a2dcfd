"""Budgets of tokens: never overspent, and as good as brute force but for the last response."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynamo_lightning.allocation import (
    BetaPosterior,
    Estimate,
    NeymanRule,
    PromptStatistics,
    ProportionalRule,
    RLOORule,
    SignalRule,
    UniformRule,
    allocate_rollouts,
)

RULES = [RLOORule(), NeymanRule(), SignalRule(), UniformRule()]


def estimate_of(rates, lengths):
    rates, lengths = np.asarray(rates, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    return Estimate(rates, rates * (1 - rates), np.zeros(len(rates), dtype=bool), lengths)


@st.composite
def problems(draw, max_prompts=12, max_range=40):
    """Estimate with lengths, ids, budget and bounds for which an allocation exists."""
    num_prompts = draw(st.integers(1, max_prompts))
    rates = draw(st.lists(st.floats(0, 1), min_size=num_prompts, max_size=num_prompts))
    length = st.one_of(st.just(100.0), st.floats(1, 5000))
    lengths = draw(st.lists(length, min_size=num_prompts, max_size=num_prompts))
    low = draw(st.integers(2, 6))
    high = low + draw(st.integers(0, max_range))
    budget = draw(st.integers(num_prompts * low, num_prompts * high))
    return estimate_of(rates, lengths), np.arange(num_prompts), budget, low, high


def one_at_a_time(estimate, ids, budget, low, high, rule):
    """Slow reference: of the prompts whose next response still fits, the one that gains most per token is next."""
    sizes, lengths = np.full(len(ids), low), estimate.response_length
    while True:
        left = budget * lengths.mean() * (1 + 1e-9) - (sizes * lengths).sum()
        gains = rule.per_cost(rule.marginal_gain(estimate.floored(), sizes), lengths)
        rows = [(-gains[i], sizes[i], ids[i]) for i in range(len(ids)) if sizes[i] < high and lengths[i] <= left]
        if not rows:
            return sizes
        sizes[min(rows)[-1]] += 1


@settings(max_examples=100, deadline=None)
@given(problem=problems(max_range=300), rule=st.sampled_from(RULES))
def test_expected_tokens_never_exceed_the_budget_and_leave_no_room_for_a_response(problem, rule):
    estimate, _, budget, low, high = problem
    lengths = estimate.response_length
    sizes = allocate_rollouts(*problem, rule, cost="tokens")
    left = budget * lengths.mean() - (sizes * lengths).sum()
    assert left >= -1e-6 * budget * lengths.mean()
    assert low <= sizes.min() and sizes.max() <= high
    assert (lengths[sizes < high] > left - 1e-6).all()


@settings(max_examples=100, deadline=None)
@given(problem=problems(), rule=st.sampled_from(RULES))
def test_allocation_equals_giving_one_response_at_a_time(problem, rule):
    lengths = problem[0].response_length
    assume(len(set(lengths.tolist())) == len(lengths) or (lengths == lengths[0]).all())  # ties: rounding decides
    sizes = allocate_rollouts(*problem, rule, cost="tokens")
    assert sizes.tolist() == one_at_a_time(*problem, rule).tolist()


@settings(max_examples=60, deadline=None)
@given(problem=problems(), rule=st.sampled_from(RULES), length=st.floats(1, 5000))
def test_equal_lengths_give_the_allocation_of_rollouts(problem, rule, length):
    estimate, *rest = problem
    estimate = replace(estimate, response_length=np.full(len(rest[0]), length))
    sizes = allocate_rollouts(estimate, *rest, rule, cost="tokens")
    assert sizes.tolist() == allocate_rollouts(estimate, *rest, rule).tolist()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_allocation_of_the_same_tokens_is_better_by_more_than_one_response(data):
    # A knapsack: brute force may beat greedy by filling the end of the budget better, but by no more than what the
    # first response that did not fit would have gained. Whatever greedy bought before that is the optimum for its cost.
    num_prompts = data.draw(st.integers(1, 4))
    low = data.draw(st.integers(2, 16 // num_prompts))
    budget = data.draw(st.integers(num_prompts * low, 16))
    high = data.draw(st.integers(-(-budget // num_prompts), 16))
    rates = data.draw(st.lists(st.floats(0.01, 0.99), min_size=num_prompts, max_size=num_prompts))
    lengths = np.array(data.draw(st.lists(st.integers(1, 9), min_size=num_prompts, max_size=num_prompts)), dtype=float)
    estimate, rule = estimate_of(rates, lengths), RLOORule()
    variances = estimate.bernoulli_variance
    sizes = allocate_rollouts(estimate, range(num_prompts), budget, low, high, rule, cost="tokens")
    capacity = budget * lengths.mean() + 1e-9

    def objective(n):
        return (variances / (n - 1)).sum()

    every = [np.array(n) for n in itertools.product(range(low, high + 1), repeat=num_prompts)]
    best = min(objective(n) for n in every if (n * lengths).sum() <= capacity)
    steps = sorted(
        (-variances[i] / (n * (n - 1)) / lengths[i], n, i) for i in range(num_prompts) for n in range(low, high)
    )
    prefix, missed = np.full(num_prompts, low), 0.0
    for _, n, i in steps:
        if (prefix * lengths).sum() + lengths[i] > capacity:
            missed = variances[i] / (n * (n - 1))
            break
        prefix[i] += 1
    assert objective(prefix) == pytest.approx(
        min(objective(n) for n in every if (n * lengths).sum() <= (prefix * lengths).sum() + 1e-9)
    )
    assert best - 1e-12 <= objective(sizes) <= objective(prefix) + 1e-12
    assert objective(sizes) <= best + missed + 1e-12
    if missed == 0.0:
        assert objective(sizes) == pytest.approx(best)


def test_short_responses_get_more_by_hand():
    # Both have variance 1/4; gains per token 0.25/(n(n − 1)) over 100 and 400; the budget is 8 · 250 = 2000 tokens.
    sizes = allocate_rollouts(estimate_of([0.5, 0.5], [100, 400]), [1, 2], 8, 2, 20, RLOORule(), cost="tokens")
    # 2 and 2 cost 1000. Short: 1/2, 1/6, 1/12, 1/20 … per 100; long: 1/8, 1/24 …: 3, 4, then long 3, short 5, 6.
    # That is 6 · 100 + 3 · 400 = 1800; a fourth long one does not fit, two more short ones do.
    assert sizes.tolist() == [8, 3]


def test_uniform_stays_uniform_whatever_the_lengths():
    estimate = estimate_of([0.5] * 3, [100, 400, 70])
    assert allocate_rollouts(estimate, [1, 2, 3], 24, 2, 20, UniformRule(), cost="tokens").tolist() == [8, 8, 8]


def test_the_first_batch_without_any_length_is_allocated_by_rollouts():
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe([1, 2], [4, 0], [8, 8], 0)  # outcomes but no lengths
    estimate = statistics.estimate([1, 2, 3], 1)
    by_tokens = allocate_rollouts(estimate, [1, 2, 3], 48, 4, 48, RLOORule(), cost="tokens")
    assert by_tokens.tolist() == allocate_rollouts(estimate, [1, 2, 3], 48, 4, 48, RLOORule()).tolist()
    assert by_tokens.sum() == 48


@pytest.mark.parametrize(
    ("estimate", "rule", "message"),
    [
        ([0.1, 0.2], RLOORule(), "data.cost=tokens needs expected response lengths, the estimate has none"),
        (estimate_of([0.1, 0.2], [5, np.nan]), RLOORule(), "finite and positive, prompt id 8 has nan"),
        (estimate_of([0.1, 0.2], [0, 5]), RLOORule(), "finite and positive, prompt id 7 has 0.0"),
        (estimate_of([0.1, 0.2], [5, 6]), ProportionalRule(), "data.cost=tokens does not apply to ProportionalRule"),
    ],
)
def test_costs_that_cannot_be_are_refused(estimate, rule, message):
    with pytest.raises(ValueError, match=message):
        allocate_rollouts(estimate, [7, 8], 16, 2, 20, rule, cost="tokens")
