"""What allocation does to the policy gradient's variance and bias, measured on the embedded policy's own gradients.

    python benchmarks/gradient_variance.py --json benchmarks/results/gradient_variance.json
    python benchmarks/gradient_variance.py --task chain --json benchmarks/results/gradient_variance_chain.json

With `--task chain` the policy of `chain.yaml` takes the place of the quickstart's. The quickstart is run with equal
groups of 8, at a learning rate that lets five epochs see it learn; at the quickstart's own, 1e-4, most of it is learned
after two. Every arm's statistics see its outcomes. After each epoch, when every prompt has 8, 16, 24, … earlier
rollouts, 64 prompts are drawn and each arm allocates a budget of 8 rollouts per prompt within the quickstart's bounds
[2, 24] (a second table: 16 within [2, 64]). 1,024 fresh rollouts of each prompt are the reference: their gradients with
respect to all parameters, sketched to 4,096 dimensions, their rewards.

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
gradient variance instead; `random_matched`, the sizes of `beta_posterior`, permuted. `filter` is `LogitFilter` with the
`rloo` rule, `filter_followers` the same with `all_follow: false`, `score_ratio` that with `ScoreRatioRule(0.1)`.
Differences from `oracle` are paired with it. In mode `rloo+prompt_mean`, from the batches: `optimal_baseline`, the
weighted leave-one-out baseline with the filter's sizes by `OptimalBaselineRule`; `optimal_baseline_history`, with the
uniform run's own rewards as its prior and sizes from 1; both with equal groups (`…_uniform`); `history_oracle`, told
p(1 − p). Prompts whose reference rewards are all equal have a gradient there, too: their scores are centred, so that ∇J
is 0 for them. Statistics, rules, generator, reward, advantages and weights are the library's own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from dynamo_lightning.allocation import BetaPosterior, Estimate, RLOORule, UniformRule, allocate_rollouts
from dynamo_lightning.losses.weights import token_weights
from dynamo_lightning.measure.moments import KernelMoments, leave_one_out_gradient
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.types import Prompt

sys.path.insert(0, str(Path(__file__).parent))  # also when loaded by its path

from variance_baselines import BASELINE_ARMS, BaselineArm, baseline_advantages
from variance_references import Checkpoint, Reference, kept, sample_references
from variance_tables import (
    ARMS,
    LEARNERS,
    MODES,
    QUICK,
    SETTINGS,
    Measurement,
    Scale,
    debiased_square,
    print_header,
    print_tables,
    summarise,
)
from variance_tasks import TASKS, WatchedRLOO, make_data, make_module, make_trainer
from workers import quiet, workers

MAX_RESPONSE_LENGTH = TASKS["arithmetic"].max_response_length


# --- the uniform run --------------------------------------------------------------------------------------------------


class Recorder(L.Callback):
    """Takes a checkpoint after each epoch."""

    def __init__(self, seed: int, scale: Scale, advantage: WatchedRLOO) -> None:
        self.seed, self.num_prompts, self.advantage = seed, scale.num_prompts, advantage
        self.prompts: dict[int, Prompt] = {}
        self.iteration = 0
        self.checkpoints: list[Checkpoint] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take note of the prompts."""
        record = outputs["record"]
        self.prompts.update((prompt.prompt_id, prompt) for prompt in record.batch.prompts)
        self.iteration = record.batch.iteration + 1

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the prompts."""
        epoch = trainer.current_epoch + 1
        ids = np.random.default_rng([self.seed, epoch]).permutation(sorted(self.prompts))[: self.num_prompts].tolist()
        self.checkpoints.append(
            Checkpoint(
                self.seed,
                epoch,
                copy.deepcopy(pl_module.policy.state_dict()),
                tuple(self.prompts[i] for i in ids),
                tuple(part.numpy() for part in self.advantage.history.prior(torch.tensor(ids), self.iteration)),
                self.iteration,
                self.advantage.log.arrays(),
            )
        )


def train(seed: int, scale: Scale, folder: Path | None = None) -> list[Checkpoint]:
    """Run the task with equal groups; return a checkpoint for each epoch."""
    return kept(folder, f"checkpoints_{seed}", lambda: run_uniform(seed, scale))


def run_uniform(seed: int, scale: Scale) -> list[Checkpoint]:
    """The same, without looking for one that was kept."""
    quiet()
    L.seed_everything(seed, verbose=False)
    task, advantage = TASKS[scale.task], WatchedRLOO()
    recorder = Recorder(seed, scale, advantage)
    module = make_module(task, advantage, scale.learning_rate)
    data = make_data(task, BetaPosterior(), scale.max_train_prompts)
    make_trainer(scale.num_epochs, [recorder]).fit(module, datamodule=data)
    return recorder.checkpoints


# --- a checkpoint -----------------------------------------------------------------------------------------------------


def measure(checkpoint: Checkpoint, scale: Scale, folder: Path | None = None) -> Measurement:
    """Measure variance and bias of every arm and mode at a checkpoint."""
    quiet()

    def sample() -> list[Reference]:
        policy = load_policy(TASKS[scale.task].model, PolicyConfig(attn_implementation="eager")).eval()
        policy.load_state_dict(checkpoint.state)
        return sample_references(policy, checkpoint, scale)

    references = kept(folder, f"references_{checkpoint.seed}_{checkpoint.epoch}", sample)
    rates = np.array([reference.rewards @ reference.counts / scale.num_references for reference in references])
    whole = [reference.moments(reference.scores) for reference in references]
    head = [reference.moments(reference.head_scores) for reference in references]
    estimates = {name: checkpoint.estimate(make()) for name, (make, _) in LEARNERS.items()}
    sizes = {
        (number, arm): groups
        for number, setting in enumerate(SETTINGS)
        for arm, groups in allocate(checkpoint, estimates, rates, whole, *setting).items()
    }
    result = Measurement(checkpoint.seed, checkpoint.history, rates, sizes, whole, head)
    first = {arm: sizes[0, arm] for arm in (*ARMS, *BASELINE_ARMS)}
    measure_batches(result, references, first, scale, np.random.default_rng([checkpoint.seed, checkpoint.epoch, 1]))
    return result


def allocate(
    checkpoint: Checkpoint,
    estimates: dict[str, Estimate],
    rates: np.ndarray,
    moments: list[KernelMoments],
    mean: int,
    least: int,
    most: int,
) -> dict[str, np.ndarray]:
    """Group sizes of every arm, `[num_prompts]` each; `estimates` by learner."""
    ids = [prompt.prompt_id for prompt in checkpoint.prompts]
    bounds = (mean * len(ids), least, most)
    sizes = {"uniform": allocate_rollouts(np.ones(len(ids)), ids, *bounds, UniformRule())}
    for arm, (_, rule) in LEARNERS.items():
        sizes[arm] = allocate_rollouts(estimates[arm], ids, *bounds, rule)
    sizes["oracle"] = allocate_rollouts(rates * (1 - rates), ids, *bounds, RLOORule())
    # a/(n − 1) with the a that is right at the mean size; of a prompt that is hardly ever right it may come out < 0.
    known = np.maximum([m.variance(mean) * (mean - 1) for m in moments], 0)
    sizes["oracle_gradient"] = allocate_rollouts(known / max(known.max(), 1e-300), ids, *bounds, RLOORule())
    for arm, baseline in BASELINE_ARMS.items():
        weights = rates * (1 - rates) if arm == "history_oracle" else estimates["filter"]
        low = max(baseline.rule.minimum_group_size, least if not baseline.uses_history else 1)
        sizes[arm] = allocate_rollouts(weights, ids, mean * len(ids), low, most, baseline.rule)
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
    ) / (len(references) * TASKS[scale.task].max_response_length)
    for mode in MODES:
        uniform = batch_gradients(mode, references, draws, sizes["uniform"], scale)
        uniform_length = debiased_square(uniform) ** 0.5
        knows_norms = mode == "rloo+prompt_mean" and all(reference.norms is not None for reference in references)
        for arm in (*ARMS, *(BASELINE_ARMS if knows_norms else ())):
            gradients = uniform
            if arm != "uniform":
                gradients = batch_gradients(mode, references, draws, sizes[arm], scale, BASELINE_ARMS.get(arm))
            spread = ((gradients - gradients.mean(0)) ** 2).sum(1) * len(gradients) / (len(gradients) - 1)
            result.deviations[mode, arm] = spread
            unbiased = mode == "rloo+prompt_mean"
            target = gradient if unbiased else uniform
            length = float(np.linalg.norm(gradient)) if unbiased else uniform_length
            result.squared_bias[mode, arm] = debiased_square(gradients - target) / length**2
            result.length[mode, arm] = max(debiased_square(gradients), 0.0) ** 0.5 / uniform_length


def batch_gradients(
    mode: str,
    references: list[Reference],
    draws: list[np.ndarray],
    sizes: np.ndarray,
    scale: Scale,
    baseline: BaselineArm | None = None,
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
    if baseline is None:
        flat = advantage(torch.from_numpy(rewards.ravel()), torch.from_numpy(group.ravel()))
    else:
        norms = np.concatenate([ref.norms[row] for ref, row in zip(references, rows, strict=True)], axis=1)  # type: ignore[index]
        priors = np.repeat(np.array([reference.prior for reference in references]), sizes, axis=0)
        means, strengths = (np.tile(part, num_batches) for part in priors.T)
        prior = (means, strengths) if baseline.uses_history else None
        flat = baseline_advantages(rewards.ravel(), norms.ravel(), group.ravel(), prior)
    advantages = flat.reshape(rewards.shape)
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
                max_response_length=TASKS[scale.task].max_response_length,
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


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the headline as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the records to")
    parser.add_argument("--quick", action="store_true", help="a few prompts and rollouts: shows that it runs")
    parser.add_argument("--task", choices=TASKS, default="arithmetic", help="whose policy and prompts")
    parser.add_argument("--prompts", type=int, default=Scale.num_prompts, help="drawn at each checkpoint")
    parser.add_argument("--references", type=int, default=Scale.num_references, help="rollouts of each of them")
    parser.add_argument("--seeds", type=int, default=Scale.num_seeds, help="uniform runs")
    parser.add_argument("--epochs", type=int, default=Scale.num_epochs, help="checkpoints of each, at least 2")
    parser.add_argument("--histories", type=int, nargs="+", help="measure only after so many earlier rollouts of each")
    parser.add_argument("--learning_rate", type=float, default=Scale.learning_rate, help="of the uniform runs")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="processes, a thread each")
    parser.add_argument("--keep", type=Path, help="folder that keeps runs and rollouts, so that a repeated call, which "
                        "must have the same options, only computes what is missing")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.epochs < 2 or options.seeds < 1:
        parser.error("at least 2 epochs (16 earlier rollouts) of 1 seed are needed")
    chosen = Scale(
        num_seeds=options.seeds,
        num_epochs=options.epochs,
        num_prompts=options.prompts,
        num_references=options.references,
        learning_rate=options.learning_rate,
    )
    scale = replace(QUICK if options.quick else chosen, task=options.task)
    start = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with workers(1 if options.quick else options.processes) as run:
        runs = run(partial(train, scale=scale, folder=options.keep), range(scale.num_seeds))
        wanted = options.histories
        checkpoints = [
            checkpoint for found in runs for checkpoint in found if not wanted or checkpoint.history in wanted
        ]
        cells = list(run(partial(measure, scale=scale, folder=options.keep), checkpoints))
    records = summarise(cells, scale)
    print_header(scale, options.processes, time.perf_counter() - start)
    print_tables(cells, records, scale)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
