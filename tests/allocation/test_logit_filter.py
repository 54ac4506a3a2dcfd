"""The logit filter by hand and against slow exact references in float64."""

import math

import numpy as np
import pytest

from dynamo_lightning.allocation import LogitFilter, PromptStatistics
from dynamo_lightning.allocation.estimators import logit_filter, population
from dynamo_lightning.allocation.estimators.logit_filter import Shared
from dynamo_lightning.errors import UserError

STILL = 1e-6  # logits per iteration: a policy that stands still


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def on_grid(prior, grid, k, n):
    """Exact `E[p]` and `E[p(1 − p)]` after k of n, for a policy that stands still."""
    p = sigmoid(grid)
    chances = prior * p**k * (1 - p) ** (n - k)
    return (chances * p).sum() / chances.sum(), (chances * p * (1 - p)).sum() / chances.sum()


def shared_of(statistics, iteration):
    """The shared record that estimates of `iteration` use."""
    pool = statistics._pool
    return Shared.unpack(pool.ahead(np.zeros((6, 0)))[1] if iteration > pool.iteration else pool.shared)


def still_filter():
    """Neither drift nor a refit: the prior stays that of p ~ U(0, 1)."""
    estimator = LogitFilter(common_drift=STILL, prompt_drift=STILL)
    estimator.em_steps = 0
    estimator.settings = dict
    return estimator


def test_an_unseen_prompt_of_a_new_run_has_a_uniform_success_rate():
    estimate = PromptStatistics(LogitFilter(common_drift=STILL)).estimate([1], 0)
    assert estimate.success_rate[0] == pytest.approx(1 / 2)
    assert estimate.bernoulli_variance[0] == pytest.approx(1 / 6, rel=2e-3)
    assert estimate.unseen.tolist() == [True]


def test_without_drift_the_posterior_is_the_binomial_one():
    statistics = PromptStatistics(still_filter())
    statistics.observe([1, 2, 3], [3, 0, 16], [4, 16, 16], 0)
    statistics.observe([1, 2], [1, 0], [4, 8], 1)
    statistics.observe([1], [5], [8], 7)
    estimate = statistics.estimate([1, 2, 3], 8)
    expected = [on_grid(population.UNIFORM_RATE, population.GRID, *kn) for kn in ((9, 16), (0, 24), (16, 16))]
    np.testing.assert_allclose(estimate.success_rate, [mean for mean, _ in expected], rtol=1e-4)
    np.testing.assert_allclose(estimate.bernoulli_variance, [variance for _, variance in expected], rtol=1e-4)
    # With p ~ U(0, 1) that is Beta(1 + 9, 1 + 7), but for the grid.
    assert estimate.success_rate[0] == pytest.approx(10 / 18, rel=1e-3)
    assert estimate.bernoulli_variance[0] == pytest.approx(10 * 8 / (18 * 19), rel=1e-3)


def test_old_outcomes_lose_information_like_a_random_walk():
    estimator = LogitFilter(prompt_drift=0.05)
    # 8 of 16: p̂ = 1/2, information 16/4 = 4; after 100 iterations 1/(1 + 0.0025 · 100 · 4) = 1/2 of it is left.
    state = np.array([8, 8, 0.8, 1.6, 0, 0])[:, None]
    after = estimator.update(state, np.array([2.0]), np.array([3.0]), np.array([100.0]))
    np.testing.assert_allclose(after[:, 0], [4, 4, 0.4, 0.8, 2, 1])
    # 0 of 48: p̂ = 1/98, information 48 · 97/98² = 0.485: 0.892 of it is left.
    hopeless = np.array([0, 48, 0, 0, 0, 0.0])[:, None]
    kept = 1 / (1 + 0.25 * 48 * 97 / 98**2)
    after = estimator.update(hopeless, np.zeros(1), np.ones(1), np.array([100.0]))
    np.testing.assert_allclose(after[:, 0], [0, 48 * kept, 0, 0, 0, 1])


def test_outcomes_of_a_moved_policy_keep_the_tails_exact_and_the_middle_close():
    """Counts of three visits at M = −1, 0 and 1, merged, against the product of the three binomial likelihoods."""
    estimator = LogitFilter(prompt_drift=STILL)
    visits = [(-1.0, 2, 8), (0.0, 3, 8), (1.0, 6, 8)]
    state = np.zeros((6, 1))
    for number, (common, k, n) in enumerate(visits):
        path = np.zeros(logit_filter.PATH_LENGTH)
        path[-1] = common
        state[4:, 0] = k, n - k
        state = estimator.fold(state, Shared(number, 0, path, population.UNIFORM_RATE).pack(), number)
    theta = np.linspace(-30, 30, 2401)
    merged = estimator.log_likelihood(state, np.zeros(1), theta)[0]
    exact = sum(
        -k * np.logaddexp(0, -theta - common) - (n - k) * np.logaddexp(0, theta + common) for common, k, n in visits
    )
    assert merged[0] == pytest.approx(exact[0], abs=1e-3) and merged[-1] == pytest.approx(exact[-1], abs=1e-3)
    weights = [np.exp(values - values.max()) for values in (merged, exact)]
    means = [(w * theta).sum() / w.sum() for w in weights]
    spreads = [math.sqrt((w * (theta - mean) ** 2).sum() / w.sum()) for w, mean in zip(weights, means, strict=True)]
    assert means[0] == pytest.approx(means[1], abs=0.03)  # the standard deviation is 0.5
    assert spreads[0] == pytest.approx(spreads[1], rel=0.06)


