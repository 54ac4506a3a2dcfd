"""Ratios of gradient variances with their intervals, and the tables of `benchmarks/gradient_variance.py`."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dynamo_lightning.allocation import (
    AllocationRule,
    ArcsineKalman,
    BetaPosterior,
    LogitFilter,
    PaperBernoulli,
    ProportionalRule,
    RLOORule,
    ScoreRatioRule,
    VarianceEstimator,
    best_variance_ratio,
)
from dynamo_lightning.losses.advantages import GRPO, RLOO, Advantage
from dynamo_lightning.losses.weights import Aggregation
from dynamo_lightning.measure.moments import KernelMoments

SETTINGS = ((8, 2, 24), (16, 2, 64))  # mean, smallest and largest group; the first is the quickstart's
LEARNERS: dict[str, tuple[Callable[[], VarianceEstimator], AllocationRule]] = {
    "beta_posterior": (partial(BetaPosterior, half_life=100), RLOORule()),
    "arcsine_kalman": (ArcsineKalman, RLOORule()),
    "paper_bernoulli": (PaperBernoulli, ProportionalRule()),
    "filter": (LogitFilter, RLOORule()),
    "filter_followers": (partial(LogitFilter, all_follow=False), RLOORule()),
    "score_ratio": (partial(LogitFilter, all_follow=False), ScoreRatioRule(0.1)),
}
ARMS = ("uniform", *LEARNERS, "oracle", "oracle_gradient", "random_matched")
KINDS = {
    "gradient": "Exact variance of the leave-one-out gradient",
    "head": "The same of the vocabulary head alone, as VarianceReductionMonitor measures it,",
    "model": "Σ p(1 − p)/(n − 1), which allocation minimises,",
}
MODES: dict[str, tuple[Advantage, Aggregation]] = {
    "rloo+prompt_mean": (RLOO(), "prompt_mean"),
    "grpo+prompt_mean": (GRPO(), "prompt_mean"),
    "paper_code": (GRPO(), "token_mean"),
}


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    num_seeds: int = 3
    num_epochs: int = 5
    num_prompts: int = 64
    """Prompts drawn at each checkpoint."""
    num_references: int = 1024
    """Reference rollouts of each of them."""
    num_batches: int = 512
    num_dimensions: int = 4096
    num_resamples: int = 2000
    max_train_prompts: int | None = None
    learning_rate: float = 3e-5
    task: str = "arithmetic"


QUICK = Scale(1, 2, 8, 32, 16, 256, 100, max_train_prompts=32)


@dataclass
class Measurement:
    """What was measured at a checkpoint."""

    seed: int
    history: int
    success_rates: np.ndarray
    """p of each prompt under the checkpoint, `[num_prompts]`."""
    sizes: dict[tuple[int, str], np.ndarray]
    """By setting and arm, `[num_prompts]`."""
    moments: list[KernelMoments]
    """Of each prompt's gradient, `[num_prompts]`."""
    head_moments: list[KernelMoments]
    """Of its part in the vocabulary head, projected, `[num_prompts]`."""
    deviations: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    """By mode and arm, squared distances from the mean gradient whose mean is the variance, `[num_batches]`."""
    squared_bias: dict[tuple[str, str], float] = field(default_factory=dict)
    """By mode and arm, relative to ‖∇J‖² or to uniform's."""
    length: dict[tuple[str, str], float] = field(default_factory=dict)
    """By mode and arm, length of the mean gradient relative to uniform's."""

    def variances(self, kind: str, setting: int, arm: str) -> np.ndarray:
        """What each prompt adds to the variance, up to a factor, `[num_prompts]`.

        Args:
            kind: `gradient`, exact; `head`, the head's part of it; `model`, p(1 − p)/(n − 1), what is minimised.
            setting: Row of `SETTINGS`.
            arm: Whose sizes.
        """
        sizes = self.sizes[setting, arm]
        if kind == "model":
            return self.success_rates * (1 - self.success_rates) / (sizes - 1)
        moments = self.moments if kind == "gradient" else self.head_moments
        return np.array([m.variance(size) for m, size in zip(moments, sizes.tolist(), strict=True)])


