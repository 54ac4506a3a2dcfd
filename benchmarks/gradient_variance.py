"""What allocation does to the policy gradient's variance and bias, measured on the embedded policy's own gradients.

    python benchmarks/gradient_variance.py --json benchmarks/results/gradient_variance.json

The quickstart is run with equal groups of 8, at a learning rate that lets five epochs see it learn; at the
quickstart's own, 1e-4, most of it is learnt after two. Every arm's statistics watch its outcomes. After each epoch,
when every prompt has 8, 16, 24, … earlier rollouts, 64 prompts are drawn and each arm shares out a budget of 8 rollouts
per prompt within the quickstart's bounds [2, 24] (a second table: 16 within [2, 64]). 1,024 fresh rollouts of each
prompt are the reference: their gradients with respect to all parameters, sketched to 4,096 dimensions, their rewards.

Exact: the reference's ζ₁ and ζ₂ in the leave-one-out formula `[4(n − 2)ζ₁ + 2ζ₂]/(n(n − 1))` with each arm's sizes, and
Σ over prompts relative to uniform: this is the ratio of mode `rloo+prompt_mean`. Batches: 512 for each arm, a
prompt's group drawn from its reference rollouts without replacement within a batch, anew for the next; the same draws
for all arms. They give the ratio in the other modes, which have no formula, and the bias in all: the debiased squared
distance of the mean gradient from ∇J (all reference rollouts, leave-one-out), relative to ‖∇J‖², then its root with its
sign. In the other modes, which do not estimate ∇J, it is the distance from the mean of uniform. Modulation is off.

Ratios are means over checkpoints. Intervals: 95 %, bootstrap over checkpoints and then prompts (exact) or batches,
paired with uniform; over checkpoints for the bias. The headline takes checkpoints with 16 or more earlier rollouts.

Arms: `beta_posterior` and `arcsine_kalman` with the `rloo` rule; `paper_bernoulli` with the `proportional` one, as in
the paper's code; `oracle`, the `rloo` rule told p(1 − p) of the reference; `oracle_gradient`, told each prompt's
gradient variance instead; `random_matched`, the sizes of `beta_posterior`, permuted. Statistics, rules, generator,
reward, advantages and weights are the library's own.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from dynamo_lightning.allocation import (
    AllocationRule,
    ArcsineKalman,
    BetaPosterior,
    PaperBernoulli,
    ProportionalRule,
    RLOORule,
    UniformRule,
    VarianceEstimator,
    allocate_rollouts,
    best_variance_ratio,
)
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.distributed import derive_seed
from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.gradient_variance import (
    KernelMoments,
    head_scores,
    kernel_moments,
    leave_one_out_gradient,
    parameter_scores,
)
from dynamo_lightning.losses.advantages import GRPO, RLOO
from dynamo_lightning.losses.weights import token_weights
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
from dynamo_lightning.rewards.math import MathReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.types import Prompt, Rollout, RolloutRequest
from dynamo_lightning.update.config import UpdateConfig

MODEL = "embedded:arithmetic-qwen3"
MAX_RESPONSE_LENGTH, PROMPTS_PER_BATCH, ROLLOUTS_PER_PROMPT = 20, 32, 8  # the quickstart's
UPDATES = UpdateConfig(max_tokens_per_micro_batch=1024)
SETTINGS = ((8, 2, 24), (16, 2, 64))  # mean, smallest and largest group; the first is the quickstart's
LEARNERS: dict[str, tuple[Callable[[], VarianceEstimator], AllocationRule]] = {
    "beta_posterior": (partial(BetaPosterior, half_life=100), RLOORule()),
    "arcsine_kalman": (ArcsineKalman, RLOORule()),
    "paper_bernoulli": (PaperBernoulli, ProportionalRule()),
}
ARMS = ("uniform", *LEARNERS, "oracle", "oracle_gradient", "random_matched")
KINDS = {
    "gradient": "Exact variance of the leave-one-out gradient",
    "head": "The same of the vocabulary head alone, as VarianceReductionMonitor measures it,",
    "model": "Σ p(1 − p)/(n − 1), which allocation minimises,",
}
MODES = {
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


QUICK = Scale(1, 2, 8, 32, 16, 256, 100, max_train_prompts=32)


@dataclass(frozen=True)
class Checkpoint:
    """The uniform run after an epoch, and what each arm's statistics make of it."""

    seed: int
    epoch: int
    state: dict[str, torch.Tensor]
    prompts: tuple[Prompt, ...]
    variances: dict[str, np.ndarray]
    """Each learner's expected p(1 − p), `[num_prompts]`."""

    @property
    def history(self) -> int:
        """Earlier rollouts of every prompt."""
        return self.epoch * ROLLOUTS_PER_PROMPT


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


