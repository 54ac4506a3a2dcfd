"""The arcsine filter by hand, against numerical integration, and as an estimator of populations it should know."""

import math

import numpy as np
import pytest

from dynamo_lightning.allocation import ArcsineKalman, PromptStatistics

UNIFORM = (math.pi / 4, math.pi**2 / 16 - 0.5)


def observed(k, n):
    return math.asin(math.sqrt((k + 0.375) / (n + 0.75)))


def test_an_unseen_prompt_takes_the_population():
    estimate = PromptStatistics(ArcsineKalman()).estimate([1], 0)
    assert estimate.success_rate[0] == pytest.approx(0.5)
    # p ~ U(0, 1) has E[p(1 − p)] = 1/6; a normal ψ of the same mean and variance comes close.
    assert estimate.bernoulli_variance[0] == pytest.approx((1 + math.exp(-8 * UNIFORM[1])) / 8)
    assert estimate.bernoulli_variance[0] == pytest.approx(1 / 6, rel=0.05)


def test_update_by_hand():
    estimator = ArcsineKalman(drift_variance=0.01)
    statistics = PromptStatistics(estimator)
    statistics.observe([5], [3], [4], 0)
    columns = statistics.state_dict()["columns"]
    assert columns["mean"].item() == pytest.approx(observed(3, 4))
    assert columns["variance"].item() == pytest.approx(1 / 18)
    statistics.observe([5], [1], [8], 3)  # the variance grew to 1/18 + 0.03; the new one has 1/34
    old, new = 1 / (1 / 18 + 0.03), 34
    columns = statistics.state_dict()["columns"]
    assert columns["mean"].item() == pytest.approx((old * observed(3, 4) + new * observed(1, 8)) / (old + new))
    assert columns["variance"].item() == pytest.approx(1 / (old + new))


def test_the_population_joins_as_a_prior():
    estimator = ArcsineKalman(drift_variance=0.01)
    state = np.array([[0.5], [0.02]])
    mean, variance = estimator.posterior(state, np.array([4.0]), UNIFORM)
    own, prior = 1 / 0.06, 1 / UNIFORM[1]
    assert mean[0] == pytest.approx((own * 0.5 + prior * UNIFORM[0]) / (own + prior))
    assert variance[0] == pytest.approx(1 / (own + prior))


def test_a_prompt_not_visited_for_long_returns_to_the_population():
    statistics = PromptStatistics(ArcsineKalman())
    statistics.observe([1], [16], [16], 0)
    seen = [statistics.estimate([1, 2], iteration).bernoulli_variance for iteration in (0, 100, 10**9)]
    assert seen[0][0] < seen[1][0] < seen[2][0]
    assert seen[2][0] == pytest.approx(seen[2][1], rel=1e-4)


def test_without_drift_time_does_not_matter():
    statistics = PromptStatistics(ArcsineKalman(drift_variance=0))
    statistics.observe([1], [3], [16], 0)
    now, later = statistics.estimate([1], 0), statistics.estimate([1], 10**6)
    assert now.bernoulli_variance[0] == later.bernoulli_variance[0]


@pytest.mark.parametrize("mean", [0.0, 0.1, 0.8, math.pi / 2])
@pytest.mark.parametrize("variance", [1e-4, 0.02, 0.3])
def test_moments_are_exact_for_a_normal_angle_whose_tails_are_reflected(mean, variance):
    psi = mean + math.sqrt(variance) * np.linspace(-9, 9, 200_001)
    density = np.exp(-((psi - mean) ** 2) / (2 * variance))
    p = np.sin(psi) ** 2
    flat = (mean, 1e12)  # a population that says nothing
    estimator, state, now = ArcsineKalman(), np.array([[mean], [variance]]), np.zeros(1)
    expected = (density * p).sum() / density.sum(), (density * p * (1 - p)).sum() / density.sum()
    assert estimator.success_rate(state, now, flat)[0] == pytest.approx(expected[0], abs=1e-9)
    assert estimator.bernoulli_variance(state, now, flat)[0] == pytest.approx(expected[1], abs=1e-9)


def test_means_stay_within_the_quarter_circle_and_weights_within_their_range():
    rng = np.random.default_rng(0)
    statistics = PromptStatistics(ArcsineKalman())
    for iteration in range(50):
        counts = rng.integers(1, 64, 200)
        successes = np.where(rng.random(200) < 0.8, rng.choice([0, 1], 200) * counts, rng.binomial(counts, 0.5))
        statistics.observe(np.arange(200), successes, counts, iteration)
        estimate = statistics.estimate(np.arange(201), iteration + 1)
        assert ((estimate.bernoulli_variance > 0) & (estimate.bernoulli_variance <= 0.25)).all()
        assert ((estimate.success_rate > 0) & (estimate.success_rate < 1)).all()
    mean = statistics.state_dict()["columns"]["mean"]
    assert 0 <= mean.min() and mean.max() <= math.pi / 2


def test_the_population_is_fitted_to_the_prompts():
    rng = np.random.default_rng(0)
    angles = rng.normal(0.7, 0.15, 20_000)
    counts = rng.integers(4, 49, 20_000)
    statistics = PromptStatistics(ArcsineKalman())
    statistics.observe(np.arange(20_000), rng.binomial(counts, np.sin(angles) ** 2), counts, 0)
    mean, variance = statistics.population
    assert mean == pytest.approx(0.7, abs=0.01)
    assert variance == pytest.approx(0.15**2, rel=0.1)


def test_the_fit_is_not_misled_by_allocation():
    rng = np.random.default_rng(0)
    angles = np.clip(rng.normal(0.6, 0.2, 20_000), 0, math.pi / 2)
    rates = np.sin(angles) ** 2
    statistics = PromptStatistics(ArcsineKalman())
    counts = np.where(abs(rates - 0.5) < 0.3, 48, 8)
    statistics.observe(np.arange(20_000), rng.binomial(counts, rates), counts, 0)
    assert statistics.population[0] == pytest.approx(angles.mean(), abs=0.02)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (([1, 2], [4, 2], [30, 30]), UNIFORM),  # fewer than 64 rollouts
        (([1], [40], [80]), UNIFORM),  # one prompt has no spread
        ((range(50), [8] * 50, [16] * 50), (math.pi / 4, 0.0025)),  # no more spread than noise
        ((range(50), [0, 512] * 25, [512] * 50), (math.pi / 4, pytest.approx(math.pi**2 / 16, rel=0.1))),  # two peaks
    ],
)
def test_population_at_the_edges(outcomes, expected):
    statistics = PromptStatistics(ArcsineKalman())
    statistics.observe(*outcomes, 0)
    mean, variance = statistics.population
    assert mean == pytest.approx(expected[0])
    assert variance == expected[1]
    assert variance <= math.pi**2 / 16


@pytest.mark.parametrize("drift_variance", [-1e-9, float("nan"), float("inf")])
def test_drift_variance_must_be_finite_and_not_negative(drift_variance):
    with pytest.raises(ValueError, match="drift_variance="):
        ArcsineKalman(drift_variance)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("mean", 1.6, r"'mean' has a value outside \[0, π/2\]"),
        ("mean", -0.1, "outside"),
        ("variance", 0.0, "'variance'"),
    ],
)
def test_corrupt_entries_are_refused(column, value, message):
    saved = PromptStatistics(ArcsineKalman())
    saved.observe([1, 2], [1, 2], [4, 4], 0)
    state = saved.state_dict()
    state["columns"][column][1] = value
    with pytest.raises(ValueError, match=message):
        PromptStatistics(ArcsineKalman()).load_state_dict(state)
