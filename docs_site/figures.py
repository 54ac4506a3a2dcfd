"""The figures of the concept pages, drawn by the library's own functions.

python docs_site/figures.py --output_dir docs/figures
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamo_lightning.allocation import (
    BetaPosterior,
    NeymanRule,
    PaperBernoulli,
    PromptStatistics,
    ProportionalRule,
    RLOORule,
    UniformRule,
    allocate_rollouts,
)
from dynamo_lightning.allocation.variance import best_variance_ratio, variance_ratio
from dynamo_lightning.evaluation.metrics import pass_at_k
from dynamo_lightning.losses.engine_mismatch import EngineMismatch
from dynamo_lightning.losses.modulation import compensation_factor, stabilisation_factor
from dynamo_lightning.losses.weights import token_weights

NUM_PROMPTS, MEAN_SIZE = 512, 16


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(4.2 * count, 3.2), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def label(axis: Axes, title: str, x: str, y: str) -> None:
    """Title, axis names and, where curves are named, a legend."""
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def allocate(variances: np.ndarray, rule: object, low: int, high: int) -> np.ndarray:
    """Group sizes of prompts with known p(1 − p) and a mean size of 16."""
    ids, budget = np.arange(len(variances)), MEAN_SIZE * len(variances)
    return allocate_rollouts(variances, ids, budget, low, high, rule)  # type: ignore[arg-type]


def allocation() -> Figure:
    """Group sizes over the success rate, and the variance that is left over the spread of success rates."""
    figure, (sizes, ratios) = panels(2)
    p = (np.arange(NUM_PROMPTS) + 0.5) / NUM_PROMPTS
    variances = p * (1 - p)
    for rule in (RLOORule(), NeymanRule(), ProportionalRule(), UniformRule()):
        sizes.plot(p, allocate(variances, rule, 2, 64), label=type(rule).__name__)
    label(sizes, "512 prompts, sizes 2 to 64, mean 16", "success rate p", "rollouts n")
    shapes = np.geomspace(0.1, 5, 25)
    pools = [np.random.default_rng(0).beta(shape, shape, 20_000) for shape in shapes]
    for low, high in ((8, 24), (2, 64)):
        left = [variance_ratio(a, allocate(a, RLOORule(), low, high)) for a in (q * (1 - q) for q in pools)]
        ratios.plot(shapes, left, label=f"sizes {low} to {high}")
    ratios.plot(shapes, [best_variance_ratio(q * (1 - q)) for q in pools], ":", color="black", label="no bounds")
    ratios.set_xscale("log")
    label(ratios, "Variance if p is known", "c of p ~ Beta(c, c)", "relative to equal groups")
    return figure


def estimators() -> Figure:
    """The weight of a prompt after some successes, by what is known of all prompts."""
    figure, axes = panels(2)
    rng = np.random.default_rng(0)
    for axis, (name, pool) in zip(
        axes, {"p ~ Beta(0.2, 0.2)": rng.beta(0.2, 0.2, 2_000), "p ~ Beta(5, 5)": rng.beta(5, 5, 2_000)}.items(),
        strict=True,
    ):  # fmt: skip
        successes = np.arange(9)
        ids = np.arange(len(pool) + len(successes))
        outcomes = np.concatenate([rng.binomial(8, pool), successes])
        for estimator in (BetaPosterior(), PaperBernoulli()):
            statistics = PromptStatistics(estimator)
            statistics.observe(ids, outcomes, np.full(len(ids), 8), iteration=0)
            weight = statistics.estimate(ids[len(pool) :], iteration=0).bernoulli_variance
            axis.plot(successes, weight, "o-", label=type(estimator).__name__)
        axis.plot(successes, successes / 8 * (1 - successes / 8), ":", color="black", label="plug-in p̂(1 − p̂)")
        label(axis, f"Pool of 2,000 prompts, {name}", "successes of 8 rollouts", "E[p(1 − p)]")
    return figure


def baselines() -> Figure:
    """Variance that the optimal baseline leaves of the mean baseline's, and how often a group has no signal."""
    figure, (ratios, equal) = panels(2)
    p = np.linspace(0.01, 0.99, 99)
    for contrast in (1, 2, 4, 10):  # E[‖s‖² | incorrect] / E[‖s‖² | correct]
        left = contrast / ((p + (1 - p) * contrast) * ((1 - p) + p * contrast))
        ratios.plot(p, left, label=f"incorrect responses: {contrast} × ‖s‖²")
    label(ratios, "Optimal baseline", "success rate p", "E[(r − b*)²‖s‖²] relative to b = p")
    for size in (2, 4, 8, 16):
        equal.plot(p, p**size + (1 - p) ** size, label=f"n = {size}")
    label(equal, "Groups without a signal", "success rate p", "P(all rewards equal)")
    return figure


