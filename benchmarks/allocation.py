"""What allocation wins: exact leave-one-out variance relative to equal groups, and what an allocation costs.

    python benchmarks/allocation.py --json benchmarks/results/allocation.json
    python benchmarks/allocation.py --tables drift one_epoch population --json benchmarks/results/allocation.json
    python benchmarks/allocation.py --tables features --json benchmarks/results/allocation.json

The second command measures pools that move (`benchmarks/drifting_pools.py`), the third unseen prompts with features
(`benchmarks/feature_pools.py`); tables that a command does not measure
stay in the file as they are. Tables `variance` and `cost`, the first command's:

512 prompts draw their success rates p from a prior; each shows `history` rollouts to the statistics in RL iteration 0;
with drift, the policy then moves every p by +1 or −1 on the logit scale, unseen. In iteration 1 the estimator and the
rule allocate a budget of 16 rollouts per prompt. The ratio is Σ p(1 − p)/(n − 1) under the sizes over that of equal
groups, with the p of iteration 1: exact, given the sizes. All arms of a cell see the same draws. Intervals: 95 %,
Student's t over 40 draws.

`oracle` knows p; `true_prior` is `beta_posterior` with the prior that made p instead of the fitted one;
`random_matched` are the sizes of `beta_posterior`, permuted. Estimators, statistics and rules are the library's own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamo_lightning.allocation import (
    AllocationRule,
    ArcsineKalman,
    BetaPosterior,
    PaperBernoulli,
    PromptStatistics,
    ProportionalRule,
    RLOORule,
    VarianceEstimator,
    allocate_rollouts,
    variance_ratio,
)

sys.path.insert(0, str(Path(__file__).parent))  # also when loaded by its path

import drifting_pools
import feature_pools
import pilot_baselines

NUM_PROMPTS, ROLLOUTS_PER_PROMPT, NUM_DRAWS = 512, 16, 40
T_QUANTILE = 2.0227  # Student's t, 39 degrees of freedom, 97.5 %
PRIORS = {"U(0,1)": (1.0, 1.0), "Beta(.5,.5)": (0.5, 0.5), "Beta(.2,.2)": (0.2, 0.2), "Beta(.3,1.2)": (0.3, 1.2)}
BOUNDS = ((8, 24), (4, 32), (2, 64))
HISTORIES = (16, 48)
ARMS: dict[tuple[str, str], tuple[Callable[..., VarianceEstimator] | None, AllocationRule]] = {
    ("beta_posterior", "rloo"): (BetaPosterior, RLOORule()),
    ("arcsine_kalman", "rloo"): (ArcsineKalman, RLOORule()),
    ("paper_bernoulli", "rloo"): (PaperBernoulli, RLOORule()),
    ("paper_bernoulli", "proportional"): (PaperBernoulli, ProportionalRule()),
    ("true_prior", "rloo"): (BetaPosterior, RLOORule()),
    ("random_matched", "rloo"): (None, RLOORule()),
    ("oracle", "rloo"): (None, RLOORule()),
}


class TruePrior(BetaPosterior):
    """A posterior that is told the prior."""

    def __init__(self, prior: tuple[float, float]) -> None:
        super().__init__()
        self.prior = prior

    def fit_population(self, state: Any, elapsed: Any) -> tuple[float, float]:
        """Return the prior that made the rates."""
        return self.prior


def expected_variances(
    arm: str,
    rates_then: NDArray[np.float64],
    rates_now: NDArray[np.float64],
    outcomes: NDArray[np.int64],
    history: int,
    prior: tuple[float, float],
) -> NDArray[np.float64]:
    """Return each prompt's weight in iteration 1, `[num_prompts]`."""
    if arm == "oracle":
        return rates_now * (1 - rates_now)
    factory = ARMS[arm, "rloo"][0]
    assert factory is not None
    store = PromptStatistics(TruePrior(prior) if arm == "true_prior" else factory())
    ids = np.arange(NUM_PROMPTS)
    store.observe(ids, outcomes, np.full(NUM_PROMPTS, history), iteration=0)
    return store.estimate(ids, iteration=1).bernoulli_variance