def debiased_square(vectors: np.ndarray) -> float:
    """Unbiased estimate of the mean vector's squared length from independent vectors, `[num_vectors, …]`."""
    mean, num_vectors = vectors.mean(0), len(vectors)
    return float((mean**2).sum() - ((vectors - mean) ** 2).sum() / (num_vectors * (num_vectors - 1)))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The central 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def ratio_to_uniform(
    arm: list[np.ndarray], uniform: list[np.ndarray], num_resamples: int
) -> tuple[float, float, float]:
    """Mean over checkpoints of Σ arm/Σ uniform, with its interval: checkpoints resampled, then what is summed."""
    above, below = np.stack(arm), np.stack(uniform)
    num_checkpoints, num_units = above.shape
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(num_resamples):
        rows = rng.integers(num_checkpoints, size=(num_checkpoints, 1))
        columns = rng.integers(num_units, size=(num_checkpoints, num_units))
        resampled.append(np.mean(above[rows, columns].sum(1) / below[rows, columns].sum(1)))
    return float(np.mean(above.sum(1) / below.sum(1))), *interval(np.array(resampled))


def difference_to(
    arm: list[np.ndarray], other: list[np.ndarray], uniform: list[np.ndarray], num_resamples: int
) -> tuple[float, float, float]:
    """Mean over checkpoints of (Σ arm − Σ other)/Σ uniform with its interval, resampled as in `ratio_to_uniform`."""
    ratio, low, high = ratio_to_uniform(
        [a - b + c for a, b, c in zip(arm, other, uniform, strict=True)], uniform, num_resamples
    )
    return ratio - 1, low - 1, high - 1


def relative_bias(squares: list[float], num_resamples: int) -> tuple[float, float, float]:
    """Signed root of the mean squared bias with its interval, checkpoints resampled."""
    rng, values = np.random.default_rng(0), np.array(squares)
    means = values[rng.integers(len(values), size=(num_resamples, len(values)))].mean(1)
    low, mean, high = (np.sign(x) * abs(x) ** 0.5 for x in (*interval(means)[:1], values.mean(), *interval(means)[1:]))
    return float(mean), float(low), float(high)


def arms_of(mode: str, cells: list[Measurement]) -> list[str]:
    """Arms that were measured in a mode, those of baselines last."""
    return list(dict.fromkeys(arm for cell in cells for found, arm in cell.deviations if found == mode))


def summarise(cells: list[Measurement], scale: Scale) -> list[dict[str, Any]]:
    """The headline: a record for each mode and arm, over checkpoints with 16 or more earlier rollouts."""
    cells = [cell for cell in cells if cell.history >= 16]
    records = []
    for mode in MODES:
        for arm in arms_of(mode, cells):
            exact = mode == "rloo+prompt_mean" and arm in ARMS
            values, uniform = (
                [cell.variances("gradient", 0, name) if exact else cell.deviations[mode, name] for cell in cells]
                for name in (arm, "uniform")
            )
            ratio, low, high = ratio_to_uniform(values, uniform, scale.num_resamples)
            _, bias_low, bias_high = relative_bias(
                [cell.squared_bias[mode, arm] for cell in cells], scale.num_resamples
            )
            numbers = {"ratio": ratio, "low": low, "high": high, "bias_low": bias_low, "bias_high": bias_high}
            records.append({"mode": mode, "arm": arm, **{name: round(value, 4) for name, value in numbers.items()}})
    return records


def shown(ratio: float, low: float, high: float) -> str:
    """A ratio with its interval."""
    return f"{ratio:.3f} [{low:.3f}, {high:.3f}]"


def print_exact(cells: list[Measurement], kind: str, setting: int, scale: Scale) -> None:
    """Print an exact ratio of every arm, by earlier rollouts."""
    groups = {
        str(history): [c for c in cells if c.history == history] for history in sorted({c.history for c in cells})
    }
    groups["16 and more"] = [cell for cell in cells if cell.history >= 16]
    mean, least, most = SETTINGS[setting]
    print(f"\n{KINDS[kind]} relative to uniform, mean group {mean}, sizes [{least}, {most}], by earlier rollouts")
    print(f"{'':16}" + "".join(f"{head:>24}" for head in groups))
    for arm in ARMS:
        ratios = [
            ratio_to_uniform(
                [cell.variances(kind, setting, arm) for cell in group],
                [cell.variances(kind, setting, "uniform") for cell in group],
                scale.num_resamples,
            )
            for group in groups.values()
        ]
        print(f"{arm:16}" + "".join(f"{shown(*ratio):>24}" for ratio in ratios))