# --- the uniform run --------------------------------------------------------------------------------------------------


class Recorder(L.Callback):
    """Shows every outcome to every arm's statistics, and takes a checkpoint after each epoch."""

    def __init__(self, seed: int, num_prompts: int) -> None:
        self.seed, self.num_prompts = seed, num_prompts
        self.arms = {name: make_data(estimator()) for name, (estimator, _) in LEARNERS.items()}
        self.prompts: dict[int, Prompt] = {}
        self.iteration = 0
        self.checkpoints: list[Checkpoint] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Learn from the outcomes."""
        record = outputs["record"]
        self.prompts.update((prompt.prompt_id, prompt) for prompt in record.batch.prompts)
        self.iteration = record.batch.iteration + 1
        for data in self.arms.values():
            data.observe(record.batch, record.outcomes)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the prompts and ask every arm about them."""
        epoch = trainer.current_epoch + 1
        ids = np.random.default_rng([self.seed, epoch]).permutation(sorted(self.prompts))[: self.num_prompts].tolist()
        self.checkpoints.append(
            Checkpoint(
                self.seed,
                epoch,
                copy.deepcopy(pl_module.policy.state_dict()),
                tuple(self.prompts[i] for i in ids),
                {
                    name: data.allocator.statistics.estimate(ids, self.iteration).bernoulli_variance
                    for name, data in self.arms.items()
                },
            )
        )


def make_data(estimator: VarianceEstimator, max_prompts: int | None = None) -> RolloutDataModule:
    """The quickstart's data module with equal groups."""
    return RolloutDataModule(
        train=PromptSource(
            "embedded:arithmetic/train.jsonl", "arithmetic", template="{prompt}", max_prompts=max_prompts
        ),
        prompts_per_batch=PROMPTS_PER_BATCH,
        rollouts_per_prompt=ROLLOUTS_PER_PROMPT,
        max_prompt_length=64,
        rule=UniformRule(),
        estimator=estimator,
    )


def train(seed: int, scale: Scale) -> list[Checkpoint]:
    """Run the quickstart with equal groups; return a checkpoint for each epoch."""
    quiet()
    L.seed_everything(seed, verbose=False)
    recorder = Recorder(seed, scale.num_prompts)
    module = PolicyModule(
        MODEL,
        generator=TransformersEngine(batch_size=256),
        sampling=SamplingConfig(max_response_length=MAX_RESPONSE_LENGTH),
        reward=MathReward(),
        scoring=ScoringConfig(num_workers=1),
        updates=UPDATES,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=scale.learning_rate, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=scale.num_epochs,
        logger=False,
        callbacks=[recorder],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=make_data(BetaPosterior(), scale.max_train_prompts))
    return recorder.checkpoints


# --- a checkpoint -----------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """The reference rollouts of one prompt; equal responses are kept once."""

    responses: list[Rollout]
    """`[num_distinct]`."""
    index: np.ndarray
    """Which response each rollout is, `[num_references]`."""
    rewards: np.ndarray
    """`[num_distinct]`."""
    scores: np.ndarray | None = None
    """Sketched gradients, `[num_distinct, num_dimensions]`; None if all rewards are equal: they then weigh nothing."""
    head_scores: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """How often each response came, `[num_distinct]`."""
        return np.bincount(self.index, minlength=len(self.responses))

    def moments(self, scores: np.ndarray | None) -> KernelMoments:
        """What the exact variance of the leave-one-out gradient follows from."""
        return KernelMoments(0, 0, 0) if scores is None else kernel_moments(self.rewards, scores, self.counts)


