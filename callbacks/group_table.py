"""Writes down each iteration's groups: how many rollouts each prompt got, and how many of them succeeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dynamo_lightning.errors import UserError
from dynamo_lightning.runs.json_lines import JsonLinesLog
from dynamo_lightning.runs.step_metrics import log_step_metrics
from dynamo_lightning.types import IterationRecord


def group_columns(record: IterationRecord, success_threshold: float) -> dict[str, list[Any]]:
    """The groups of an iteration, a value for each prompt in the batch's order; prompts without outcome are left out.

    Args:
        record: The iteration.
        success_threshold: A rollout with at least this reward is a success.

    Returns:
        `prompt_ids`; `sizes` and `successes`, scored rollouts and those that succeeded; `expected`, the success rate
        expected before the rollouts; `tokens`, response tokens of the group.
    """
    totals = {plan.prompt.prompt_id: [0, 0, 0] for plan in record.batch.plans}
    for outcome in record.outcomes:
        total = totals[outcome.prompt_id]
        total[0] += 1
        total[1] += outcome.score.reward >= success_threshold
        total[2] += outcome.response_length
    plans = {plan.prompt.prompt_id: plan for plan in record.batch.plans if totals[plan.prompt.prompt_id][0]}
    columns = {name: [totals[i][column] for i in plans] for column, name in enumerate(("sizes", "successes", "tokens"))}
    return {
        "prompt_ids": list(plans),
        **columns,
        "expected": [round(float(plan.success_rate), 4) for plan in plans.values()],
    }


def share_metrics(columns: dict[str, list[Any]]) -> dict[str, float]:
    """Shares of groups, and of all response tokens, by how many rollouts of the group succeeded.

    Args:
        columns: See `group_columns`.

    Returns:
        `groups/frac_{solved,mixed,hopeless}` (all, some, none) and `groups/token_frac_{solved,mixed,hopeless}`; empty
        without groups.
    """
    groups = {"solved": [0, 0], "mixed": [0, 0], "hopeless": [0, 0]}
    for size, successes, tokens in zip(columns["sizes"], columns["successes"], columns["tokens"], strict=True):
        kind = "solved" if successes == size else "mixed" if successes else "hopeless"
        groups[kind][0] += 1
        groups[kind][1] += tokens
    num_groups, num_tokens = (sum(values) for values in zip(*groups.values(), strict=True))
    if not num_groups:
        return {}
    return {
        **{f"groups/frac_{kind}": number / num_groups for kind, (number, _) in groups.items()},
        **{f"groups/token_frac_{kind}": tokens / max(num_tokens, 1) for kind, (_, tokens) in groups.items()},
    }


class GroupTable(Callback):
    """Writes `groups.jsonl` into the trainer's log folder, and logs the shares of solved, mixed and hopeless groups.

    The file has a JSON object per iteration with a list for each column, see `group_columns`: about 45 bytes for each
    prompt of a batch. The metrics are those of `share_metrics`: groups without any difference between their rewards
    have advantages of 0, so `groups/token_frac_solved` and `groups/token_frac_hopeless` are what they cost.

    Args:
        every_n_iterations: RL iterations from one line of the file to the next; metrics are logged in each.

    Raises:
        UserError: If `every_n_iterations` is below 1.
    """

    def __init__(self, every_n_iterations: int = 1) -> None:
        if every_n_iterations < 1:
            raise UserError(f"GroupTable.every_n_iterations must be at least 1, got {every_n_iterations}")
        self.every_n_iterations = every_n_iterations
        self._log_file: JsonLinesLog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the log folder; on every rank, because `trainer.log_dir` is a broadcast and would wait for them."""
        path = Path(trainer.log_dir or trainer.default_root_dir) / "groups.jsonl"
        self._log_file = None if trainer.fast_dev_run else JsonLinesLog(path)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the shares, and writes the line if it is due."""
        record: IterationRecord = outputs["record"]
        threshold = getattr(getattr(trainer, "datamodule", None), "success_threshold", 0.5)
        columns = group_columns(record, threshold)
        log_step_metrics(pl_module, share_metrics(columns))
        due = record.batch.iteration % self.every_n_iterations == 0
        if due and trainer.is_global_zero and self._log_file is not None:
            self._log_file.append([{"iteration": record.batch.iteration + 1, **columns}], record.batch.iteration)
