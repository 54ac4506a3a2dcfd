"""A pilot keeps the gradient unbiased as two estimators with fixed weights; pooled, it does not: by enumeration."""

import functools
import itertools
from dataclasses import replace
from math import comb

import numpy as np
import pytest
import torch

from dynamo_lightning.allocation import (
    BetaPosterior,
    NeymanRule,
    PaperBernoulli,
    PromptStatistics,
    RLOORule,
    RolloutBudget,
    allocate_commit,
    allocate_rollouts,
    pilot_weights,
    sample_bernoulli_variance,
)
from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.advantages import GRPO, RLOO, DrGRPO, WReinforce
from dynamo_lightning.losses.optimal_baseline import OptimalBaseline
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.types import GroupedRewards

RATES = np.array([0.1, 0.3, 0.5])
IDS = [10, 20, 30]
BUDGET, PILOT, LOW, HIGH = 24, 3, 5, 14
REQUEST = RolloutBudget(BUDGET // 3, LOW, HIGH, pilot=PILOT)


def chances(rate, size):
    return [comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(size + 1)]


def history():
    """Six rollouts of the first prompt, none of the others; an estimator that believes the little it has seen."""
    statistics = PromptStatistics(PaperBernoulli())
    statistics.observe(IDS[:1], [1], [6], 0)
    return statistics


def pilots():
    """Every outcome of the pilot: its chance, the successes and the commit sizes that follow from it."""
    before = history().estimate(IDS, 1)
    weights = pilot_weights(before, IDS, REQUEST)
    for successes in itertools.product(range(PILOT + 1), repeat=3):
        chance = np.prod([chances(rate, PILOT)[k] for rate, k in zip(RATES, successes, strict=True)])
        statistics = history()
        statistics.observe(IDS, successes, [PILOT] * 3, 1)
        estimate = statistics.estimate(IDS, 1)
        yield chance, successes, weights, allocate_commit(estimate, IDS, weights, REQUEST)


def expected_gradient(estimator):
    """Expectation over all pilot and commit outcomes, `[num_prompts]`.

    The policy is p = sigmoid(θ): the score is r − p, ∇J = p(1 − p), and the leave-one-out gradient of a group with k
    of n right is the sample covariance of reward and score, k(n − k)/(n(n − 1)).
    """
    total = np.zeros(3)
    for chance, successes, weights, sizes in pilots():
        for i, (rate, size) in enumerate(zip(RATES, sizes.tolist(), strict=True)):
            for k, commit_chance in enumerate(chances(rate, size)):
                total[i] += chance * commit_chance * estimator(successes[i], k, size, weights[i])
    return total


def gradient(k, n):
    return float(sample_bernoulli_variance(k, n))


def test_two_estimators_with_fixed_weights_are_unbiased():
    mixed = expected_gradient(lambda pilot, k, m, w: w * gradient(pilot, PILOT) + (1 - w) * gradient(k, m))
    np.testing.assert_allclose(mixed, RATES * (1 - RATES), rtol=1e-12)


def test_pooling_pilot_and_commit_is_biased():
    pooled = expected_gradient(lambda pilot, k, m, w: gradient(pilot + k, PILOT + m))
    bias = pooled / (RATES * (1 - RATES)) - 1
    assert (bias < -0.005).all()  # a pilot with both outcomes buys the rollouts that dilute it


def test_weights_that_look_at_the_pilot_are_biased():
    def by_final_size(pilot, k, m, w):
        return (PILOT - 1) / (PILOT + m - 2) * gradient(pilot, PILOT) + (m - 1) / (PILOT + m - 2) * gradient(k, m)

    bias = expected_gradient(by_final_size) / (RATES * (1 - RATES)) - 1
    assert (abs(bias) > 0.005).all()


def test_commit_sizes_depend_on_the_pilot_and_keep_budget_and_bounds():
    seen = set()
    for _, _, weights, sizes in pilots():
        seen.add(tuple(sizes.tolist()))
        assert sizes.sum() == BUDGET - 3 * PILOT
        assert sizes.min() >= max(2, LOW - PILOT) and sizes.max() <= HIGH - PILOT
        assert ((weights > 0) & (weights < 1)).all()
    assert len(seen) > 5


def test_weights_by_hand():
    # Without a history all are alike: 24 − 9 = 15 commit rollouts, 5 each, so w = 2/(2 + 4).
    unseen = PromptStatistics(BetaPosterior()).estimate(IDS, 0)
    weights = pilot_weights(unseen, IDS, REQUEST)
    np.testing.assert_allclose(weights, [1 / 3] * 3)


def test_weights_are_the_best_for_the_expected_commit_sizes():
    before = history().estimate(IDS, 1)
    weights = pilot_weights(before, IDS, REQUEST)
    sizes = allocate_rollouts(before, IDS, BUDGET - 3 * PILOT, max(2, LOW - PILOT), HIGH - PILOT, RLOORule())

    def variance(w):
        return w**2 / (PILOT - 1) + (1 - w) ** 2 / (sizes - 1)

    for other in np.linspace(0.01, 0.99, 99):
        assert (variance(weights) <= variance(np.full(3, other)) + 1e-15).all()


def test_commit_minimises_what_the_weights_leave():
    estimate = history().estimate(IDS, 1)
    weights = np.array([0.5, 0.1, 0.3])
    sizes = allocate_commit(estimate, IDS, weights, REQUEST)
    left = (1 - weights) ** 2 * estimate.bernoulli_variance
    every = (np.array(m) for m in itertools.product(range(2, 12), repeat=3) if sum(m) == 15)
    assert (left / (sizes - 1)).sum() == pytest.approx(min((left / (m - 1)).sum() for m in every))


def test_weights_do_not_depend_on_the_pilots_outcomes():
    weights = [tuple(weights.tolist()) for _, _, weights, _ in pilots()]
    assert len(set(weights)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pilot": 1}, "data.pilot=1 is less than 2, which leave-one-out advantages need"),
        ({"pilot": 7}, "data.pilot=7 leaves too little: 3 prompts need 2 more rollouts each.* budget is 24"),
        ({"max_rollouts": 4}, "data.pilot=3 leaves too little.*data.max_rollouts=4"),
        ({"min_rollouts": 0}, "data.pilot=3 .* does not go with data.min_rollouts=0"),
    ],
)
def test_impossible_pilots_are_refused(changes, message):
    request = replace(REQUEST, **changes)
    estimate = history().estimate(IDS, 1)
    with pytest.raises(ValueError, match=message):
        pilot_weights(estimate, IDS, request)
    with pytest.raises(ValueError, match=message):
        allocate_commit(estimate, IDS, [0.5] * 3, request)


