"""Allocation is exact: checked against brute force, by hand, and for invariants on random problems."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_lightning.allocation import (
    AllocationRule,
    NeymanRule,
    ProportionalRule,
    RLOORule,
    UniformRule,
    allocate_rollouts,
    best_variance_ratio,
    leave_one_out_variance,
    sample_bernoulli_variance,
    variance_ratio,
)
from dynamo_lightning.allocation.rules import MarginalGainRule

RULES = [RLOORule(), NeymanRule(), ProportionalRule(), UniformRule()]
OBJECTIVES = {RLOORule: lambda a, n: (a / (n - 1)).sum(), NeymanRule: lambda a, n: (a / n).sum()}


@st.composite
def problems(draw, max_prompts=12, max_range=40):
    """Weights, ids, budget and bounds for which an allocation exists."""
    num_prompts = draw(st.integers(1, max_prompts))
    weight = st.one_of(st.just(0.0), st.just(0.25), st.floats(0, 0.25))
    weights = draw(st.lists(weight, min_size=num_prompts, max_size=num_prompts))
    ids = draw(st.lists(st.integers(0, 2**63 - 1), min_size=num_prompts, max_size=num_prompts, unique=True))
    low = draw(st.integers(2, 6))
    high = low + draw(st.integers(0, max_range))
    budget = draw(st.integers(num_prompts * low, num_prompts * high))
    return np.array(weights), np.array(ids), budget, low, high


def one_at_a_time(weights, ids, budget, low, high, rule):
    """Slow reference: each rollout in turn to the largest gain, ties to the smaller group, then the smaller id."""
    sizes = np.full(len(weights), low)
    for _ in range(budget - sizes.sum()):
        gains = rule.marginal_gain(np.maximum(weights, 1e-6), sizes)
        best = min((-gains[i], sizes[i], ids[i], i) for i in range(len(weights)) if sizes[i] < high)
        sizes[best[-1]] += 1
    return sizes


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_uniform_statistics_give_equal_allocation(rule):
    for weight in (0.25, 0.1, 1e-9, 0.0):
        assert allocate_rollouts([weight] * 8, range(8), 128, 4, 48, rule).tolist() == [16] * 8


@pytest.mark.parametrize("rule", [RLOORule(), NeymanRule()], ids=lambda rule: type(rule).__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_allocation_has_the_least_objective_of_all_integer_allocations(rule, data):
    num_prompts = data.draw(st.integers(1, 4))
    low = data.draw(st.integers(rule.minimum_group_size, 16 // num_prompts))
    budget = data.draw(st.integers(num_prompts * low, 16))
    high = data.draw(st.integers(-(-budget // num_prompts), 16))
    weights = np.array(data.draw(st.lists(st.floats(1e-6, 0.25), min_size=num_prompts, max_size=num_prompts)))
    sizes = allocate_rollouts(weights, range(num_prompts), budget, low, high, rule)
    objective = OBJECTIVES[type(rule)]
    every = (np.array(n) for n in itertools.product(range(low, high + 1), repeat=num_prompts) if sum(n) == budget)
    assert objective(weights, sizes) <= min(objective(weights, n) for n in every) * (1 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), rule=st.sampled_from([RLOORule(), NeymanRule(), UniformRule()]))
def test_allocation_equals_giving_one_rollout_at_a_time_ties_included(problem, rule):
    assert allocate_rollouts(*problem, rule).tolist() == one_at_a_time(*problem, rule).tolist()


@settings(max_examples=100, deadline=None)
@given(problem=problems(max_range=500), rule=st.sampled_from(RULES))
def test_budget_and_bounds_are_never_missed(problem, rule):
    _, _, budget, low, high = problem
    sizes = allocate_rollouts(*problem, rule)
    assert sizes.dtype == np.int64
    assert sizes.sum() == budget
    assert low <= sizes.min() and sizes.max() <= high


@settings(max_examples=60, deadline=None)
@given(problem=problems(), rule=st.sampled_from(RULES), seed=st.integers(0, 99))
def test_the_order_of_the_prompts_does_not_matter(problem, rule, seed):
    weights, ids, *rest = problem
    order = np.random.default_rng(seed).permutation(len(ids))
    permuted = allocate_rollouts(weights[order], ids[order], *rest, rule)
    np.testing.assert_array_equal(permuted, allocate_rollouts(weights, ids, *rest, rule)[order])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_equal_prompts_share_what_is_left_over_by_prompt_id(rule):
    assert allocate_rollouts([0.2] * 4, [30, 10, 40, 20], 18, 2, 9, rule).tolist() == [4, 5, 4, 5]


def test_equal_gains_go_to_the_smaller_group_first():
    # a/(n(n − 1)): 0.03/(3·2) = 0.005 = 0.01/(2·1), so of the two next rollouts at this level the group of 2 is first.
    weights = np.array([0.03, 0.01])
    assert RLOORule().marginal_gain(weights, np.array([3, 2])).tolist() == [0.005, 0.005]
    assert allocate_rollouts(weights, [1, 2], 5, 2, 9, RLOORule()).tolist() == [3, 2]
    assert allocate_rollouts(weights, [1, 2], 6, 2, 9, RLOORule()).tolist() == [3, 3]
    assert allocate_rollouts(weights, [1, 2], 7, 2, 9, RLOORule()).tolist() == [4, 3]


@pytest.mark.parametrize("rule", [RLOORule(), NeymanRule(), UniformRule()], ids=lambda rule: type(rule).__name__)
def test_marginal_gains_strictly_fall(rule):
    sizes = np.arange(rule.minimum_group_size, 5000)
    for weight in (1e-6, 0.1, 0.25):
        assert (np.diff(rule.marginal_gain(np.full(len(sizes), weight), sizes)) < 0).all()


@pytest.mark.parametrize("rule", [RLOORule(), NeymanRule()], ids=lambda rule: type(rule).__name__)
def test_marginal_gain_is_the_fall_of_the_objective(rule):
    objective, weight = OBJECTIVES[type(rule)], np.array([0.2])
    for size in range(2, 50):
        fall = objective(weight, np.array([size])) - objective(weight, np.array([size + 1]))
        assert rule.marginal_gain(weight, np.array([size]))[0] == pytest.approx(fall, rel=1e-9)


def test_gains_that_do_not_strictly_fall_still_end_and_meet_the_budget():
    class FlatRule(MarginalGainRule):
        def marginal_gain(self, variance, size):
            return np.zeros(len(size))

    assert allocate_rollouts([0.1, 0.2, 0.3], [1, 2, 3], 30, 2, 100, FlatRule()).tolist() == [10, 10, 10]


def test_rloo_follows_the_standard_deviation_by_hand():
    # √a = 0.5, 0.3, 0.1: without rounding n − 1 ∝ √a gives 1 + 27·(5, 3, 1)/9 = 16, 10, 4.
    assert allocate_rollouts([0.25, 0.09, 0.01], [1, 2, 3], 30, 2, 99, RLOORule()).tolist() == [16, 10, 4]


def test_neyman_follows_the_standard_deviation_by_hand():
    assert allocate_rollouts([0.25, 0.09, 0.01], [1, 2, 3], 36, 1, 99, NeymanRule()).tolist() == [20, 12, 4]


@pytest.mark.parametrize(
    ("weights", "budget", "low", "high", "expected"),
    [
        ([0.2, 0.1, 0.1], 14, 2, 20, [6, 4, 4]),  # 2 + 8·(1/2, 1/4, 1/4)
        ([0.2, 0.1, 0.1], 15, 2, 20, [7, 4, 4]),  # 2 + (4.5, 2.25, 2.25): one left, to the largest fraction
        ([0.1, 0.1, 0.1], 14, 2, 20, [5, 5, 4]),  # 2 + 2.67 each: two left, by prompt id
        ([0.2, 0.1, 0.1], 14, 2, 5, [5, 5, 4]),  # 4 capped at 3, the other 5 shared as 2.5 each
        ([0.2, 0.02, 0.02], 15, 2, 5, [5, 5, 5]),  # the budget fills every cap
        ([0.25, 0.0, 0.0], 20, 2, 12, [12, 4, 4]),  # what the capped prompt cannot take goes round the others
    ],
)
def test_proportional_by_hand(weights, budget, low, high, expected):
    assert allocate_rollouts(weights, [1, 2, 3], budget, low, high, ProportionalRule()).tolist() == expected


def test_unbounded_proportional_allocation_has_the_variance_of_equal_groups():
    weights = np.array([0.24, 0.12, 0.06, 0.06])
    sizes = allocate_rollouts(weights, range(4), 4 + 32, 1, 99, ProportionalRule()) - 1
    assert sizes.tolist() == [16, 8, 4, 4]
    assert (weights / sizes).sum() == pytest.approx((weights / 8).sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 5}, r"budget of 5 .*rollouts_per_prompt times 3.*3 × 2 \(data.min_rollouts\) = 6"),
        ({"budget": 25}, r"budget of 25 .*3 × 8 \(data.max_rollouts\) = 24"),
        ({"min_rollouts": 1}, r"data.min_rollouts=1 is less than 2, which RLOORule needs"),
        ({"min_rollouts": 9}, r"data.min_rollouts=9 is more than data.max_rollouts=8"),
        ({"min_rollouts": 0, "rule": UniformRule()}, r"data.min_rollouts=0 is less than 1"),
        ({"prompt_ids": [7, 8, 7]}, r"prompt id 7 occurs 2 times"),
        ({"weights": [0.1, float("nan"), 0.1]}, r"prompt id 8 has nan"),
        ({"weights": [0.1, 0.1, -0.5]}, r"prompt id 9 has -0.5"),
        ({"weights": [0.1, 0.1, float("inf")]}, r"prompt id 9 has inf"),
    ],
)
def test_impossible_requests_are_refused_with_names_and_numbers(changes, message):
    request = {"weights": [0.1, 0.2, 0.1], "prompt_ids": [7, 8, 9], "budget": 12, "min_rollouts": 2, "max_rollouts": 8}
    with pytest.raises(ValueError, match=message):
        allocate_rollouts(**{**request, "rule": RLOORule(), **changes})


def test_only_rloo_needs_two_rollouts():
    assert {type(rule).__name__: rule.minimum_group_size for rule in RULES} == {
        "RLOORule": 2,
        "NeymanRule": 1,
        "ProportionalRule": 1,
        "UniformRule": 1,
    }
    assert all(isinstance(rule, AllocationRule) for rule in RULES)
    assert allocate_rollouts([0.25, 1e-5], [1, 2], 4, 1, 3, NeymanRule()).tolist() == [3, 1]


def test_a_batch_of_4096_prompts_is_allocated_in_milliseconds():
    rng = np.random.default_rng(0)
    weights, ids = rng.uniform(0, 0.25, 4096), rng.permutation(4096)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        allocate_rollouts(weights, ids, 65_536, 2, 64, RLOORule())
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1  # 3 ms on two idle cores; the margin is for busy ones


def test_variance_of_an_allocation_by_hand():
    # (0.24/3 + 0.1/1)/4 = 0.045; equal groups of 3: (0.24 + 0.1)/2/4 = 0.0425.
    assert leave_one_out_variance([0.24, 0.1], [4, 2]) == pytest.approx(0.045)
    assert variance_ratio([0.24, 0.1], [4, 2]) == pytest.approx(0.045 / 0.0425)
    assert leave_one_out_variance([0.24, 0.1], [4, 1]) == float("inf")
    assert variance_ratio([0.24, 0.1], [4, 1]) == float("inf")
    assert variance_ratio([0.24, 0.1], [4, 3]) == pytest.approx((0.08 + 0.05) / (0.34 / 2.5))  # mean 3.5, not whole
    assert variance_ratio([0.24, 0.1], [1, 1]) == 1.0
    assert variance_ratio([0.0, 0.0], [4, 2]) == 1.0


def test_best_ratio_is_reached_without_bounds_and_never_undercut():
    weights = np.array([0.25, 0.09, 0.01])
    # (0.5 + 0.3 + 0.1)²/(3 · 0.35); 1/(1 + CV²) is the same number.
    assert best_variance_ratio(weights) == pytest.approx(0.81 / 1.05)
    assert best_variance_ratio(weights) == pytest.approx(1 / (1 + np.sqrt(weights).var() / 0.3**2))
    sizes = allocate_rollouts(weights, [1, 2, 3], 30, 2, 99, RLOORule())
    assert variance_ratio(weights, sizes) == pytest.approx(best_variance_ratio(weights))
    assert best_variance_ratio([0.0, 0.0]) == 1.0
    assert best_variance_ratio([0.2, 0.2]) == pytest.approx(1.0)


def test_sample_variance_is_unbiased():
    assert sample_bernoulli_variance([1, 0, 3, 1, 0], [2, 4, 4, 1, 0]).tolist() == [0.5, 0.0, 0.25, 0.0, 0.0]
    rate, size = 0.3, 5
    outcomes = np.arange(size + 1)
    chances = [len(list(itertools.combinations(range(size), k))) * rate**k * (1 - rate) ** (size - k) for k in outcomes]
    expected = (np.array(chances) * sample_bernoulli_variance(outcomes, np.full(size + 1, size))).sum()
    assert expected == pytest.approx(rate * (1 - rate))
