"""Predictive checks of the logit filter: its forecasts of success counts hold in simulated training."""

import math

import numpy as np
import pytest

from dynamo_lightning.allocation import LogitFilter, PromptStatistics
from dynamo_lightning.allocation.estimators.logit_filter import NODE_WEIGHTS, NODES, Shared

GROUP, BATCH = 8, 96
SUCCESSES = np.arange(GROUP + 1)
CHOOSE = np.array([math.comb(GROUP, k) for k in SUCCESSES])


def forecast(statistics, ids, iteration):
    """Probability of each number of successes of 8 rollouts, `[num_prompts, 9]`, before they are seen."""
    estimator = statistics.estimator
    rows = statistics._gather(ids)
    state, vector = statistics._pool.ahead(rows.state)
    chances = estimator.posterior(state, np.where(rows.known, iteration - rows.last_visit, 0.0), tuple(vector))
    rate = 1 / (1 + np.exp(-Shared.unpack(vector).next_logits[:, None] - estimator.common_drift * NODES))
    k = SUCCESSES[:, None, None]
    binomial = CHOOSE[:, None] * (rate**k * (1 - rate) ** (GROUP - k) * NODE_WEIGHTS).sum(axis=2)
    return chances @ binomial.T


def modes(rng, size):
    return rng.choice([-4.0, 0.0, 3.0], size, p=[0.5, 0.2, 0.3]) + rng.normal(0, 0.4, size)


def simulate(seed, move, pool=lambda rng, size: rng.normal(-1, 2.5, size), walk=0.05, iterations=80, start=16):
    """Forecasts and outcomes from iteration `start` on: `[num_visits, 9]`, `[num_visits]`, and the true p(1 − p)."""
    rng = np.random.default_rng(seed)
    theta, common = pool(rng, 600), 0.0
    statistics = PromptStatistics(LogitFilter())
    forecasts, outcomes, variances = [], [], []
    for iteration in range(iterations):
        ids = np.sort(rng.choice(600, BATCH, replace=False))
        common += move(rng)
        rates = 1 / (1 + np.exp(-theta[ids] - common))
        k = rng.binomial(GROUP, rates)
        if iteration >= start:
            forecasts.append(forecast(statistics, ids, iteration))
            outcomes.append(k)
            estimate = statistics.estimate(ids, iteration)
            np.testing.assert_allclose(forecasts[-1] @ SUCCESSES / GROUP, estimate.success_rate, rtol=1e-9)
            variances.append([estimate.bernoulli_variance.mean(), (rates * (1 - rates)).mean()])
        statistics.observe(ids, k, np.full(BATCH, GROUP), iteration)
        theta = theta + rng.normal(0, walk, len(theta))
    return np.concatenate(forecasts), np.concatenate(outcomes), np.array(variances)


def uniforms(forecasts, outcomes, rng):
    """The randomized probability integral transform: uniform on (0, 1) if the forecasts hold."""
    rows = np.arange(len(outcomes))
    chance = forecasts[rows, outcomes]
    return forecasts.cumsum(axis=1)[rows, outcomes] - rng.random(len(rows)) * chance


CASES = {
    "no drift": {"move": lambda rng: 0.0},
    "a rise of 2 logits": {"move": lambda rng: 0.025},
    "a rise of 4 logits": {"move": lambda rng: 0.05},
    "a random walk": {"move": lambda rng: rng.normal(0, 0.15)},
    "three modes, no drift": {"move": lambda rng: 0.0, "pool": modes},
    "three modes, a rise of 2 logits": {"move": lambda rng: 0.025, "pool": modes},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_forecasts_of_success_counts_are_calibrated(case):
    forecasts, outcomes, variances = simulate(0, **case)
    values = uniforms(forecasts, outcomes, np.random.default_rng(1))
    size = len(values)
    assert size == 6144
    # The mean within 3.5 standard errors; ten bins by χ² with nine degrees of freedom, 99.9 %: 27.9.
    assert abs(values.mean() - 0.5) < 3.5 / math.sqrt(12 * size)
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert ((counts - size / 10) ** 2 / (size / 10)).sum() < 27.9
    # Successes in all: the forecasts' mean and variance.
    mean = forecasts @ SUCCESSES
    spread = forecasts @ SUCCESSES**2 - mean**2
    assert abs((outcomes - mean).sum()) < 3.5 * math.sqrt(spread.sum())
    # The allocation's weight is right on average.
    assert variances[:, 0].mean() == pytest.approx(variances[:, 1].mean(), rel=0.05)


def test_intervals_cover_as_often_as_they_say():
    forecasts, outcomes, _ = simulate(3, lambda rng: 0.025)
    values = uniforms(forecasts, outcomes, np.random.default_rng(1))
    for level in (0.5, 0.8, 0.95):
        covered = np.abs(values - 0.5) < level / 2
        assert covered.mean() == pytest.approx(level, abs=3.5 * math.sqrt(level * (1 - level) / len(values)))


def test_the_checks_notice_a_filter_that_assumes_too_little_drift():
    """A filter that takes M for nearly constant fails the same check, so the check can fail."""
    rng = np.random.default_rng(0)
    statistics = PromptStatistics(LogitFilter(common_drift=0.002))
    theta, forecasts, outcomes = rng.normal(-1, 2.5, 600), [], []
    for iteration in range(60):
        ids = np.sort(rng.choice(600, BATCH, replace=False))
        k = rng.binomial(GROUP, 1 / (1 + np.exp(-theta[ids] - 0.05 * iteration)))
        if iteration >= 16:
            forecasts.append(forecast(statistics, ids, iteration))
            outcomes.append(k)
        statistics.observe(ids, k, np.full(BATCH, GROUP), iteration)
    values = uniforms(np.concatenate(forecasts), np.concatenate(outcomes), rng)
    assert values.mean() - 0.5 > 5 / math.sqrt(12 * len(values))
