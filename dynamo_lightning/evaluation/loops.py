"""The evaluation loops of the policy: sample and score the prompts of a benchmark, log pass@k with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from dynamo_lightning.distributed import run_seed
from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.environments import SingleTurn
from dynamo_lightning.evaluation.archive import make_record
from dynamo_lightning.evaluation.benchmarks import BenchmarkRun, EvaluationConfig, describe, weights_digest
from dynamo_lightning.evaluation.intervals import mean_interval
from dynamo_lightning.evaluation.metrics import PassAtK
from dynamo_lightning.rewards.reward import Reward
from dynamo_lightning.rollout.collect import RolloutCollector
from dynamo_lightning.types import PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EvaluationLoops(L.LightningModule):
    """`validate`, `test` and `predict`, with what they need of the module."""

    policy: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    model_name: str
    collector: RolloutCollector
    sampling: SamplingConfig
    reward: Reward
    pass_at_k: list[int]
    eval_temperature: float
    evaluation: EvaluationConfig

    def __init__(self) -> None:
        super().__init__()
        self._pass_at_k_metrics: dict[tuple[str, int], PassAtK] = {}
        self.problem_counts: dict[str, dict[str, list[int]]] = {}
        """Correct responses and all responses of the last validation, by data set and prompt id."""
        self._problem_rewards: dict[str, list[float]] = {}

    @property
    def datamodule(self) -> Any:
        """The trainer's `RolloutDataModule`, or one like it."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def sync_generator(self) -> None:
        """Have the generator sample from the weights as they are now."""
        raise NotImplementedError

    def rest_generator(self) -> None:
        """Nothing is sampled until the next `sync_generator`."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        """A checkpoint may have brought other weights, and updates have."""
        self.problem_counts, self._problem_rewards = {}, {}
        self.sync_generator()

    def on_test_epoch_start(self) -> None:
        """As in validation."""
        self.sync_generator()

    def on_predict_epoch_start(self) -> None:
        """As in validation."""
        self.sync_generator()

    def sample_responses(self, batch: PromptBatch, wanted: Collection[tuple[int, int]] | None = None) -> list[Rollout]:
        """This rank's share of an evaluation batch's responses; with `wanted`, only of those with these keys."""
        assert self.policy is not None
        return self.collector.sample(self.policy, self.tokenizer, batch, "evaluate", self.eval_temperature, wanted)[0]

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sample and score the prompts of one evaluation batch."""
        rollouts = self.sample_responses(batch)
        outcomes = self.collector.score(batch, rollouts)
        threshold = self.datamodule.success_threshold
        source = batch.prompts[0].source
        total = {prompt.prompt_id: 0 for prompt in batch.prompts}
        correct = dict(total)
        rewards: dict[int, list[float]] = {prompt_id: [] for prompt_id in total}
        for outcome in outcomes:
            total[outcome.prompt_id] += 1
            if math.isfinite(outcome.score.reward):
                rewards[outcome.prompt_id].append(outcome.score.reward)
            # A failed reward counts as wrong, also where training would drop the rollout (its reward is NaN then).
            correct[outcome.prompt_id] += outcome.score.reward >= threshold
        counts = self.problem_counts.setdefault(source, {})
        counts.update({str(prompt_id): [int(correct[prompt_id]), total[prompt_id]] for prompt_id in total})
        means = [statistics.fmean(values) for values in rewards.values() if values]
        self._problem_rewards.setdefault(source, []).extend(means)
        for k in self.pass_at_k:
            # Outcomes are those of all ranks already, so the metric must not add the ranks up once more.
            metric = self._pass_at_k_metrics.setdefault((source, k), PassAtK(k, sync_on_compute=False))
            metric.update(torch.tensor(list(correct.values())), torch.tensor(list(total.values())))

    def on_validation_epoch_end(self) -> None:
        """Log `val/{source}/pass@k` for every k and the mean reward `val/{source}/reward`, with their 95 % intervals.

        The mean reward, over problems, tells graded rewards apart where pass@k only sees `data.success_threshold`;
        rewards that failed and have no value are left out of it.
        """
        for (source, k), metric in self._pass_at_k_metrics.items():
            values = metric.compute()
            name = f"val/{source}/pass@{k}"
            self.log(name, values["mean"], prog_bar=k == min(self.pass_at_k))
            self.log_dict({f"{name}_low": values["low"], f"{name}_high": values["high"]})
            metric.reset()
        for source, means in self._problem_rewards.items():
            if means:
                rewards = torch.tensor(means, dtype=torch.float64)
                low, high = mean_interval(rewards)
                name = f"val/{source}/reward"
                self.log_dict({name: float(rewards.mean()), f"{name}_low": low, f"{name}_high": high})
        self.rest_generator()  # before any callback saves a checkpoint

    def on_test_start(self) -> None:
        """Look for responses of an evaluation like this one."""
        assert self.policy is not None
        settings = {
            "model_name": self.model_name,
            "weights": weights_digest(self.policy),
            "dtype": str(self.policy.dtype),
            "precision": self.trainer.precision,
            "generator": type(self.collector.generator).__name__,
            "generator_settings": self.collector.generator.settings(),
            "temperature": self.eval_temperature,
            "max_response_length": self.sampling.max_response_length,
            **{name: vars(stop) for name, stop in self.sampling.stop_options().items()},
            "seed": run_seed(),
            "reward": describe(self.reward),
        }
        environment = self.collector.runner.environment
        if type(environment) is not SingleTurn:
            settings["environment"] = describe(environment)
        label = Path(self.model_name.removeprefix("embedded:")).name
        threshold = self.datamodule.success_threshold
        self.benchmark_run = BenchmarkRun(self.pass_at_k, self.evaluation, threshold, label, settings)

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sample, score and keep the responses to one batch of a benchmark that are not there yet."""
        missing = self.benchmark_run.missing(batch)
        if self.reward.needs_group:  # it must see the responses again that are kept already
            again = {prompt_id for prompt_id, _ in missing}
            sizes = zip(batch.prompts, batch.group_sizes, strict=True)
            missing = {(p.prompt_id, i) for p, size in sizes if p.prompt_id in again for i in range(size)}
        if missing:
            rollouts = self.sample_responses(batch, missing)
            self.benchmark_run.add(batch, rollouts, self.collector.score(batch, rollouts))

    def on_test_epoch_end(self) -> None:
        """Log every number of every benchmark as `test/{source}/{metric}` with its 95 % interval."""
        for source, result in self.benchmark_run.results().items():
            for name, estimate in result.metrics.items():
                metric = f"test/{source}/{name}"
                self.log_dict({metric: estimate.value, f"{metric}_low": estimate.low, f"{metric}_high": estimate.high})

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Responses of this rank's share with their rewards: a dictionary of plain values for each."""
        rollouts = self.sample_responses(batch)
        scores = {outcome.key: outcome.score for outcome in self.collector.score(batch, rollouts)}
        return [make_record(rollout, scores[rollout.key]) for rollout in rollouts]