def print_differences(cells: list[Measurement], scale: Scale) -> None:
    """Print how far the exact ratio of every arm lies above that of `oracle`, by setting."""
    print("\nExact variance ratio above that of oracle, paired, 16 and more earlier rollouts")
    print(f"{'':16}" + "".join(f"{f'mean {mean}, sizes [{least}, {most}]':>28}" for mean, least, most in SETTINGS))
    for arm in ARMS:
        shown_values = [
            shown(
                *difference_to(
                    *(
                        [cell.variances("gradient", number, name) for cell in cells]
                        for name in (arm, "oracle", "uniform")
                    ),
                    scale.num_resamples,
                )
            )
            for number in range(len(SETTINGS))
        ]
        print(f"{arm:16}" + "".join(f"{value:>28}" for value in shown_values))


def print_header(scale: Scale, num_processes: int, seconds: float) -> None:
    """Print what was measured and on what."""
    print(
        f"{scale.task}: {scale.num_seeds} seeds (from 0) × {scale.num_epochs} checkpoints × {scale.num_prompts} "
        f"prompts × {scale.num_references} reference rollouts; learning rate {scale.learning_rate:g}; "
        f"{platform.machine()} CPU, {num_processes} processes of one thread; torch {torch.__version__}; {seconds:.0f} s"
    )


def print_tables(cells: list[Measurement], records: list[dict[str, Any]], scale: Scale) -> None:
    """Print the headline and what is behind it."""
    for setting in range(len(SETTINGS)):
        print_exact(cells, "gradient", setting, scale)
    headline = [cell for cell in cells if cell.history >= 16]
    print(f"\n{scale.num_batches} batches, mean group 8, sizes [2, 24], 16 and more earlier rollouts")
    print(f"{'mode':18}{'arm':16}{'variance ratio':>24}{'bias, share of ‖∇J‖':>28}{'gradient length':>17}")
    for record in records:
        mode, arm = record["mode"], record["arm"]
        ratio = ratio_to_uniform(
            [cell.deviations[mode, arm] for cell in headline],
            [cell.deviations[mode, "uniform"] for cell in headline],
            scale.num_resamples,
        )
        bias = relative_bias([cell.squared_bias[mode, arm] for cell in headline], scale.num_resamples)
        length = np.mean([cell.length[mode, arm] for cell in headline])
        print(f"{mode:18}{arm:16}{shown(*ratio):>24}{shown(*bias):>28}{length:17.3f}")
    print_differences(headline, scale)
    for kind in ("head", "model"):
        print_exact(cells, kind, 0, scale)
    print("\n16 and more earlier rollouts: share of prompts by success rate; of Σ p(1 − p); of the variance")
    rates = np.concatenate([cell.success_rates for cell in headline])
    model, gradient = (
        np.concatenate([v / v.sum() for v in (cell.variances(kind, 0, "uniform") for cell in headline)]) / len(headline)
        for kind in ("model", "gradient")
    )
    for low, high in pairwise((0, 0.005, 0.05, 0.5, 0.8, 0.95, 0.995, 1.001)):
        chosen = (rates >= low) & (rates < high)
        print(
            f"{f'{low} ≤ p < {high}':20}{chosen.mean():12.3f}{model[chosen].sum():12.3f}{gradient[chosen].sum():12.3f}"
        )
    print("\nMean success rate and best possible ratio of the model without bounds, by earlier rollouts")
    for history in sorted({cell.history for cell in cells}):
        rates = np.concatenate([cell.success_rates for cell in cells if cell.history == history])
        print(f"{history:16}{rates.mean():12.3f}{best_variance_ratio(rates * (1 - rates)):12.3f}")