def test_the_step_of_m_is_the_most_probable_one():
    rng = np.random.default_rng(0)
    estimator = LogitFilter(common_drift=0.3)
    state = np.zeros((6, 200))
    state[:2] = rng.integers(0, 9, (2, 200))
    state[2:4] = 0.4 * state[:2]
    state[5] = rng.integers(1, 9, 200)
    state[4] = rng.integers(0, 9, 200)
    path = np.linspace(0.2, 0.5, logit_filter.PATH_LENGTH)  # a trend of 0.02
    shared = Shared(5, -2, path, population.UNIFORM_RATE)
    moved = Shared.unpack(estimator.advance(shared.pack(), 7, state, state, np.zeros(200)))
    prior = shared.weights * np.exp(estimator.log_likelihood(state, np.zeros(200), shared.thetas))
    prior /= prior.sum(axis=1, keepdims=True)
    steps = np.linspace(-2, 2, 4001)
    objective = []
    for step in steps:
        p = sigmoid(shared.thetas + 0.5 + step)
        evidence = (prior * p ** state[4][:, None] * (1 - p) ** state[5][:, None]).sum(axis=1)
        objective.append(np.log(evidence).sum() - (step - 2 * 0.02) ** 2 / (2 * 2 * 0.3**2))  # two iterations passed
    assert moved.common - 0.5 == pytest.approx(steps[np.argmax(objective)], abs=1e-3)
    assert moved.iteration == 7
    np.testing.assert_array_equal(moved.path[:-2], path[2:])
    assert moved.path[-2] == path[-1]


