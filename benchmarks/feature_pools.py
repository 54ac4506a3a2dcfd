"""Unseen prompts with and without features: table `features` of `allocation.py`.

As table `drift` (`benchmarks/drifting_pools.py`): 1,100 prompts, 175 RL iterations of 32, 8 rollouts per prompt, sizes
2 to 24, pool N(−1, 3²). `explained` is the share of the logits' variance that a feature explains, the rest is normal.
The feature is the log-length (standard deviation 0.5 nats) or the data set (two of equal size). Besides the ratios,
`unseen_r2` is how much of the variance of p(1 − p) over the unseen prompts of the first epoch's second half the
weights explain, 1 − Σ(v − v̂)²/Σ(v − v̄)².
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import drifting_pools as pools
import numpy as np

from dynamo_lightning.allocation import LogitFilter, PromptStatistics, RLOORule, allocate_rollouts

NUM_PROMPTS, BATCH_SIZE, MEAN_SIZE, BOUNDS, ITERATIONS = 1100, 32, 8, (2, 24), 175
CODES = (11, 4242)
"""Codes of the two data sets."""


def pool(feature: str, explained: float, seed: int) -> tuple[pools.Array, pools.Array]:
    """Return logits, `[num_prompts]`, and features, `[num_prompts, 1]`: a log-length or a data set's code."""
    rng = np.random.default_rng([seed, 14])
    if feature == "length":
        x = rng.normal(0, 1, NUM_PROMPTS)
        features = 4.5 + 0.5 * x
    else:
        second = rng.permutation(NUM_PROMPTS) % 2
        x, features = 2.0 * second - 1, np.array(CODES, dtype=float)[second]
    theta = -1 + 3 * (math.sqrt(explained) * x + math.sqrt(1 - explained) * rng.normal(0, 1, NUM_PROMPTS))
    return theta, features[:, None]


def train(
    feature: str, explained: float, rise: float, arm: str, seed: int, iterations: int = ITERATIONS
) -> tuple[float, float, float]:
    """Return the ratio in the first epoch and after it, and R² for unseen prompts."""
    theta, features = pool(feature, explained, seed)
    rng = np.random.default_rng(seed + 1000)
    store = PromptStatistics(LogitFilter(features=[feature] if arm == "features" else []))
    queue: list[int] = []
    allocated, equal = np.zeros((2, iterations))
    unseen: list[pools.Array] = []
    first = NUM_PROMPTS // BATCH_SIZE
    for iteration in range(iterations):
        if len(queue) < BATCH_SIZE:
            queue += rng.permutation(NUM_PROMPTS).tolist()
        ids = np.array(sorted(set(queue[:BATCH_SIZE])))
        queue = queue[BATCH_SIZE:]
        rates = pools.sigmoid(theta[ids] + rise * iteration / iterations)
        variances = rates * (1 - rates)
        known = variances if arm == "oracle" else store.estimate(ids, iteration, features[ids]).bernoulli_variance
        if first // 2 <= iteration < first:
            unseen.append(np.stack([variances, known]))
        sizes = allocate_rollouts(known, ids, MEAN_SIZE * len(ids), *BOUNDS, RLOORule())
        allocated[iteration], equal[iteration] = (variances / (sizes - 1)).sum(), (variances / (MEAN_SIZE - 1)).sum()
        if arm != "oracle":
            store.observe(ids, rng.binomial(sizes, rates), sizes, iteration, features=features[ids])
        theta = theta + np.random.default_rng(seed * 99 + iteration).normal(0, 0.03, NUM_PROMPTS)
    true, weight = np.concatenate(unseen, axis=1)
    r2 = 1 - ((true - weight) ** 2).sum() / ((true - true.mean()) ** 2).sum()
    later = allocated[first:].sum() / equal[first:].sum() if iterations > first else math.nan
    return float(allocated[:first].sum() / equal[:first].sum()), float(later), float(r2)


CELLS = (("length", 0.5, 0.0), ("length", 0.5, 3.0), ("dataset", 0.5, 0.0), ("length", 0.0, 0.0), ("dataset", 0.0, 0.0))
ARMS = ("none", "features", "oracle")


def measure_features() -> list[dict[str, Any]]:
    """Return a record for each cell and arm of table `features`."""
    records = []
    for feature, explained, rise in CELLS:
        for arm in ARMS:
            runs = [train(feature, explained, rise, arm, seed) for seed in range(2 * pools.REPLICATIONS)]
            first, later, r2 = zip(*runs, strict=True)
            names = {"feature": feature, "explained": explained, "rise": rise, "arm": arm}
            measured = {**pools.interval(list(later)), **pools.interval(list(first), "first")}
            records.append({**names, "unseen_r2": round(statistics.fmean(r2), 3), **measured})
    return records
