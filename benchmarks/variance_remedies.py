"""Where a prompt's gradient variance comes from, and what weights other than E[p(1 − p)] would make of it.

    python benchmarks/gradient_variance.py --task chain … --keep kept/chain
    python benchmarks/variance_remedies.py kept/chain

Reads what `gradient_variance.py --keep` left. With leave-one-out advantages the variance of a prompt goes as
`a = p(1 − p)[(1 − p)S₁ + pS₀] − ‖∇J‖²`, S_r the mean squared score norm ‖s‖² of rollouts with reward r. The first table
compares, by success rate: the shares of Σ p(1 − p); of Σ a with w, the squared logit gradient, in the place of ‖s‖²; of
Σ a with the ‖s‖² of all parameters; of the exact variance of groups of 8; and the mean ‖s‖² of failures.

The second has the exact variance relative to equal groups of 8, sizes from 2 and from 4, by what the `rloo` rule is
told. `told`: of the reference. Else: what an estimator expects (`followers`: `LogitFilter` with `all_follow: false`;
`beta`: `BetaPosterior`), and of w what the run's own rollouts show: S₀ and S₁ as functions of p, means over the
rollouts of all prompts, each counted where the filter expects its prompt and discounted by half every 20 RL iterations.
`E[p²(1 − p)]` takes S₁ as 0 and S₀ as equal.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_lightning.allocation import (
    BetaPosterior,
    Estimate,
    LogitFilter,
    RLOORule,
    ScoreRatioRule,
    allocate_rollouts,
)
from dynamo_lightning.measure.moments import KernelMoments

sys.path.insert(0, str(Path(__file__).parent))  # also when loaded by its path

from variance_references import Checkpoint, Reference

MEAN, MOST, LEASTS = 8, 24, (2, 4)
GRID = np.linspace(-9.0, 9.0, 181)
RATES = 1 / (1 + np.exp(-GRID))
HALF_LIFE = 20.0
"""RL iterations, of a rollout's score norm."""
WIDTH = 1.0
"""Standard deviation of the kernel that smooths S over logits."""
EDGES = (0.0, 0.005, 0.05, 0.5, 0.8, 0.95, 0.995, 1.001)


def distributions(estimate: Estimate) -> np.ndarray:
    """Beta distributions with the expected p and p(1 − p), on `GRID`, `[num_prompts, num_points]`."""
    mean = np.clip(estimate.success_rate, 1e-4, 1 - 1e-4)
    share = np.clip(estimate.bernoulli_variance / (mean * (1 - mean)), 1e-6, 0.999)  # n/(n + 1) with n = a + b
    total = share / (1 - share)
    a, b = (mean * total)[:, None], ((1 - mean) * total)[:, None]
    log_density = a * np.log(RATES) + b * np.log1p(-RATES)  # of the logit
    density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    return density / density.sum(axis=1, keepdims=True)


def norms_by_rate(checkpoint: Checkpoint, make: Any) -> tuple[np.ndarray, np.ndarray]:
    """S₀ and S₁ of w on `GRID`, from the run's own rollouts."""
    rollouts = checkpoint.rollouts
    ids, index = np.unique(rollouts["prompt_id"], return_inverse=True)
    everyone = distributions(checkpoint.estimate(make(), ids))
    weight = 0.5 ** ((checkpoint.iteration - rollouts["iteration"]) / HALF_LIFE)
    kernel = np.exp(-(((GRID[:, None] - GRID) / WIDTH) ** 2) / 2)
    found = []
    for counted in (1 - rollouts["reward"], rollouts["reward"]):
        sums, counts = (
            np.bincount(index, weight * counted * value, len(ids)) for value in (rollouts["score_norm"], 1.0)
        )
        found.append((kernel @ (sums @ everyone) + 1e-9) / (kernel @ (counts @ everyone) + 1e-9))
    return found[0], found[1]


def mean_norms(reference: Reference, norms: np.ndarray) -> tuple[float, float]:
    """Means of a squared norm over the failures and over the successes; 0 without any."""
    weights = [reference.counts * (1 - reference.rewards), reference.counts * reference.rewards]
    return tuple(float(norms @ weight / max(weight.sum(), 1)) for weight in weights)  # type: ignore[return-value]