def test_the_filter_follows_the_exact_joint_filter():
    """Two prompts and M on a joint grid: exact but for the grid, over eight iterations."""
    size, steps = 49, np.linspace(-4, 4, 49)
    theta, prior = np.linspace(-6, 6, size), sigmoid(np.linspace(-6, 6, size))
    prior = prior * (1 - prior) / (prior * (1 - prior)).sum()
    drift = 0.4
    kernel = np.exp(-((steps[:, None] - steps) ** 2) / (2 * drift**2))
    kernel /= kernel.sum(axis=0)
    joint = np.zeros((len(steps), size, size))
    joint[len(steps) // 2] = np.outer(prior, prior)
    estimator = LogitFilter(common_drift=drift, prompt_drift=STILL)
    estimator.em_steps = 0
    statistics = PromptStatistics(estimator)
    p = sigmoid(steps[:, None] + theta)
    errors = []
    for iteration, outcomes in enumerate([(2, 6), (3, 6), (3, 7), (5, 7), (5, 8), (6, 8), (7, 8), (7, 8)]):
        joint = np.einsum("ab,bij->aij", kernel, joint)
        estimate = statistics.estimate([1, 2], iteration)
        exact = [(joint.sum(axis=axis) * p).sum() for axis in (2, 1)]
        exact_variance = [(joint.sum(axis=axis) * p * (1 - p)).sum() for axis in (2, 1)]
        errors.append(np.abs(estimate.success_rate - exact).max())
        errors.append(np.abs(estimate.bernoulli_variance - exact_variance).max())
        first, second = (p**k * (1 - p) ** (8 - k) for k in outcomes)
        joint *= first[:, :, None] * second[:, None, :]
        joint /= joint.sum()
        statistics.observe([1, 2], outcomes, [8, 8], iteration)
    assert errors[0] < 0.003 and max(errors) < 0.05


def test_all_prompts_move_with_those_that_were_visited():
    rng = np.random.default_rng(0)
    statistics = PromptStatistics(LogitFilter())
    theta = rng.normal(0, 1, 400)
    statistics.observe(np.arange(400), rng.binomial(16, sigmoid(theta)), np.full(400, 16), 0)
    before = statistics.estimate([399], 1).success_rate[0]
    for iteration in range(1, 11):  # the policy improves by 0.2 per iteration; prompt 399 is not visited again
        ids = rng.choice(399, 128, replace=False)
        rates = sigmoid(theta[ids] + 0.2 * iteration)
        statistics.observe(ids, rng.binomial(16, rates), np.full(128, 16), iteration)
    after = statistics.estimate([399], 11).success_rate[0]
    risen = math.log(after / (1 - after)) - math.log(before / (1 - before))
    assert risen == pytest.approx(2.0, abs=0.35)
    assert shared_of(statistics, 11).trend == pytest.approx(0.14, abs=0.04)  # 2 logits in 15 remembered steps


@pytest.mark.parametrize("rise", [9.0, -9.0])
def test_the_grid_follows_the_policy_over_any_distance(rise):
    rng = np.random.default_rng(0)
    statistics = PromptStatistics(LogitFilter(common_drift=0.4))
    theta = rng.normal(-math.copysign(4.5, rise), 0.5, 200)
    for iteration in range(61):
        ids = rng.choice(200, 100, replace=False)
        rates = sigmoid(theta[ids] + rise * iteration / 60)
        statistics.observe(ids, rng.binomial(8, rates), np.full(100, 8), iteration)
    estimate = statistics.estimate(np.arange(200), 61)
    now = sigmoid(theta + rise * 61 / 60)
    assert abs(estimate.success_rate.mean() - now.mean()) < 0.02
    assert abs(shared_of(statistics, 61).origin) >= 16  # the grid's center moved by at least 4 logits


def test_the_population_is_found_with_all_its_modes():
    rng = np.random.default_rng(0)
    theta = rng.choice([-4.0, 1.0], 4000, p=[0.7, 0.3]) + rng.normal(0, 0.2, 4000)
    statistics = PromptStatistics(LogitFilter())
    for iteration in range(10):
        ids = np.arange(400 * iteration, 400 * (iteration + 1))
        statistics.observe(ids, rng.binomial(16, sigmoid(theta[ids])), np.full(400, 16), iteration)
    shared = shared_of(statistics, 10)
    logits = shared.thetas + shared.common
    assert shared.weights[np.abs(logits - 1) <= 1].sum() == pytest.approx(0.3, abs=0.04)
    assert shared.weights[logits < -2.5].sum() == pytest.approx(0.7, abs=0.04)
    unseen = statistics.estimate([10**6], 10)
    true = sigmoid(theta)
    assert unseen.success_rate[0] == pytest.approx(true.mean(), abs=0.02)
    assert unseen.bernoulli_variance[0] == pytest.approx((true * (1 - true)).mean(), abs=0.01)


def test_em_reaches_the_maximum_of_the_likelihood():
    """Without smoothing and prior, many steps: no other distribution on the grid explains the outcomes better."""
    rng = np.random.default_rng(0)
    k = rng.binomial(12, sigmoid(rng.choice([-2.0, 2.0], 300)))
    p = sigmoid(population.GRID)
    log_likelihood = k[:, None] * np.log(p) + (12 - k)[:, None] * np.log1p(-p)
    weights = population.refit(np.full(65, 1 / 65), log_likelihood, 4000, prior_prompts=0, smoothing=0)
    likelihood = np.exp(log_likelihood)
    gradient = (likelihood / (likelihood @ weights)[:, None]).mean(axis=0)  # ≤ 1 everywhere at the maximum
    assert weights.sum() == pytest.approx(1)
    assert gradient.max() < 1.001


def test_a_shifted_grid_keeps_what_is_where():
    weights = population.UNIFORM_RATE
    right = population.shifted(weights, 3)
    np.testing.assert_allclose(right[1:-3], weights[4:], atol=1e-9)
    assert right[0] == pytest.approx(weights[:4].sum())
    assert right.sum() == pytest.approx(1) and (right > 0).all()
    np.testing.assert_allclose(population.shifted(weights, -2)[2:-1], weights[:-3], atol=1e-9)
    assert population.shifted(weights, 500)[0] == pytest.approx(1)


@pytest.mark.parametrize("name", ["common_drift", "prompt_drift"])
@pytest.mark.parametrize("value", [0, -0.1, float("nan"), float("inf")])
def test_drifts_must_be_positive_and_finite(name, value):
    with pytest.raises(UserError, match=rf"data\.estimator\.init_args\.{name}={value} must be a positive"):
        LogitFilter(**{name: value})


def test_estimates_stay_finite_and_within_their_range_for_extreme_outcomes():
    statistics = PromptStatistics(LogitFilter())
    for iteration in range(40):
        ids = np.arange(4)
        statistics.observe(ids, [0, 64, 1, 63], [64] * 4, 10 * iteration)
    for when in (391, 10**6):
        estimate = statistics.estimate(np.arange(5), when)
        assert ((estimate.bernoulli_variance > 0) & (estimate.bernoulli_variance <= 0.25)).all()
        assert ((estimate.success_rate > 0) & (estimate.success_rate < 1)).all()
