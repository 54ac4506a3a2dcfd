"""Predictive checks of the logit filter with features: its forecasts for unseen prompts hold in a single epoch."""

import math

import numpy as np
import pytest

from dynamo_lightning.allocation import LogitFilter, PromptStatistics
from dynamo_lightning.allocation.estimators.logit_filter import NODE_WEIGHTS, NODES, Shared

GROUP, BATCH, ITERATIONS, START = 8, 64, 60, 12
SUCCESSES = np.arange(GROUP + 1)
CHOOSE = np.array([math.comb(GROUP, k) for k in SUCCESSES])
BOTH = ["length", "dataset"]


def forecast(statistics, ids, features):
    """Probability of each number of successes of 8 rollouts of unseen prompts, `[num_prompts, 9]`."""
    estimator = statistics.estimator
    state = statistics._gather(ids).state
    if features is not None:
        state = estimator.with_features(state, features)
    _, vector = statistics._pool.ahead(state)
    shared = Shared.unpack(vector)
    offsets = shared.offsets(state) if features is not None else np.zeros(len(ids))
    logits = (shared.next_logits[:, None] + estimator.common_drift * NODES)[None] + offsets[:, None, None]
    rate, chances = 1 / (1 + np.exp(-logits)), estimator.posterior(state, np.zeros(len(ids)), tuple(vector))
    powers = [rate**k * (1 - rate) ** (GROUP - k) for k in SUCCESSES]
    return CHOOSE * np.stack([np.einsum("ng,ngq,q->n", chances, power, NODE_WEIGHTS) for power in powers], axis=1)


def simulate(seed, names):
    """Randomized probability integral transforms of unseen prompts, their logits by feature, weights and true ones."""
    rng = np.random.default_rng(seed)
    size = BATCH * ITERATIONS
    x, second = rng.normal(0, 1, size), rng.random(size) < 0.4
    explained = 1.5 * x + 2 * second
    theta = -1 + explained + rng.normal(0, 1.5, size)
    features = np.stack([4.5 + 0.5 * x, np.where(second, 7.0, 9.0)], axis=1)
    statistics, values, weights = PromptStatistics(LogitFilter(features=names)), [], []
    for iteration in range(ITERATIONS):
        ids = np.arange(BATCH) + BATCH * iteration
        given = features[ids] if names else None
        rates = 1 / (1 + np.exp(-theta[ids] - 0.03 * iteration))
        k = rng.binomial(GROUP, rates)
        if iteration >= START:
            chances, estimate = forecast(statistics, ids, given), statistics.estimate(ids, iteration, given)
            np.testing.assert_allclose(chances @ SUCCESSES / GROUP, estimate.success_rate, rtol=1e-9)
            rows = np.arange(BATCH)
            values.append(chances.cumsum(axis=1)[rows, k] - rng.random(BATCH) * chances[rows, k])
            weights.append([estimate.bernoulli_variance.mean(), (rates * (1 - rates)).mean()])
        statistics.observe(ids, k, np.full(BATCH, GROUP), iteration, features=given)
    return np.concatenate(values), explained[BATCH * START :], np.array(weights)


def worst_chi_square(values, explained):
    """Largest χ² of ten bins, over the quarters of the pool by what the features explain."""
    quarters = np.array_split(values[np.argsort(explained)], 4)
    counts = [(np.histogram(part, bins=10, range=(0, 1))[0], len(part) / 10) for part in quarters]
    return max(((count - expected) ** 2 / expected).sum() for count, expected in counts)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forecasts_for_unseen_prompts_are_calibrated_whatever_their_features(seed):
    values, explained, weights = simulate(seed, BOTH)
    assert abs(values.mean() - 0.5) < 3.5 / math.sqrt(12 * len(values))
    assert worst_chi_square(values, explained) < 31  # nine degrees of freedom, 99.9 % for the largest of four: 31
    assert weights[:, 0].mean() == pytest.approx(weights[:, 1].mean(), rel=0.05)


def test_without_features_the_same_check_fails():
    values, explained, _ = simulate(0, [])
    assert worst_chi_square(values, explained) > 100