def test_a_pilot_counts_tokens_too():
    estimate = replace(history().estimate(IDS, 1), response_length=np.array([10.0, 20.0, 60.0]))
    request = replace(REQUEST, cost="tokens")
    weights = pilot_weights(estimate, IDS, request)
    sizes = allocate_commit(estimate, IDS, weights, request)
    assert ((PILOT + sizes) * estimate.response_length).sum() <= BUDGET * 30


def cross_gradient(pilot, k, m, w):
    """Of rewards and scores r − p with the library's shared baselines, as a function of p."""
    rewards = torch.tensor([1.0] * pilot + [0.0] * (PILOT - pilot) + [1.0] * k + [0.0] * (m - k), dtype=torch.float64)
    is_pilot = torch.arange(PILOT + m) < PILOT
    scored = GroupedRewards(
        rewards.float(), (~is_pilot).long(), torch.full((PILOT + m,), 7), torch.arange(PILOT + m), is_pilot=is_pilot
    )
    advantages = RLOO().of(scored).double()
    share = torch.where(is_pilot, w / PILOT, (1 - w) / m)
    return lambda p: float((share * advantages * (rewards - p)).sum())


def expectation_of(gradient_of, request):
    """Expectation over all pilot and commit outcomes, `[num_prompts]`."""
    before, total = history().estimate(IDS, 1), np.zeros(3)
    weights = pilot_weights(before, IDS, request)
    for successes in itertools.product(range(PILOT + 1), repeat=3):
        chance = np.prod([chances(rate, PILOT)[k] for rate, k in zip(RATES, successes, strict=True)])
        statistics = history()
        statistics.observe(IDS, successes, [PILOT] * 3, 1)
        sizes = allocate_commit(statistics.estimate(IDS, 1), IDS, weights, request)
        for i, (rate, size) in enumerate(zip(RATES, sizes.tolist(), strict=True)):
            for k, commit_chance in enumerate(chances(rate, size)):
                total[i] += chance * commit_chance * gradient_of(successes[i], k, size, float(weights[i]))(rate)
    return total


