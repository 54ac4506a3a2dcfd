"""A pilot under score-weighted baselines, simulated: table `weighted_pilot` of `allocation.py`.

One iteration over 512 prompts whose p come from a Beta distribution, mean 16, sizes 2 to 64, the sizes' population
fitted to this batch's own pilots of 4. A right response has a score s ~ N(0, w) with w of mean `score_ratio`, a wrong
one of mean 1, log-normal with σ = 1/2 each. So the true gradient is 0, and the mean of its square is the variance; the
ratio is that over equal groups' with leave-one-out. `known` is what the baseline's prior knows: nothing, the population
of other prompts (as within a first epoch), or 16 earlier rollouts of each prompt.

Baselines: `equal`, equal groups without a pilot; with a pilot and shared baselines, a pilot rollout is compared with
`plain`, the mean of the commit's rewards; `least`, the weighted mean of its first two with the prior; `built`,
`dynamo_lightning.losses.pilot_baseline`. `leave_one_out` has the plain baselines of `RLOO` throughout.

Intervals as in `drifting_pools.py`; all arms of a cell see the same draws, and `difference` is to `plain` with the same
prior, paired.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from drifting_pools import Array, interval

from dynamo_lightning.allocation import (
    BetaPosterior,
    OptimalBaselineRule,
    PromptStatistics,
    RLOORule,
    RolloutBudget,
    allocate_commit,
    pilot_weights,
)
from dynamo_lightning.losses.advantages import cross_leave_one_out, weighted_leave_one_out
from dynamo_lightning.losses.baseline_history import BaselineHistory
from dynamo_lightning.losses.pilot_baseline import pilot_baselines

REPLICATIONS = 100
NUM_PROMPTS, MEAN_SIZE, PILOT, BOUNDS = 512, 16, 4, (2, 64)
LEAST = 2
ARMS = [
    *(("leave_one_out", "nothing", baseline) for baseline in ("equal", "plain")),
    *((weights, known, baseline)
      for weights, known in (("weighted", known) for known in ("nothing", "population", "own rollouts"))
      for baseline in ("equal", "plain", "least", "built")),
]  # fmt: skip
"""Advantage, what its prior knows, and the baseline of pilot rollouts."""


class Pool:
    """The draws of a replication, `[num_prompts, largest group]` each."""

    def __init__(self, prior: float, score_ratio: float, seed: int) -> None:
        rng = np.random.default_rng([seed, 12])
        self.score_ratio = score_ratio
        self.rates = rng.beta(prior, prior, NUM_PROMPTS)
        self.rewards, self.norms = self.draw(rng, self.rates, BOUNDS[1])
        self.scores = rng.normal(size=self.rewards.shape) * np.sqrt(self.norms)
        self.earlier = {
            "own rollouts": self.draw(rng, self.rates, MEAN_SIZE),
            "population": self.draw(rng, rng.beta(prior, prior, NUM_PROMPTS), MEAN_SIZE),
        }

    def draw(self, rng: np.random.Generator, rates: Array, size: int) -> tuple[Array, Array]:
        """Rewards and squared score norms."""
        rewards = (rng.random((len(rates), size)) < rates[:, None]).astype(np.float64)
        return rewards, np.where(rewards > 0, self.score_ratio, 1.0) * rng.lognormal(-0.125, 0.5, rewards.shape)

    def history(self, known: str) -> BaselineHistory | None:
        """The prior of the baselines."""
        if known == "nothing":
            return None
        rewards, norms = (torch.from_numpy(values.ravel()) for values in self.earlier[known])
        ids = torch.arange(NUM_PROMPTS).repeat_interleave(MEAN_SIZE) + NUM_PROMPTS * (known == "population")
        history = BaselineHistory(half_life=100.0, population_rollouts=4.0)
        history.observe(rewards, norms, ids, 0)
        return history

    @property
    def equal_variance(self) -> float:
        """Variance of the summed gradient of equal groups with leave-one-out, exactly."""
        p, others = self.rates, MEAN_SIZE - 1
        right = p * self.score_ratio * ((1 - p) ** 2 + p * (1 - p) / others)
        return float((right + (1 - p) * (p**2 + p * (1 - p) / others)).sum() / MEAN_SIZE)


def squared_gradient(pool: Pool, advantage: str, known: str, baseline: str) -> float:
    """The squared gradient of one arm, relative to the variance of equal groups with leave-one-out."""
    ids, history = np.arange(NUM_PROMPTS), pool.history(known)
    weighted = advantage == "weighted"
    rule = OptimalBaselineRule("history" if history else "group", pool.score_ratio) if weighted else RLOORule()
    if baseline == "equal":
        pilot, shares, sizes = 0, np.zeros(NUM_PROMPTS), np.full(NUM_PROMPTS, MEAN_SIZE)
    else:
        pilot, store = PILOT, PromptStatistics(BetaPosterior())
        budget = RolloutBudget(MEAN_SIZE, *BOUNDS, rule=rule, pilot=PILOT, pilot_baseline="cross")
        shares = pilot_weights(store.estimate(ids, 0), ids, budget)
        store.observe(ids, pool.rewards[:, :PILOT].sum(1), np.full(NUM_PROMPTS, PILOT), 0)
        sizes = allocate_commit(store.estimate(ids, 0), ids, shares, budget)
    column = np.arange(pool.rewards.shape[1])[None]
    chosen = column < pilot + sizes[:, None]
    prompts = torch.from_numpy(np.nonzero(chosen)[0])
    positions = torch.from_numpy(np.nonzero(chosen)[1])
    rewards, norms = (torch.from_numpy(values[chosen]) for values in (pool.rewards, pool.norms))
    weights = norms if weighted else torch.ones_like(norms)
    means, strengths = history.prior(prompts, 1) if history else (None, None)
    counts = history.prior_rollouts(prompts, 1) if history else None
    is_pilot = positions < pilot
    is_certain = ~is_pilot & (positions < pilot + LEAST)
    if not pilot:
        baselines = weighted_leave_one_out(rewards, weights, prompts, NUM_PROMPTS, means, strengths)
    else:
        baselines = cross_leave_one_out(rewards, prompts, is_pilot, weights, means, strengths)
    if baseline == "built":
        mean = float(MEAN_SIZE - PILOT)
        found = pilot_baselines(rewards, weights, prompts, is_pilot, is_certain, mean, means, counts)
        baselines = torch.where(is_pilot, found, baselines)
    elif baseline == "least":  # the pilot's rollouts weigh nothing in the sums that they are left out of
        within = torch.where(is_certain, weights, 0.0)
        found = weighted_leave_one_out(rewards, within, prompts, NUM_PROMPTS, means, strengths)
        baselines = torch.where(is_pilot, found, baselines)
    per_rollout = np.where(column < pilot, shares[:, None] / max(pilot, 1), ((1 - shares) / sizes)[:, None])[chosen]
    contributions = per_rollout * (rewards - baselines).numpy() * pool.scores[chosen]
    gradient = np.bincount(prompts.numpy(), contributions, NUM_PROMPTS)
    return float((gradient**2).sum()) / pool.equal_variance


def measure_weighted_pilot() -> list[dict[str, Any]]:
    """Return a record for each prior, score ratio and arm of table `weighted_pilot`."""
    records = []
    for prior in (0.2, 1.0):
        for score_ratio in (1.0, 4.0):
            pools = [Pool(prior, score_ratio, seed) for seed in range(REPLICATIONS)]
            found = {arm: [squared_gradient(pool, *arm) for pool in pools] for arm in ARMS}
            for (advantage, known, baseline), values in found.items():
                names = {"pool": f"Beta({prior:g},{prior:g})", "score_ratio": score_ratio, "advantage": advantage}
                pairs = zip(values, found[advantage, known, "plain"], strict=True)
                differences = interval([value - plain for value, plain in pairs], "difference")
                records.append({**names, "known": known, "baseline": baseline, **interval(values), **differences})
    return records
