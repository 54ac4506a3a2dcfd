"""Prospects of the allocation: where it acts, and how far it can lower the gradient's variance with these bounds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dynamo_lightning.allocation.records import Estimate, FloatArray
from dynamo_lightning.allocation.variance import best_variance_ratio, variance_ratio
from dynamo_lightning.checks.result import CheckResult
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.errors import MissingFileError

NUM_BATCHES = 20


def check_allocation(datamodule: RolloutDataModule, num_epochs: float, run: str | None) -> CheckResult:
    """First epoch, bounds and best possible variance ratio.

    Args:
        datamodule: With loaded prompts.
        num_epochs: Epochs of the planned run; may be infinite.
        run: Folder of an earlier run whose success rates are taken; without one they are assumed to be uniform.
    """
    budget, size = datamodule.allocator.budget, datamodule.prompts_per_batch
    num_prompts = sum(len(prompts) for prompts in datamodule.loaded_prompts["train"])
    size = min(size, num_prompts)
    rates = None if run is None else last_success_rates(Path(run))
    pool = np.linspace(0, 1, 101)[1:-1] if rates is None or not len(rates) else rates
    best, reached = possible_ratio(datamodule, pool, size)
    origin = "uniformly distributed success rates" if pool is not rates else f"the last success rates of {run}"
    epoch = -(-num_prompts // size)
    numbers = {
        "iterations_per_epoch": epoch,
        "min_rollouts": budget.min_rollouts,
        "max_rollouts": budget.max_rollouts,
        "best_ratio": best,
        "ratio_in_bounds": reached,
        "prompts": num_prompts,
    }
    message = (
        f"groups of {budget.min_rollouts} to {budget.max_rollouts}; with {origin} the gradient's variance is "
        f"{reached:.2f} of equal groups' at best ({best:.2f} without bounds)"
    )
    if budget.min_rollouts == budget.max_rollouts:
        return CheckResult(
            "allocation",
            "warning",
            f"{message}: data.min_rollouts and data.max_rollouts are equal, so the allocation does nothing",
            numbers,
        )
    if num_epochs <= 1 and not budget.pilot:
        return CheckResult(
            "allocation",
            "warning",
            f"{message}, but prompts are unseen in the first epoch ({epoch} RL iterations) and the run ends with it: "
            "raise trainer.max_epochs, or set data.pilot",
            numbers,
        )
    first = "" if budget.pilot else f"; it begins after the first epoch, {epoch} RL iterations"
    return CheckResult("allocation", "ok", message + first, numbers)


def possible_ratio(datamodule: RolloutDataModule, rates: FloatArray, size: int) -> tuple[float, float]:
    """Mean variance ratio of random batches whose success rates are known, without and with the bounds.

    Args:
        datamodule: Holds the allocator.
        rates: Success rates of a pool of prompts.
        size: Prompts of a batch.
    """
    generator = np.random.default_rng(0)
    best, reached = [], []
    for _ in range(NUM_BATCHES):
        chosen = generator.choice(rates, size)
        variances = chosen * (1 - chosen)
        estimate = Estimate(chosen, variances, np.zeros(size, dtype=bool), np.ones(size))
        sizes = datamodule.allocator.allocate(estimate, list(range(size)))
        best.append(best_variance_ratio(variances))
        reached.append(variance_ratio(variances, sizes))
    return float(np.mean(best)), float(np.mean(reached))


def last_success_rates(run: Path) -> FloatArray:
    """Last share of successes of each prompt in a run's `groups.jsonl`, `[num_prompts]`; damaged lines are left out.

    Raises:
        MissingFileError: If the run has no such file.
    """
    path = run / "groups.jsonl"
    if not path.is_file():
        raise MissingFileError(f"run={run}: there is no {path}, which the callback GroupTable writes")
    rates: dict[int, float] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                groups = list(zip(row["prompt_ids"], row["successes"], row["sizes"], strict=True))
            except (ValueError, KeyError, TypeError):  # torn by a kill
                continue
            rates.update({prompt: successes / count for prompt, successes, count in groups if count})
    return np.array(list(rates.values()), dtype=np.float64)
