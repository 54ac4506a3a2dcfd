"""Simulated training: success rates that move together, in pools of several shapes. Tables of `allocation.py`.

**drift.** 1,100 prompts with logits θ from a pool; 175 RL iterations of 32 prompts, whose logits rise by `rise` in all,
each by its own multiple, and walk by 0.03 per iteration besides. 8 rollouts per prompt, sizes 2 to 24. Every arm sees
its own outcomes and allocates by what it made of them. The ratio is Σ p(1 − p)/(n − 1) over that of equal groups, with
the p of the visit: `first` in the first epoch, `ratio` after it.

**one_epoch.** 4,096 prompts in 64 iterations of 64, each visited once, 16 rollouts, sizes 2 to 64, while the logits
rise by `rise`. Without a pilot all unseen prompts are alike to every estimator. With one, 4 rollouts of each prompt
decide where the others go; the variance is that of the two estimators mixed (`dynamo_lightning.allocation.pilot`).

**pilot.** A first epoch without any history: 512 prompts whose p come from a Beta distribution, mean 16, sizes 2 to 64,
the population fitted to this batch's own pilots by `BetaPosterior` alone. The pilot's and the commit's rollouts are
drawn, and with them the gradient of a policy with one logit for each prompt and scores that do not depend on rewards:
its variance and its bias are those of the replications, not of a formula.

**population.** As table `variance`, for estimators that differ in the population's shape; pools of several
modes too.

Intervals: 95 %, Student's t over replications; arms of a cell see the same pools and prompts in the same order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamo_lightning.allocation import (
    AllocationRule,
    ArcsineKalman,
    BetaPosterior,
    LogitFilter,
    NeymanRule,
    PaperBernoulli,
    PromptStatistics,
    ProportionalRule,
    RLOORule,
    RolloutBudget,
    SignalRule,
    VarianceEstimator,
    allocate_commit,
    allocate_rollouts,
    pilot_weights,
    variance_ratio,
)
from dynamo_lightning.types import PilotBaseline

Array = NDArray[np.float64]

REPLICATIONS = 5
PILOT_REPLICATIONS = 4000
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365, 10: 2.262, 20: 2.093}
"""Student's t, 97.5 %, by number of replications; for many, the normal distribution's 1.96."""

ESTIMATORS: dict[str, Callable[[], VarianceEstimator]] = {
    "beta_posterior_32": lambda: BetaPosterior(half_life=32),
    "beta_posterior_100": lambda: BetaPosterior(half_life=100),
    "arcsine_kalman": ArcsineKalman,
    "paper_bernoulli": PaperBernoulli,
    "logit_filter": LogitFilter,
    "filter_followers": lambda: LogitFilter(all_follow=False),
}
RULES: dict[str, AllocationRule] = {
    "rloo": RLOORule(),
    "neyman": NeymanRule(),
    "proportional": ProportionalRule(),
    "signal": SignalRule(),
}
POOLS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "N(-1,3)": lambda rng, size: rng.normal(-1.0, 3.0, size),
    "Beta(.2,.2)": lambda rng, size: logit(rng.beta(0.2, 0.2, size)),
    "three modes": lambda rng, size: (
        rng.choice([-5.0, -0.5, 4.5], size, p=[0.45, 0.2, 0.35]) + rng.normal(0, 0.3, size)
    ),
    "two modes": lambda rng, size: rng.choice([-4.0, 1.0], size, p=[0.7, 0.3]) + rng.normal(0, 0.3, size),
}
MOVEMENTS: dict[str, Callable[[np.random.Generator, Array], Array]] = {
    "all alike": lambda rng, theta: np.ones(len(theta)),
    "0 to 2 times": lambda rng, theta: rng.uniform(0, 2, len(theta)),
    "60 % of prompts": lambda rng, theta: (rng.random(len(theta)) < 0.6) / 0.6,
    "middle most": lambda rng, theta: 1.8 * np.exp(-np.abs(theta + 1.0) / 2),
}
CELLS = [
    ("N(-1,3)", "all alike", 0.0),
    ("N(-1,3)", "all alike", 3.0),
    ("N(-1,3)", "all alike", 6.0),
    ("N(-1,3)", "0 to 2 times", 4.0),
    ("N(-1,3)", "60 % of prompts", 4.0),
    ("N(-1,3)", "middle most", 4.0),
    ("Beta(.2,.2)", "all alike", 0.0),
    ("Beta(.2,.2)", "all alike", 3.0),
    ("three modes", "all alike", 0.0),
    ("three modes", "all alike", 3.0),
]
RULE_CELLS = [("N(-1,3)", "all alike", 3.0), ("N(-1,3)", "60 % of prompts", 4.0)]
"""Cells in which the other rules are measured too, under two estimators."""
PILOTS = {"logit_filter": (0, 4), "oracle": (0,)}
"""Pilot sizes of table `one_epoch` other than 4 alone: without one, every estimator's groups are equal."""
RULE_ESTIMATORS = ("beta_posterior_32", "logit_filter")