class Cell:
    """A checkpoint with the references of its prompts."""

    def __init__(self, checkpoint: Checkpoint, references: list[Reference]) -> None:
        self.ids = [prompt.prompt_id for prompt in checkpoint.prompts]
        self.moments: list[KernelMoments] = [reference.moments(reference.scores) for reference in references]
        self.rates = np.array([r.rewards @ r.counts / r.counts.sum() for r in references])
        by_logits = np.array([mean_norms(r, np.asarray(r.norms)) for r in references]).T
        by_parameters = np.array([mean_norms(r, (np.asarray(r.scores, float) ** 2).sum(1)) for r in references]).T
        self.failure_norms = by_parameters[0]
        p = self.rates
        self.told = {
            "told p(1 − p)": p * (1 - p),
            "told p²(1 − p)": p**2 * (1 - p),
            "told p, S of w": self.variance(by_logits),
            "told p, S of ‖s‖²": self.variance(by_parameters),
            "told the variance": np.maximum(self.exact(np.full(len(p), MEAN)), 0),
        }
        self.weights = dict(self.told)
        makers = {"beta": lambda: BetaPosterior(100), "filter": LogitFilter, "followers": follow}
        for name, make in makers.items():
            estimate = checkpoint.estimate(make())
            chances, s = distributions(estimate), norms_by_rate(checkpoint, make)
            self.weights |= {
                f"{name}: E[p(1 − p)]": estimate.bernoulli_variance,
                f"{name}: at least 0.05": np.maximum(estimate.bernoulli_variance, 0.05),
                f"{name}: its root": estimate.bernoulli_variance**0.5,
                f"{name}: score ratio 0.1": ScoreRatioRule(0.1).variance(estimate),
                f"{name}: E[p²(1 − p)]": chances @ (RATES**2 * (1 - RATES)),
                f"{name}: S(p) of w": chances @ (RATES * (1 - RATES) * ((1 - RATES) * s[1] + RATES * s[0])),
            }

    def variance(self, norms: np.ndarray) -> np.ndarray:
        """`p(1 − p)[(1 − p)S₁ + pS₀]`, `[num_prompts]`."""
        p = self.rates
        return p * (1 - p) * ((1 - p) * norms[1] + p * norms[0])

    def exact(self, sizes: np.ndarray) -> np.ndarray:
        """Exact variance of each prompt's gradient, `[num_prompts]`."""
        return np.array([m.variance(size) for m, size in zip(self.moments, sizes.tolist(), strict=True)])

    def ratio(self, weights: np.ndarray, least: int) -> float:
        """Exact variance relative to equal groups."""
        budget, largest = MEAN * len(self.ids), max(float(weights.max()), 1e-300)
        sizes = allocate_rollouts(weights / largest, self.ids, budget, least, MOST, RLOORule())
        return float(self.exact(sizes).sum() / self.exact(np.full(len(self.ids), MEAN)).sum())


def follow() -> LogitFilter:
    """The filter that learns who follows its drift."""
    return LogitFilter(all_follow=False)


def read(folder: Path) -> dict[str, Cell]:
    """Cells with 16 or more earlier rollouts, by name."""
    cells = {}
    for path in sorted(folder.glob("references_*_*.pickle")):
        seed, epoch = (int(part) for part in path.stem.split("_")[1:])
        checkpoint = pickle.loads((folder / f"checkpoints_{seed}.pickle").read_bytes())[epoch - 1]
        if checkpoint.history >= 16:
            cells[f"seed {seed}, {checkpoint.history} rollouts"] = Cell(
                replace(checkpoint, state={}), pickle.loads(path.read_bytes())
            )
    return cells


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that of --keep")
    cells = read(parser.parse_args().folder)
    print(", ".join(cells))
    rates = np.concatenate([cell.rates for cell in cells.values()])
    columns = {name: [cell.told[name] for cell in cells.values()] for name in next(iter(cells.values())).told}
    del columns["told p²(1 − p)"]
    print(
        f"\n{'share of':20}{'prompts':>18}" + "".join(f"{name:>20}" for name in columns) + f"{'‖s‖² of failures':>20}"
    )
    flat = {name: np.concatenate([v / v.sum() for v in found]) / len(cells) for name, found in columns.items()}
    norms = np.concatenate([cell.failure_norms for cell in cells.values()])
    for low, high in pairwise(EDGES):
        chosen = (rates >= low) & (rates < high)
        line = f"{f'{low} ≤ p < {high}':20}{chosen.mean():18.3f}"
        line += "".join(f"{shares[chosen].sum():20.3f}" for shares in flat.values())
        has_failures = chosen & (norms > 0)
        print(line + (f"{norms[has_failures].mean():20.0f}" if has_failures.any() else f"{'–':>20}"))
    print(f"\n{'weights':28}" + "".join(f"{f'sizes [{least}, {MOST}]':>16}" for least in LEASTS))
    for name in next(iter(cells.values())).weights:
        means = [np.mean([cell.ratio(cell.weights[name], least) for cell in cells.values()]) for least in LEASTS]
        print(f"{name:28}" + "".join(f"{mean:16.3f}" for mean in means))


if __name__ == "__main__":
    main()