@cache
def scorer() -> RewardScorer:
    """One for each process: its worker remembers the answers that it has judged."""
    pool = RewardScorer(MathReward(), ScoringConfig(num_workers=1))
    pool.start()
    Finalize(None, pool.close, exitpriority=10)  # `atexit` is for the main process; others would wait for its worker
    return pool


def sample_references(policy: Any, checkpoint: Checkpoint, scale: Scale) -> list[Reference]:
    """Sample, score and differentiate the reference rollouts of the checkpoint's prompts."""
    key = (checkpoint.seed, "reference", checkpoint.epoch)
    requests = [
        RolloutRequest(prompt, index, derive_seed(*key, prompt.prompt_id, index))
        for prompt in checkpoint.prompts
        for index in range(scale.num_references)
    ]
    rollouts = TransformersEngine(batch_size=256).generate(
        policy, load_tokenizer(MODEL), requests, max_response_length=MAX_RESPONSE_LENGTH, temperature=1.0
    )
    references = []
    for start in range(0, len(rollouts), scale.num_references):
        own = rollouts[start : start + scale.num_references]
        distinct = {tuple(rollout.token_ids.tolist()): rollout for rollout in own}
        row = {tokens: number for number, tokens in enumerate(distinct)}
        index = np.array([row[tuple(rollout.token_ids.tolist())] for rollout in own])
        references.append(Reference(list(distinct.values()), index, np.zeros(len(distinct))))
    scored = iter(scorer().score([response for reference in references for response in reference.responses]))
    for reference in references:
        reference.rewards = np.array([next(scored).reward for _ in reference.responses])
    for reference in references:
        if np.ptp(reference.rewards):
            options = {"temperature": 1.0, "seed": derive_seed(*key)}
            sketch = parameter_scores(policy, reference.responses, num_dimensions=scale.num_dimensions, **options)
            head = head_scores(
                policy, reference.responses, reference.responses[0], UPDATES, num_projections=256, **options
            )
            reference.scores, reference.head_scores = sketch.numpy(), head.numpy()
    return references


def measure(checkpoint: Checkpoint, scale: Scale) -> Measurement:
    """Measure variance and bias of every arm and mode at a checkpoint."""
    quiet()
    policy = load_policy(MODEL, PolicyConfig(attn_implementation="eager")).eval()
    policy.load_state_dict(checkpoint.state)
    references = sample_references(policy, checkpoint, scale)
    rates = np.array([reference.rewards @ reference.counts / scale.num_references for reference in references])
    whole = [reference.moments(reference.scores) for reference in references]
    head = [reference.moments(reference.head_scores) for reference in references]
    sizes = {
        (number, arm): groups
        for number, setting in enumerate(SETTINGS)
        for arm, groups in allocate(checkpoint, rates, whole, *setting).items()
    }
    result = Measurement(checkpoint.seed, checkpoint.history, rates, sizes, whole, head)
    first = {arm: sizes[0, arm] for arm in ARMS}
    measure_batches(result, references, first, scale, np.random.default_rng([checkpoint.seed, checkpoint.epoch, 1]))
    return result