def logit(rates: Array) -> Array:
    """Return log-odds, within ±30."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(rates) - np.log1p(-rates), -30, 30)


def sigmoid(logits: Array) -> Array:
    """Return success rates."""
    return 1 / (1 + np.exp(-logits))


def drift_arms(cell: tuple[str, str, float]) -> Iterator[tuple[str, str]]:
    """Yield estimators and rules of a cell of table `drift`."""
    for estimator in ESTIMATORS:
        yield estimator, "rloo"
        if cell in RULE_CELLS and estimator in RULE_ESTIMATORS:
            yield from ((estimator, rule) for rule in RULES if rule != "rloo")
    yield "oracle", "rloo"


def train(
    cell: tuple[str, str, float], estimator: str, rule: str, seed: int, iterations: int = 175
) -> tuple[float, float]:
    """Return the ratio in the first epoch and after it."""
    pool, movement, rise = cell
    num_prompts, batch_size, walk = 1100, 32, 0.03
    rng = np.random.default_rng(seed)
    theta = POOLS[pool](rng, num_prompts)
    speed = {name: make(rng, theta) for name, make in MOVEMENTS.items()}[movement]  # all: the same draws in every cell
    rng = np.random.default_rng(seed + 1000)
    store = PromptStatistics(ESTIMATORS[estimator]()) if estimator != "oracle" else None
    queue: list[int] = []
    allocated, equal = np.zeros((2, iterations))
    for iteration in range(iterations):
        if len(queue) < batch_size:
            queue += rng.permutation(num_prompts).tolist()
        ids = np.array(sorted(set(queue[:batch_size])))
        queue = queue[batch_size:]
        rates = sigmoid(theta[ids] + rise * iteration / iterations * speed[ids])
        variances = rates * (1 - rates)
        known = variances if store is None else store.estimate(ids, iteration)
        sizes = allocate_rollouts(known, ids, 8 * len(ids), 2, 24, RULES[rule])
        allocated[iteration], equal[iteration] = (variances / (sizes - 1)).sum(), (variances / 7).sum()
        if store is not None:
            store.observe(ids, rng.binomial(sizes, rates), sizes, iteration)
        theta = theta + np.random.default_rng(seed * 99 + iteration).normal(0, walk, num_prompts)
    first = num_prompts // batch_size
    later = allocated[first:].sum() / equal[first:].sum() if iterations > first else math.nan
    return float(allocated[:first].sum() / equal[:first].sum()), float(later)


def one_epoch(pool: str, rise: float, estimator: str, pilot: int, seed: int) -> float:
    """Return the ratio over an epoch in which every prompt is visited once."""
    iterations, batch_size, mean_size, bounds = 64, 64, 16, (2, 64)
    rng = np.random.default_rng([seed, 7])
    theta = POOLS[pool](rng, iterations * batch_size)
    rng = np.random.default_rng([seed, 8])
    store = PromptStatistics(ESTIMATORS[estimator]()) if estimator != "oracle" else None
    allocated = equal = 0.0
    budget = mean_size * batch_size
    plan = RolloutBudget(mean_size, *bounds, pilot=pilot)
    for iteration in range(iterations):
        ids = np.arange(iteration * batch_size, (iteration + 1) * batch_size)
        rates = sigmoid(theta[ids] + rise * iteration / iterations)
        variances = rates * (1 - rates)
        equal += float((variances / (mean_size - 1)).sum())
        if store is None:
            sizes = allocate_rollouts(variances, ids, budget, *bounds, RLOORule())
            allocated += float((variances / (sizes - 1)).sum())
            continue
        before = store.estimate(ids, iteration)
        if pilot == 0:
            sizes = allocate_rollouts(before, ids, budget, *bounds, RLOORule())
            allocated += float((variances / (sizes - 1)).sum())
        else:
            shares = pilot_weights(before, ids, plan)
            store.observe(ids, rng.binomial(pilot, rates), np.full(batch_size, pilot), iteration)
            after = store.estimate(ids, iteration)
            sizes = allocate_commit(after, ids, shares, plan)
            allocated += float((variances * (shares**2 / (pilot - 1) + (1 - shares) ** 2 / (sizes - 1))).sum())
        store.observe(ids, rng.binomial(sizes, rates), sizes, iteration)
    return allocated / equal


def first_epoch(prior: float, pilot: int, baseline: PilotBaseline, seed: int, scores: str) -> tuple[float, float]:
    """Return the squared error of the batch's gradient relative to equal groups' expected one, and its relative bias.

    Args:
        prior: Both parameters of the Beta distribution of p.
        pilot: Rollouts of the pilot; 0 for none.
        baseline: What pilot and commit are compared with.
        seed: Of the replication.
        scores: `independent` of rewards, normal with variance 1, for the variance; `bernoulli`, r − p, for the bias.
    """
    num_prompts, mean_size, bounds, ids = 512, 16, (2, 64), np.arange(512)
    rng = np.random.default_rng([seed, 10])
    rates = rng.beta(prior, prior, num_prompts)
    budget = RolloutBudget(mean_size, *bounds, pilot=pilot, pilot_baseline=baseline)
    store = PromptStatistics(BetaPosterior())
    before = store.estimate(ids, 0)
    largest = bounds[1] + pilot
    rewards = (rng.random((num_prompts, largest)) < rates[:, None]).astype(np.float64)
    score = rng.normal(size=rewards.shape) if scores == "independent" else rewards - rates[:, None]
    if pilot:
        shares = pilot_weights(before, ids, budget)
        store.observe(ids, rewards[:, :pilot].sum(1), np.full(num_prompts, pilot), 0)
        sizes = allocate_commit(store.estimate(ids, 0), ids, shares, budget)
    else:
        shares, sizes = np.zeros(num_prompts), allocate_rollouts(before, ids, 16 * num_prompts, *bounds, RLOORule())
    column = np.arange(largest)
    first, second = (column < pilot)[None], (column >= pilot)[None] & (column < pilot + sizes[:, None])
    chosen = first | second
    others = {
        "separate": lambda part: (part * rewards).sum(1, keepdims=True) - rewards * part,
        "pooled": lambda part: (chosen * rewards).sum(1, keepdims=True) - rewards,
    }
    if pilot and baseline == "cross":
        commit_mean = (second * rewards).sum(1, keepdims=True) / sizes[:, None]
        rest = others["pooled"](second) / (pilot + sizes[:, None] - 1)
        advantages = rewards - np.where(first, commit_mean, rest)
        weights = first * (shares / max(pilot, 1))[:, None] + second * ((1 - shares) / sizes)[:, None]
    elif pilot and baseline == "pooled":
        advantages = rewards - others["pooled"](chosen) / (pilot + sizes[:, None] - 1)
        weights = chosen / (pilot + sizes)[:, None]
    else:
        own = first * max(pilot - 1, 1) + second * (sizes - 1)[:, None]
        part = np.where(first, others["separate"](first), others["separate"](second))
        advantages = rewards - part / np.maximum(own, 1)
        weights = first * (shares / max(pilot, 1))[:, None] + second * ((1 - shares) / sizes)[:, None]
    gradient = (weights * advantages * score).sum(1)
    variances = rates * (1 - rates)
    return float((gradient**2).sum() / (variances / (mean_size - 1)).sum()), float(gradient.sum() / variances.sum() - 1)


PILOT_ARMS: tuple[tuple[int, PilotBaseline], ...] = (
    (0, "separate"),
    (4, "separate"),
    (2, "cross"),
    (4, "cross"),
    (4, "pooled"),
)


def measure_pilot() -> list[dict[str, Any]]:
    """Return a record for each prior, pilot and baseline of table `pilot`."""
    records = []
    for prior in (0.2, 0.5, 1.0):
        for pilot, baseline in PILOT_ARMS:
            ratios, biases = (
                [first_epoch(prior, pilot, baseline, seed, scores)[number] for seed in range(PILOT_REPLICATIONS)]
                for number, scores in enumerate(("independent", "bernoulli"))
            )
            names = {"pool": f"Beta({prior:g},{prior:g})", "pilot": pilot, "baseline": baseline}
            records.append({**names, **interval(ratios), **interval(biases, "bias")})
    return records


def one_history(pool: str, history: int, estimator: str, seed: int) -> float:
    """Return the ratio after `history` rollouts of every prompt in one earlier iteration."""
    num_prompts, ids = 512, np.arange(512)
    rng = np.random.default_rng([seed, 9])
    rates = sigmoid(POOLS[pool](rng, num_prompts))
    variances = rates * (1 - rates)
    known: Any = variances
    if estimator != "oracle":
        store = PromptStatistics(ESTIMATORS[estimator]())
        store.observe(ids, rng.binomial(history, rates), np.full(num_prompts, history), 0)
        known = store.estimate(ids, 1)
    return variance_ratio(variances, allocate_rollouts(known, ids, 16 * num_prompts, 2, 64, RLOORule()))


def interval(values: list[float], prefix: str = "ratio") -> dict[str, float]:
    """Return mean and 95 % interval, rounded."""
    mean = statistics.fmean(values)
    margin = T_QUANTILES.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    low, high = ("low", "high") if prefix == "ratio" else (f"{prefix}_low", f"{prefix}_high")
    return {prefix: round(mean, 4), low: round(mean - margin, 4), high: round(mean + margin, 4)}


def measure_drift() -> list[dict[str, Any]]:
    """Return a record for each cell, estimator and rule of table `drift`."""
    records = []
    for cell in CELLS:
        for estimator, rule in drift_arms(cell):
            first, later = zip(*(train(cell, estimator, rule, seed) for seed in range(REPLICATIONS)), strict=True)
            names = {"pool": cell[0], "movement": cell[1], "rise": cell[2], "estimator": estimator, "rule": rule}
            records.append({**names, **interval(list(later)), **interval(list(first), "first")})
    return records


def measure_one_epoch() -> list[dict[str, Any]]:
    """Return a record for each pool, estimator and pilot of table `one_epoch`."""
    records = []
    for pool, rise in (("N(-1,3)", 0.0), ("N(-1,3)", 3.0), ("Beta(.2,.2)", 0.0), ("three modes", 3.0)):
        for estimator in (*ESTIMATORS, "oracle"):
            for pilot in PILOTS.get(estimator, (4,)):
                values = [one_epoch(pool, rise, estimator, pilot, seed) for seed in range(REPLICATIONS)]
                names = {"pool": pool, "rise": rise, "estimator": estimator, "pilot": pilot}
                records.append({**names, **interval(values)})
    return records


def measure_population() -> list[dict[str, Any]]:
    """Return a record for each pool, history and estimator of table `population`."""
    records = []
    for pool in POOLS:
        for history in (16, 48):
            for estimator in ("beta_posterior_32", "arcsine_kalman", "logit_filter", "oracle"):
                values = [one_history(pool, history, estimator, seed) for seed in range(4 * REPLICATIONS)]
                records.append({"pool": pool, "history": history, "estimator": estimator, **interval(values)})
    return records


def print_table(name: str, records: list[dict[str, Any]]) -> None:
    """Print one of the tables, a line for each record."""
    extra = next((name for name in ("first", "bias", "difference") if name in records[0]), None)
    measured = ("ratio", "low", "high", extra, f"{extra}_low", f"{extra}_high")
    keys = [key for key in records[0] if key not in measured]
    print(f"\nTable {name}: variance relative to equal groups, mean ± half of the 95 % interval")
    print("".join(f"{key:>20}" for key in keys) + f"{'ratio':>18}" + (f"{extra:>18}" if extra else ""))
    for record in records:
        line = "".join(f"{record[key]:>20}" for key in keys)
        line += f"{record['ratio']:10.3f} ± {record['high'] - record['ratio']:.3f}"
        if extra:
            line += f"{record[extra]:10.3f} ± {record[f'{extra}_high'] - record[extra]:.3f}"
        print(line)
