"""Allocation is exact: checked against brute force, by hand, and for invariants on random problems."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_lightning.allocation import (
    AllocationRule,
    Estimate,
    MarginalGainRule,
    NeymanRule,
    ProportionalRule,
    RLOORule,
    SignalRule,
    UniformRule,
    allocate_rollouts,
    best_variance_ratio,
    leave_one_out_variance,
    sample_bernoulli_variance,
    variance_ratio,
)

RULES = [RLOORule(), NeymanRule(), SignalRule(), ProportionalRule(), UniformRule()]
OBJECTIVES = {
    RLOORule: lambda e, n: (e.bernoulli_variance / (n - 1)).sum(),
    NeymanRule: lambda e, n: (e.bernoulli_variance / n).sum(),
    SignalRule: lambda e, n: (
        -e.success_rate * (1 - e.success_rate) ** 2 * (1 - e.success_rate**n - (1 - e.success_rate) ** n)
    ).sum(),
}
OPTIMAL = [RLOORule(), NeymanRule(), SignalRule()]


def estimate_of(rates):
    """What is expected of prompts whose success rates are known."""
    rates = np.asarray(rates, dtype=np.float64)
    return Estimate(rates, rates * (1 - rates), np.zeros(len(rates), dtype=bool))


def with_variance(variances):
    """What is expected of prompts with these variances, harder than they are easy."""
    variances = np.asarray(variances, dtype=np.float64)
    return Estimate(
        (1 - np.sqrt(np.maximum(1 - 4 * variances, 0))) / 2, variances, np.zeros(len(variances), dtype=bool)
    )


@st.composite
def problems(draw, max_prompts=12, max_range=40):
    """Estimate, ids, budget and bounds for which an allocation exists."""
    num_prompts = draw(st.integers(1, max_prompts))
    rate = st.one_of(st.just(0.0), st.just(0.5), st.just(1.0), st.floats(0, 1))
    rates = draw(st.lists(rate, min_size=num_prompts, max_size=num_prompts))
    ids = draw(st.lists(st.integers(0, 2**63 - 1), min_size=num_prompts, max_size=num_prompts, unique=True))
    low = draw(st.integers(2, 6))
    high = low + draw(st.integers(0, max_range))
    budget = draw(st.integers(num_prompts * low, num_prompts * high))
    return estimate_of(rates), np.array(ids), budget, low, high


def one_at_a_time(estimate, ids, budget, low, high, rule):
    """Slow reference: each rollout in turn to the largest gain, ties to the smaller group, then the smaller id."""
    sizes = np.full(len(ids), low)
    for _ in range(budget - sizes.sum()):
        gains = rule.marginal_gain(estimate.floored(), sizes)
        best = min((-gains[i], sizes[i], ids[i], i) for i in range(len(ids)) if sizes[i] < high)
        sizes[best[-1]] += 1
    return sizes


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_uniform_statistics_give_equal_allocation(rule):
    for weight in (0.25, 0.1, 1e-9, 0.0):
        assert allocate_rollouts(with_variance([weight] * 8), range(8), 128, 4, 48, rule).tolist() == [16] * 8


@pytest.mark.parametrize("rule", OPTIMAL, ids=lambda rule: type(rule).__name__)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_allocation_has_the_least_objective_of_all_integer_allocations(rule, data):
    num_prompts = data.draw(st.integers(1, 4))
    low = data.draw(st.integers(rule.minimum_group_size, 16 // num_prompts))
    budget = data.draw(st.integers(num_prompts * low, 16))
    high = data.draw(st.integers(-(-budget // num_prompts), 16))
    rates = data.draw(st.lists(st.floats(1e-5, 1 - 1e-5), min_size=num_prompts, max_size=num_prompts))
    estimate = estimate_of(rates)
    sizes = allocate_rollouts(estimate, range(num_prompts), budget, low, high, rule)
    objective = OBJECTIVES[type(rule)]
    every = (np.array(n) for n in itertools.product(range(low, high + 1), repeat=num_prompts) if sum(n) == budget)
    assert objective(estimate, sizes) <= min(objective(estimate, n) for n in every) + 1e-13


@settings(max_examples=60, deadline=None)
@given(problem=problems(), rule=st.sampled_from([*OPTIMAL, UniformRule()]))
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
    estimate, ids, *rest = problem
    order = np.random.default_rng(seed).permutation(len(ids))
    permuted = allocate_rollouts(estimate.take(order), ids[order], *rest, rule)
    np.testing.assert_array_equal(permuted, allocate_rollouts(estimate, ids, *rest, rule)[order])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_equal_prompts_share_what_is_left_over_by_prompt_id(rule):
    equal = with_variance([0.2] * 4)
    assert allocate_rollouts(equal, [30, 10, 40, 20], 18, 2, 9, rule).tolist() == [4, 5, 4, 5]


def test_equal_gains_go_to_the_smaller_group_first():
    # a/(n(n − 1)): 0.03/(3·2) = 0.005 = 0.01/(2·1), so of the two next rollouts at this level the group of 2 is first.
    weights = np.array([0.03, 0.01])
    assert RLOORule().marginal_gain(with_variance(weights), np.array([3, 2])).tolist() == [0.005, 0.005]
    assert allocate_rollouts(weights, [1, 2], 5, 2, 9, RLOORule()).tolist() == [3, 2]
    assert allocate_rollouts(weights, [1, 2], 6, 2, 9, RLOORule()).tolist() == [3, 3]
    assert allocate_rollouts(weights, [1, 2], 7, 2, 9, RLOORule()).tolist() == [4, 3]


@pytest.mark.parametrize("rule", [*OPTIMAL, UniformRule()], ids=lambda rule: type(rule).__name__)
def test_marginal_gains_strictly_fall(rule):
    for rate in (1e-6, 0.1, 0.5, 0.9, 1 - 1e-6):
        # With p = 1/2 a group of 1,000 lacks an outcome with probability 2^−999: below that, float64 ends.
        most = 1000 if isinstance(rule, SignalRule) else 5000
        sizes = np.arange(rule.minimum_group_size, most)
        assert (np.diff(rule.marginal_gain(estimate_of([rate] * len(sizes)), sizes)) < 0).all()


@pytest.mark.parametrize("rule", OPTIMAL, ids=lambda rule: type(rule).__name__)
def test_marginal_gain_is_the_fall_of_the_objective(rule):
    objective, estimate = OBJECTIVES[type(rule)], estimate_of([0.3])
    for size in range(2, 40):
        fall = objective(estimate, np.array([size])) - objective(estimate, np.array([size + 1]))
        assert rule.marginal_gain(estimate, np.array([size]))[0] == pytest.approx(fall, rel=1e-6)


def test_gains_that_do_not_strictly_fall_still_end_and_meet_the_budget():
    class FlatRule(MarginalGainRule):
        def marginal_gain(self, estimate, size):
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
        ({"estimate": [0.1, float("nan"), 0.1]}, r"bernoulli_variance that is finite .*, prompt id 8 has nan"),
        ({"estimate": [0.1, 0.1, -0.5]}, r"prompt id 9 has -0.5"),
        ({"estimate": [0.1, 0.1, float("inf")]}, r"prompt id 9 has inf"),
        ({"rule": SignalRule()}, r"SignalRule needs a success_rate that is finite .*, prompt id 7 has nan"),
        ({"cost": "tokens"}, r"data.cost=tokens needs expected response lengths, the estimate has none"),
    ],
)
def test_impossible_requests_are_refused_with_names_and_numbers(changes, message):
    request = {"estimate": [0.1, 0.2, 0.1], "prompt_ids": [7, 8, 9], "budget": 12, "min_rollouts": 2, "max_rollouts": 8}
    with pytest.raises(ValueError, match=message):
        allocate_rollouts(**{**request, "rule": RLOORule(), **changes})


def test_only_rloo_needs_two_rollouts():
    assert {type(rule).__name__: rule.minimum_group_size for rule in RULES} == {
        "RLOORule": 2,
        "NeymanRule": 1,
        "SignalRule": 1,
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
    assert min(seconds) < 0.1  # 5 ms on two idle cores; the margin is for busy ones


def test_signal_prefers_hard_prompts_to_easy_ones_of_the_same_variance():
    sizes = allocate_rollouts(estimate_of([0.2, 0.8, 0.5]), [1, 2, 3], 48, 2, 40, SignalRule())
    assert sizes[0] > sizes[1]
    # pq²(p²q + q²p) at n = 2: 0.2·0.64·0.16 = 0.02048, 0.8·0.04·0.16 = 0.00512, 0.5³·0.25 = 0.03125.
    gains = SignalRule().marginal_gain(estimate_of([0.2, 0.8, 0.5]), np.full(3, 2))
    np.testing.assert_allclose(gains, [0.02048, 0.00512, 0.03125])
    # At p = ½ every rollout more halves the chance that all are alike.
    assert SignalRule().marginal_gain(estimate_of([0.5]), np.array([12]))[0] == 0.03125 / 2**10


def test_signal_counts_groups_with_both_outcomes():
    rates, size = np.array([0.1, 0.5, 0.7]), 6
    estimate = estimate_of(rates)
    outcomes = np.array(list(itertools.product([0, 1], repeat=size)))
    k = outcomes.sum(axis=1)
    for row, p in enumerate(rates):
        both = (p**k * (1 - p) ** (size - k))[(k > 0) & (k < size)].sum()
        value = SignalRule().group_gain(estimate, size)[row]
        assert value == pytest.approx(p * (1 - p) ** 2 * both)


@pytest.mark.parametrize("prior", [(1, 1), (0.5, 0.5), (0.2, 0.2)])
def test_the_same_sizes_dealt_out_at_random_do_not_get_the_gain(prior):
    rng = np.random.default_rng(0)
    rates = rng.beta(*prior, 512)
    variances = rates * (1 - rates)
    sizes = allocate_rollouts(variances, range(512), 512 * 16, 4, 48, RLOORule())
    dealt = [variance_ratio(variances, rng.permutation(sizes)) for _ in range(20)]
    assert variance_ratio(variances, sizes) < 0.95
    # By Jensen's inequality unequal sizes that know nothing are worse than equal ones.
    assert min(dealt) > 1


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