def measure_variance() -> list[dict[str, Any]]:
    """Return a record for each prior, bounds, history, drift, estimator and rule."""
    ratios: dict[tuple[Any, ...], list[float]] = {}
    ids, budget = np.arange(NUM_PROMPTS), NUM_PROMPTS * ROLLOUTS_PER_PROMPT
    for number, (prior, parameters) in enumerate(PRIORS.items()):
        for draw in range(NUM_DRAWS):
            rng = np.random.default_rng([2602, number, draw])
            then = rng.beta(*parameters, NUM_PROMPTS)
            moved = then * np.exp(rng.choice([-1, 1], NUM_PROMPTS))
            rates = {0: then, 1: moved / (moved + 1 - then)}
            shuffle = rng.permutation(NUM_PROMPTS)
            for history in HISTORIES:
                outcomes = rng.binomial(history, then)
                for drift, now in rates.items():
                    weights = {
                        arm: expected_variances(arm, then, now, outcomes, history, parameters)
                        for arm in {arm for arm, _ in ARMS} - {"random_matched"}
                    }
                    for bounds in BOUNDS:
                        for (arm, name), (_, rule) in ARMS.items():
                            known = weights["beta_posterior" if arm == "random_matched" else arm]
                            sizes = allocate_rollouts(known, ids, budget, *bounds, rule)
                            sizes = sizes[shuffle] if arm == "random_matched" else sizes
                            cell = (prior, bounds, history, arm, name, drift)
                            ratios.setdefault(cell, []).append(variance_ratio(now * (1 - now), sizes))
    records = []
    for (prior, bounds, history, arm, name, drift), values in ratios.items():
        mean, margin = statistics.fmean(values), T_QUANTILE * statistics.stdev(values) / math.sqrt(NUM_DRAWS)
        records.append(
            {
                "prior": prior,
                "bounds": list(bounds),
                "history": history,
                "estimator": arm,
                "rule": name,
                "drift": drift,
                "ratio": round(mean, 4),
                "low": round(mean - margin, 4),
                "high": round(mean + margin, 4),
            }
        )
    return records


def measure_cost() -> list[dict[str, Any]]:
    """Return the median time of an allocation with its estimate, and the store's memory, for growing batches."""
    records = []
    for num_prompts in (512, 1024, 4096):
        rng = np.random.default_rng(num_prompts)
        rates, ids = rng.beta(0.5, 0.5, num_prompts), rng.integers(0, 2**63 - 1, num_prompts)
        store = PromptStatistics(BetaPosterior())
        counts = np.full(num_prompts, 16)
        store.observe(ids, rng.binomial(16, rates), counts, 0, response_tokens=300 * counts)
        budget, seconds = ROLLOUTS_PER_PROMPT * num_prompts, []
        for _ in range(21):
            start = time.perf_counter()
            estimate = store.estimate(ids, 1)
            allocate_rollouts(estimate, ids, budget, 2, 64, RLOORule())
            seconds.append(time.perf_counter() - start)
        records.append(
            {
                "num_prompts": num_prompts,
                "budget": budget,
                "milliseconds": round(1000 * statistics.median(seconds), 2),
                "bytes_per_visited_prompt": store.nbytes // len(store),
            }
        )
    return records


MEASURES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "variance": measure_variance,
    "cost": measure_cost,
    "drift": drifting_pools.measure_drift,
    "one_epoch": drifting_pools.measure_one_epoch,
    "population": drifting_pools.measure_population,
    "pilot": drifting_pools.measure_pilot,
    "weighted_pilot": pilot_baselines.measure_weighted_pilot,
    "features": feature_pools.measure_features,
}


def print_tables(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the ratios, a block for each prior, the costs, and the other tables that there are."""
    if "variance" in results:
        print_variance(results)
    if "cost" in results:
        print(f"\n{'prompts':>8}{'budget':>9}{'milliseconds':>14}{'bytes per visited prompt':>26}")
        for cost in results["cost"]:
            print("{num_prompts:8}{budget:9}{milliseconds:14.2f}{bytes_per_visited_prompt:26}".format(**cost))
    for name in ("drift", "one_epoch", "population", "pilot", "weighted_pilot", "features"):
        if name in results:
            drifting_pools.print_table(name, results[name])


def print_variance(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the ratios, a block for each prior."""
    ratio = {
        (r["prior"], tuple(r["bounds"]), r["history"], r["drift"], r["estimator"], r["rule"]): r
        for r in results["variance"]
    }
    columns = [(history, drift) for history in HISTORIES for drift in (0, 1)]
    print("Variance relative to equal groups: mean ± half of the 95 % interval. Below 1 is a gain.")
    for prior in PRIORS:
        for bounds in BOUNDS:
            heads = [f"history {history}{', drift' if drift else ''}" for history, drift in columns]
            print(f"\n{f'{prior}, sizes {list(bounds)}':32}" + "".join(f"{head:>19}" for head in heads))
            for arm, rule in ARMS:
                cells = [ratio[prior, bounds, *column, arm, rule] for column in columns]
                shown = [f"{cell['ratio']:.3f} ± {cell['high'] - cell['ratio']:.3f}" for cell in cells]
                name = arm if rule == "rloo" else f"{arm}, {rule}"
                print(f"  {name:30}" + "".join(f"{cell:>19}" for cell in shown))


def main() -> None:
    """Measure, print, and write the records as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the records to")
    parser.add_argument("--tables", nargs="+", choices=MEASURES, default=["variance", "cost"], help="what to measure")
    arguments = parser.parse_args()
    path = arguments.json
    results = json.loads(path.read_text()) if path is not None and path.exists() else {}
    for name in arguments.tables:
        results[name] = MEASURES[name]()
    print_tables(results)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
