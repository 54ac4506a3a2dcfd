"""The checks in their order, inside a real `fit` of one small iteration whose update is discarded."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L

from dynamo_lightning.checks.allocation import check_allocation
from dynamo_lightning.checks.case import PROMPTS_PER_DATASET, CheckCase, score
from dynamo_lightning.checks.checkpoint import check_checkpoint
from dynamo_lightning.checks.cost import PhaseMemory, check_memory, check_time
from dynamo_lightning.checks.engine import check_engine
from dynamo_lightning.checks.packing import check_packing
from dynamo_lightning.checks.prompt import check_answer_format, check_prompt
from dynamo_lightning.checks.result import CheckResult, worst
from dynamo_lightning.checks.reward import check_reward
from dynamo_lightning.checks.reward_speed import check_reward_speed
from dynamo_lightning.checks.stopping import check_stopping
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.types import GroupPlan, Prompt, PromptBatch

RESPONSES_PER_PROMPT = 8
NUM_AFTER_FAILURE = 4
"""Rollouts that are scored if the reward of the first one failed."""


class _Found(Exception):
    """Ends the fit once an error is found: the measured iteration would fail by it."""


class CheckRun(L.Callback):
    """Runs the checks before the first batch, and measures that batch.

    Args:
        folder: Temporary folder.
        planned: Options of the planned run that the check has changed.
        run: Folder of an earlier run for the allocation; `None` assumes uniform success rates.
        report: Called with each result as it comes.
    """

    def __init__(
        self, folder: Path, planned: dict[str, Any], run: str | None, report: Callable[[CheckResult], None]
    ) -> None:
        self.folder, self.planned, self.run, self.report = folder, planned, run, report
        self.results: list[CheckResult] = []
        self.case: CheckCase | None = None
        self.memory: PhaseMemory | None = None
        self.bytes_before = 0

    def add(self, name: str, check: Callable[[], CheckResult]) -> None:
        """Run a check; a mistake of the user's that ends it is its result."""
        try:
            result = check()
        except (UserError, RunError) as error:
            result = CheckResult(name, "error", str(error))
        self.results.append(result)
        self.report(result)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """All checks that need no update."""
        assert isinstance(pl_module, PolicyModule)
        model, datamodule = pl_module, pl_module.datamodule
        assert isinstance(datamodule, RolloutDataModule)
        datamodule.prompts_per_batch = self.planned["prompts_per_batch"]  # the measured batch is made by now
        self.memory = PhaseMemory(model.device)
        self.add("allocation", lambda: check_allocation(datamodule, self.num_epochs(datamodule), self.run))
        with trainer.precision_plugin.forward_context():
            case = self.case = self.sample(trainer, model, datamodule)
            for name, check in (
                ("prompt", check_prompt),
                ("format", check_answer_format),
                ("stopping", check_stopping),
                ("reward", check_reward),
                ("scoring", check_reward_speed),
                ("engine", check_engine),
                ("packing", check_packing),
            ):
                self.add(name, lambda check=check: check(case))  # type: ignore[misc]
        self.add("checkpoint", lambda: check_checkpoint(trainer, model, self.folder))
        if worst(self.results) == "error":
            raise _Found
        with self.memory.measure("start"):
            pass
        self.bytes_before = self.memory.peaks.pop("start")
        model.phase = self.memory.wrap(model.phase)  # type: ignore[method-assign,assignment]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time and memory of the iteration."""
        assert isinstance(pl_module, PolicyModule) and self.case is not None and self.memory is not None
        case, memory, record = self.case, self.memory, outputs["record"]
        self.add("time", lambda: check_time(case, record, dict(pl_module.seconds)))
        self.add("memory", lambda: check_memory(case, record, memory, self.bytes_before))

    def num_epochs(self, datamodule: RolloutDataModule) -> float:
        """Epochs of the planned run, by its epochs or its optimizer steps."""
        epochs, steps = self.planned["max_epochs"], self.planned["max_steps"]
        limits = [float(epochs)] if epochs is not None and epochs >= 0 else []
        if steps is not None and steps >= 0:
            num_prompts = sum(len(prompts) for prompts in datamodule.loaded_prompts["train"])
            limits.append(steps / max(1, num_prompts / datamodule.prompts_per_batch))
        return min(limits, default=float("inf"))

    def sample(self, trainer: L.Trainer, model: PolicyModule, datamodule: RolloutDataModule) -> CheckCase:
        """Sample and score a few responses to two prompts of each data set."""
        prompts = few_prompts(datamodule)
        batch = PromptBatch(0, [GroupPlan(prompt, RESPONSES_PER_PROMPT) for prompt in prompts])
        assert model.policy is not None
        model.sync_generator()
        rollouts, _ = model.collector.sample(
            model.policy, model.tokenizer, batch, "train", model.sampling.temperature, submit=False
        )
        model.rest_generator()
        model.collector.scorer.watch.reset()  # failures are a result here, not the end
        own = [rollout for rollout in rollouts if rollout.environment_reward is None and rollout.status != "failed"]
        first = score(model, own[:1])  # workers start and warm up
        if first and first[0].failure is not None:
            own = own[:NUM_AFTER_FAILURE]  # each may take the whole time limit
        start = time.perf_counter()
        scores = score(model, own)
        seconds = time.perf_counter() - start
        return CheckCase(trainer, model, datamodule, tuple(prompts), tuple(rollouts), tuple(scores), seconds)


def few_prompts(datamodule: RolloutDataModule) -> list[Prompt]:
    """The first prompts of each data set that training and its validations use; each problem once."""
    found = {
        p.prompt_id: p
        for group in datamodule.loaded_prompts.values()
        for data in group
        for p in data[:PROMPTS_PER_DATASET]
    }
    return list(found.values())


def run_checks(
    trainer: L.Trainer,
    model: PolicyModule,
    datamodule: RolloutDataModule,
    folder: Path,
    planned: dict[str, Any],
    run: str | None = None,
    as_json: bool = False,
) -> list[CheckResult]:
    """Check a set-up and print one line for each check, or all as JSON.

    Args:
        trainer: For one iteration, see `settings.prepare`.
        model: The policy and its training step.
        datamodule: The data.
        folder: Temporary folder.
        planned: Options of the planned run that the check has changed.
        run: Folder of an earlier run for the allocation.
        as_json: Print JSON.
    """
    planned = {**planned, "prompts_per_batch": datamodule.prompts_per_batch}
    checks = CheckRun(folder, planned, run, (lambda result: None) if as_json else print_line)
    num_datasets = len(datamodule.sources["train"])
    small = max(PROMPTS_PER_DATASET * num_datasets, model.update_config.num_mini_batches)
    datamodule.prompts_per_batch = min(small, datamodule.prompts_per_batch)  # of the measured iteration
    trainer.callbacks.append(checks)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        if as_json:
            warnings.simplefilter("ignore")
        try:
            # Through the configuration, some versions of Python and jsonargparse read 1 as the share 1.0: all batches.
            trainer.limit_train_batches = 1
            trainer.fit(model, datamodule=datamodule)
        except _Found:
            pass
        except (UserError, RunError) as error:
            checks.results.append(CheckResult("set-up", "error", str(error)))
            checks.report(checks.results[-1])
    if as_json:
        print(json.dumps({"level": worst(checks.results), "checks": [asdict(r) for r in checks.results]}, indent=1))
    return checks.results


def print_line(result: CheckResult) -> None:
    """Print a result as it comes."""
    print(replace(result, message=" ".join(result.message.split())).line(), flush=True)
