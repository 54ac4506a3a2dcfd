"""Group sizes of 0: a prompt gets none or at least two, the budget is met exactly, and bias has to be accepted."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynamo_lightning.allocation import (
    Estimate,
    NeymanRule,
    ProportionalRule,
    RLOORule,
    SignalRule,
    UniformRule,
    allocate_rollouts,
)

RULES = [RLOORule(), NeymanRule(), SignalRule()]


def estimate_of(rates):
    rates = np.asarray(rates, dtype=np.float64)
    lengths = np.linspace(10, 90, len(rates))
    return Estimate(rates, rates * (1 - rates), np.zeros(len(rates), dtype=bool), lengths)


def skip(estimate, ids, budget, high, rule, **options):
    return allocate_rollouts(estimate, ids, budget, 0, high, rule, accept_skip_bias=True, **options)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rule=st.sampled_from(RULES))
def test_groups_have_none_or_at_least_two_and_the_budget_is_met(data, rule):
    rates = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=12))
    high = data.draw(st.integers(2, 40))
    budget = data.draw(st.integers(2, len(rates) * high))
    assume(high > 2 or budget % 2 == 0)
    sizes = skip(estimate_of(rates), range(len(rates)), budget, high, rule)
    assert sizes.sum() == budget
    assert sizes.max() <= high and not (sizes == 1).any()
    tokens = skip(estimate_of(rates), range(len(rates)), budget, high, rule, cost="tokens")
    lengths = estimate_of(rates).response_length
    assert (tokens * lengths).sum() <= budget * lengths.mean() * (1 + 1e-6)
    assert tokens.max() <= high and not (tokens == 1).any()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rule=st.sampled_from(RULES), seed=st.integers(0, 99))
def test_the_order_of_the_prompts_does_not_matter(data, rule, seed):
    rates = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=9)))
    high = data.draw(st.integers(3, 9))
    budget = data.draw(st.integers(2, len(rates) * high))
    order = np.random.default_rng(seed).permutation(len(rates))
    ids = np.arange(len(rates)) * 10
    sizes = skip(estimate_of(rates), ids, budget, high, rule)
    assert skip(estimate_of(rates[order]), ids[order], budget, high, rule).tolist() == sizes[order].tolist()


def test_prompts_that_teach_nothing_are_skipped():
    for rule in RULES:
        assert skip(estimate_of([0.0, 0.5, 1.0, 0.5]), range(4), 32, 20, rule).tolist() == [0, 16, 0, 16]


def test_the_jump_is_worth_the_average_gain_of_two_rollouts():
    # signal: both get pq²·pq per rollout, then less. 0.5: .03125 for the jump and the third, .0156 for the fourth …
    assert SignalRule().group_gain(estimate_of([0.5]), 2)[0] / 2 == pytest.approx(0.03125)
    for rule in RULES:
        jump = rule.group_gain(estimate_of([0.1, 0.5, 0.9]), 2) / 2
        assert (jump >= rule.marginal_gain(estimate_of([0.1, 0.5, 0.9]), np.full(3, 2)) * (1 - 1e-12)).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_signal_is_optimal_where_the_budget_ends_between_jumps(data):
    # Greedy by average gain is no optimum in general: the last rollout may not be enough for the jump that is next.
    num_prompts = data.draw(st.integers(1, 4))
    budget = data.draw(st.integers(2, min(16, 8 * num_prompts)))
    rates = np.array(data.draw(st.lists(st.floats(0.05, 0.95), min_size=num_prompts, max_size=num_prompts)))

    def value(n):
        return (rates * (1 - rates) ** 2 * np.where(n > 0, 1 - rates**n - (1 - rates) ** n, 0)).sum()

    sizes = skip(estimate_of(rates), range(num_prompts), budget, 8, SignalRule())
    groups = [0, *range(2, 9)]
    every = [np.array(n) for n in itertools.product(groups, repeat=num_prompts) if sum(n) == budget]
    best = max(value(n) for n in every)
    steps = sorted(
        [(-r * (1 - r) ** 2 * r * (1 - r) * (1 + 1e-12), 0, i) for i, r in enumerate(rates)]
        + [
            (-r * (1 - r) ** 2 * (r**n * (1 - r) + (1 - r) ** n * r), n, i)
            for n in range(2, 8)
            for i, r in enumerate(rates)
        ]
    )
    left, missed = budget, 0.0
    for gain, n, _ in steps:
        if left == 0:
            break
        if n == 0 and left < 2:
            missed = -gain
            break
        left -= 2 if n == 0 else 1
    assert value(sizes) <= best + 1e-12
    if missed == 0.0:
        assert value(sizes) == pytest.approx(best)


def test_the_last_rollout_makes_another_group_when_all_are_full():
    # Two groups of 3 take 6 of 7: one gives a rollout back, and the best of the skipped prompts gets two.
    assert skip(estimate_of([0.5, 0.5, 0.001, 0.01]), range(4), 7, 3, RLOORule()).tolist() == [2, 3, 0, 2]


@pytest.mark.parametrize("rule", [RLOORule(), NeymanRule()], ids=lambda rule: type(rule).__name__)
def test_rules_of_least_variance_refuse_to_skip_unless_bias_is_accepted(rule):
    with pytest.raises(ValueError, match=r"data.min_rollouts=0 leaves prompts out.*data.accept_skip_bias=true"):
        allocate_rollouts(estimate_of([0.1, 0.5]), [1, 2], 16, 0, 16, rule)


def test_signal_promises_no_unbiased_gradient_and_skips_freely():
    assert allocate_rollouts(estimate_of([1.0, 0.5]), [1, 2], 16, 0, 16, SignalRule()).tolist() == [0, 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": UniformRule()}, "data.min_rollouts=0 is less than 1, which UniformRule needs"),
        ({"rule": ProportionalRule()}, "data.min_rollouts=0 is less than 1, which ProportionalRule needs"),
        ({"budget": 1}, "1 rollouts cannot be split into groups of 2"),
        ({"budget": 3, "max_rollouts": 2}, "3 rollouts cannot be split into groups of 2 to 2"),
        ({"max_rollouts": 1}, "data.min_rollouts=0 is more than data.max_rollouts=1 allows"),
    ],
)
def test_impossible_requests_are_refused(changes, message):
    request = {"budget": 8, "min_rollouts": 0, "max_rollouts": 8, "rule": SignalRule(), "accept_skip_bias": True}
    with pytest.raises(ValueError, match=message):
        allocate_rollouts(estimate_of([0.1, 0.5]), [1, 2], **{**request, **changes})