def modulation() -> Figure:
    """Both factors of the modulation."""
    figure, (compensation, stabilisation) = panels(2)
    entropy = torch.linspace(0, 3, 300)
    for alpha in (0.2, 0.4, 0.8):
        factor = compensation_factor(entropy, torch.ones_like(entropy), alpha=alpha, entropy_min=0.05, entropy_max=2.5)
        compensation.plot(entropy, factor, label=f"α = {alpha}")
    label(compensation, "Compensation, A > 0", "entropy H of the token, nats", "β_comp")
    share = torch.linspace(0, 1, 300)
    for gamma in (10.0, 50.0):
        factor = stabilisation_factor(share, alpha=0.4, gamma=gamma, tau=0.9, change_max=1.0)
        stabilisation.plot(share, factor, label=f"α = 0.4, γ = {gamma:.0f}")
    label(stabilisation, "Stabilisation", "|ΔH| / Ξ_max", "β_stab")
    return figure


def loss_weights() -> Figure:
    """The share of the objective that a prompt gets, by aggregation, where sizes are allocated."""
    figure, (axis,) = panels(1)
    p = (np.arange(64) + 0.5) / 64
    sizes = torch.as_tensor(allocate(p * (1 - p), RLOORule(), 2, 64))
    rows = torch.repeat_interleave(torch.arange(64), sizes)
    for aggregation in ("prompt_mean", "sequence_mean", "token_mean"):
        weights = token_weights(
            sizes[rows], torch.ones(len(rows)), torch.full((len(rows),), 100), aggregation=aggregation,
            length_normalisation="response_length", num_prompts=64, num_rollouts=len(rows),
            num_tokens=100 * len(rows), max_response_length=100,
        )  # fmt: skip
        of_prompt = torch.zeros(64).index_add(0, rows, 100 * weights)
        style = {"token_mean": ":"}.get(aggregation, "-")
        axis.plot(p, 64 * of_prompt, style, label=aggregation)
    label(axis, "Responses of equal length", "success rate p", "weight of the prompt × N")
    return figure


def mismatch() -> Figure:
    """The weight of a token over the difference of its two log-probabilities."""
    figure, (axis,) = panels(1)
    difference = torch.linspace(-1.5, 1.5, 600)
    for method in ("truncate", "mask", "off"):
        weights = EngineMismatch(method=method).weights(difference)
        axis.plot(difference, weights, "-" if method == "truncate" else "--", label=f"{method}")
    label(axis, "cap = 2", "log π_old(a) − log π_engine(a), nats", "weight of the token")
    return figure


def pass_at_k_curves() -> Figure:
    """pass@k over the success rate, and how noisy its estimate is."""
    figure, (curves, noise) = panels(2)
    p = np.linspace(0, 1, 101)
    for k in (1, 4, 32):
        curves.plot(p, 1 - (1 - p) ** k, label=f"k = {k}")
    label(curves, "One problem", "success rate p", "pass@k")
    rng = np.random.default_rng(0)
    rates = rng.beta(0.4, 0.8, 30)
    for k in (1, 32):
        spread = []
        for samples in (32, 64, 128, 256):
            correct = torch.as_tensor(rng.binomial(samples, rates, (2_000, 30)))
            counts = torch.full((2_000 * 30,), samples)
            spread.append(float(pass_at_k(counts, correct.flatten(), k).reshape(2_000, 30).mean(1).std()))
        noise.plot((32, 64, 128, 256), spread, "o-", label=f"k = {k}")
    noise.set_xscale("log", base=2)
    noise.set_ylim(0)
    label(noise, "30 problems, p ~ Beta(0.4, 0.8)", "samples n of each problem", "standard deviation of pass@k")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "allocation": allocation,
    "estimators": estimators,
    "baselines": baselines,
    "modulation": modulation,
    "loss_weights": loss_weights,
    "mismatch": mismatch,
    "pass_at_k": pass_at_k_curves,
}


def write(output_dir: str = "docs/figures") -> None:
    """Write every figure as SVG.

    Args:
        output_dir: Folder to write into.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "dynamo_lightning"  # ids, and with them files, that repeat
    for name, draw in FIGURES.items():
        path = folder / f"{name}.svg"
        figure = draw()
        figure.set_facecolor("white")  # readable on a dark page too
        figure.savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(write, as_positional=False)