def allocate(
    checkpoint: Checkpoint, rates: np.ndarray, moments: list[KernelMoments], mean: int, least: int, most: int
) -> dict[str, np.ndarray]:
    """Group sizes of every arm, `[num_prompts]` each."""
    ids = [prompt.prompt_id for prompt in checkpoint.prompts]
    bounds = (mean * len(ids), least, most)
    sizes = {"uniform": allocate_rollouts(np.ones(len(ids)), ids, *bounds, UniformRule())}
    for arm, (_, rule) in LEARNERS.items():
        sizes[arm] = allocate_rollouts(checkpoint.variances[arm], ids, *bounds, rule)
    sizes["oracle"] = allocate_rollouts(rates * (1 - rates), ids, *bounds, RLOORule())
    # a/(n − 1) with the a that is right at the mean size; of a prompt that is hardly ever right it may come out < 0.
    known = np.maximum([m.variance(mean) * (mean - 1) for m in moments], 0)
    sizes["oracle_gradient"] = allocate_rollouts(known / max(known.max(), 1e-300), ids, *bounds, RLOORule())
    permutation = np.random.default_rng([checkpoint.seed, checkpoint.epoch, 2]).permutation(len(ids))
    sizes["random_matched"] = sizes["beta_posterior"][permutation]
    return sizes


def measure_batches(
    result: Measurement,
    references: list[Reference],
    sizes: dict[str, np.ndarray],
    scale: Scale,
    rng: np.random.Generator,
) -> None:
    """Add what batches of rollouts show: every arm sees the first n_i of the same draws."""
    largest = min(max(int(groups.max()) for groups in sizes.values()), scale.num_references)
    everything = np.tile(np.arange(scale.num_references), (scale.num_batches, 1))
    draws = [rng.permuted(everything, axis=1)[:, :largest].copy() for _ in references]
    gradient = sum(
        leave_one_out_gradient(r.rewards, r.scores, r.counts) for r in references if r.scores is not None
    ) / (len(references) * MAX_RESPONSE_LENGTH)
    for mode in MODES:
        uniform = batch_gradients(mode, references, draws, sizes["uniform"], scale)
        uniform_length = debiased_square(uniform) ** 0.5
        for arm in ARMS:
            gradients = uniform if arm == "uniform" else batch_gradients(mode, references, draws, sizes[arm], scale)
            spread = ((gradients - gradients.mean(0)) ** 2).sum(1) * len(gradients) / (len(gradients) - 1)
            result.deviations[mode, arm] = spread
            target, length = (
                (gradient, np.linalg.norm(gradient)) if mode == "rloo+prompt_mean" else (uniform, uniform_length)
            )
            result.squared_bias[mode, arm] = debiased_square(gradients - target) / length**2
            result.length[mode, arm] = max(debiased_square(gradients), 0.0) ** 0.5 / uniform_length


def batch_gradients(
    mode: str, references: list[Reference], draws: list[np.ndarray], sizes: np.ndarray, scale: Scale
) -> np.ndarray:
    """Gradient of every batch by the library's advantages and weights, `[num_batches, num_dimensions]`, float64."""
    advantage, aggregation = MODES[mode]
    num_batches, num_prompts = scale.num_batches, len(references)
    rows = [reference.index[drawn[:, :size]] for reference, drawn, size in zip(references, draws, sizes, strict=True)]
    rewards = np.concatenate([reference.rewards[row] for reference, row in zip(references, rows, strict=True)], axis=1)
    lengths = np.concatenate(
        [np.array([len(r.token_ids) for r in ref.responses])[row] for ref, row in zip(references, rows, strict=True)],
        axis=1,
    )
    group = np.repeat(np.arange(num_prompts), sizes) + num_prompts * np.arange(num_batches)[:, None]
    advantages = advantage(torch.from_numpy(rewards.ravel()), torch.from_numpy(group.ravel())).reshape(rewards.shape)
    group_sizes = torch.from_numpy(np.repeat(sizes, sizes))
    weights = torch.stack(
        [
            token_weights(
                group_sizes,
                torch.ones(len(group_sizes)),
                torch.from_numpy(batch),
                aggregation=aggregation,
                length_normalisation="max_response_length",
                num_prompts=num_prompts,
                num_rollouts=len(group_sizes),
                num_tokens=int(batch.sum()),
                max_response_length=MAX_RESPONSE_LENGTH,
            )
            for batch in lengths
        ]
    )
    coefficients = (advantages * weights).numpy()
    gradients, column = 0.0, 0
    for reference, row, size in zip(references, rows, sizes, strict=True):
        if reference.scores is not None:
            matrix = np.zeros((num_batches, len(reference.responses)), dtype=np.float32)
            np.add.at(matrix, (np.arange(num_batches)[:, None], row), coefficients[:, column : column + size])
            gradients = gradients + (matrix @ reference.scores).astype(np.float64)
        column += size
    return np.asarray(gradients)