@functools.cache
def cached_cross(pilot, k, m, w):
    return cross_gradient(pilot, k, m, w)


def test_cross_baselines_are_unbiased_though_the_pilot_decides_the_commits_size():
    request = replace(REQUEST, pilot_baseline="cross")
    found = expectation_of(cached_cross, request)
    np.testing.assert_allclose(found, RATES * (1 - RATES), rtol=1e-6)


def test_leave_one_out_of_both_parts_for_the_pilot_too_is_biased():
    """Guard: the pilot's baseline may not depend on the commit's size, else this is what comes of it."""
    request = replace(REQUEST, pilot_baseline="pooled")
    found = expectation_of(lambda pilot, k, m, w: lambda p: gradient(pilot + k, PILOT + m), request)
    assert (found / (RATES * (1 - RATES)) - 1 < -0.005).all()


def test_cross_weights_are_the_best_for_the_expected_commit_sizes():
    request = replace(REQUEST, pilot_baseline="cross")
    before = history().estimate(IDS, 1)
    weights = pilot_weights(before, IDS, request)
    m = allocate_rollouts(before, IDS, BUDGET - 3 * PILOT, max(2, LOW - PILOT), HIGH - PILOT, NeymanRule())

    def variance(w):
        return w**2 * (1 + 1 / m) / PILOT + (1 - w) ** 2 * (1 + 1 / (PILOT + m - 1)) / m

    for other in np.linspace(0.01, 0.99, 99):
        assert (variance(weights) <= variance(np.full(3, other)) + 1e-15).all()


def test_pooled_commit_sizes_are_those_of_one_group_less_the_pilot():
    request = replace(REQUEST, pilot_baseline="pooled")
    estimate = history().estimate(IDS, 1)
    sizes = allocate_commit(estimate, IDS, pilot_weights(estimate, IDS, request), request)
    whole = allocate_rollouts(estimate, IDS, BUDGET, LOW, HIGH, RLOORule())
    assert (PILOT + sizes).tolist() == whole.tolist()


def test_cross_baselines_by_hand():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    is_pilot = torch.tensor([True, True, False, False, False, False])
    scored = GroupedRewards(rewards, (~is_pilot).long(), torch.full((6,), 3), torch.arange(6), is_pilot=is_pilot)
    # Pilot: the commit's mean 3/4. Commit: 3/5 of the others are right if one is right itself, 4/5 if wrong.
    assert RLOO().of(scored).tolist() == pytest.approx([0.25, -0.75, 0.4, 0.4, -0.8, 0.4])


@pytest.mark.parametrize("advantage", [GRPO(), DrGRPO(), WReinforce()])
def test_advantages_that_a_pilot_would_bias_refuse_it(advantage):
    loss = PolicyLoss(advantage=advantage)
    loss.check_pilot(0)
    with pytest.raises(UserError, match=rf"{type(advantage).__name__} does not go with data.pilot=4"):
        loss.check_pilot(4)


def test_rloo_and_the_optimal_baseline_take_a_pilot():
    for advantage in (RLOO(), OptimalBaseline()):
        PolicyLoss(advantage=advantage).check_pilot(4)