def debiased_square(vectors: np.ndarray) -> float:
    """Unbiased estimate of the mean vector's squared length from independent vectors, `[num_vectors, …]`."""
    mean, num_vectors = vectors.mean(0), len(vectors)
    return float((mean**2).sum() - ((vectors - mean) ** 2).sum() / (num_vectors * (num_vectors - 1)))


# --- all checkpoints --------------------------------------------------------------------------------------------------


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
        rows = rng.integers(num_checkpoints, size=num_checkpoints)[:, None]
        columns = rng.integers(num_units, size=(num_checkpoints, num_units))
        resampled.append(np.mean(above[rows, columns].sum(1) / below[rows, columns].sum(1)))
    return float(np.mean(above.sum(1) / below.sum(1))), *interval(np.array(resampled))


def relative_bias(squares: list[float], num_resamples: int) -> tuple[float, float, float]:
    """Signed root of the mean squared bias with its interval, checkpoints resampled."""
    rng, values = np.random.default_rng(0), np.array(squares)
    means = values[rng.integers(len(values), size=(num_resamples, len(values)))].mean(1)
    low, mean, high = (np.sign(x) * abs(x) ** 0.5 for x in (*interval(means)[:1], values.mean(), *interval(means)[1:]))
    return float(mean), float(low), float(high)


def summarise(cells: list[Measurement], scale: Scale) -> list[dict[str, Any]]:
    """The headline: a record for each mode and arm, over checkpoints with 16 or more earlier rollouts."""
    cells = [cell for cell in cells if cell.history >= 16]
    records = []
    for mode in MODES:
        for arm in ARMS:
            exact = mode == "rloo+prompt_mean"
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


def quiet() -> None:
    """One thread for each process; no chatter."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def workers(num_processes: int) -> Iterator[Callable[..., Any]]:
    """A map over so many processes; results do not depend on their number."""
    if num_processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    pool: Executor
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        yield pool.map


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the headline as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the records to")
    parser.add_argument("--quick", action="store_true", help="a few prompts and rollouts: shows that it runs")
    parser.add_argument("--seeds", type=int, default=Scale.num_seeds, help="uniform runs")
    parser.add_argument("--epochs", type=int, default=Scale.num_epochs, help="checkpoints of each, at least 2")
    parser.add_argument("--learning_rate", type=float, default=Scale.learning_rate, help="of the uniform runs")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="processes, a thread each")
    options = parser.parse_args(arguments)
    if options.epochs < 2 or options.seeds < 1:
        parser.error("at least 2 epochs (16 earlier rollouts) of 1 seed are needed")
    chosen = Scale(num_seeds=options.seeds, num_epochs=options.epochs, learning_rate=options.learning_rate)
    scale = QUICK if options.quick else chosen
    start = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with workers(1 if options.quick else options.processes) as run:
        runs = run(partial(train, scale=scale), range(scale.num_seeds))
        cells = list(run(partial(measure, scale=scale), [checkpoint for found in runs for checkpoint in found]))
    records = summarise(cells, scale)
    print(
        f"{scale.num_seeds} seeds (0 to {scale.num_seeds - 1}) × {scale.num_epochs} checkpoints × {scale.num_prompts} "
        f"prompts × {scale.num_references} reference rollouts; learning rate {scale.learning_rate:g}; "
        f"{platform.machine()} CPU, {options.processes} "
        f"processes of one thread; torch {torch.__version__}; {time.perf_counter() - start:.0f} s"
    )
    print_tables(cells, records, scale)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
