"""Writes down a few prompts with their responses and rewards, because curves do not show what the policy says."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dynamo_lightning.distributed import gather_objects
from dynamo_lightning.errors import UserError
from dynamo_lightning.runs.json_lines import JsonLinesLog
from dynamo_lightning.types import IterationRecord

_LOGGED_PER_PROMPT = 4
"""Rollouts of a prompt that loggers show."""
_DIGITS = 4
"""Significant digits of the values of tokens."""


def rollout_rows(
    record: IterationRecord,
    num_prompts: int,
    rollouts_per_prompt: int,
    max_token_values: int = 0,
    tokenizer: Any = None,
) -> list[dict[str, Any]]:
    """This rank's rollouts of the batch's first prompts, with their scores, as JSON-ready rows.

    Args:
        record: The iteration.
        num_prompts: Prompts to show.
        rollouts_per_prompt: Rollouts to show of each, those with the smallest sample indices.
        max_token_values: First tokens of a rollout whose values are in its row.
        tokenizer: Decodes tokens; without one there are no values.

    Returns:
        A row per rollout; rollouts that were dropped before scoring have none. With values of tokens a row has
        `tokens`, their texts, and `token_values`, by name a number for each of them or none where it is unknown, as it
        is for what an environment said.
    """
    outcomes = {outcome.key: outcome for outcome in record.outcomes}
    shown = {plan.prompt.prompt_id for plan in record.batch.plans[:num_prompts]}
    keys = sorted(key for key in outcomes if key[0] in shown)
    kept = {key for number, key in enumerate(keys) if number - _first(keys, key) < rollouts_per_prompt}
    scored = [rollout for rollout in record.rollouts if rollout.key in outcomes]
    values = {**record.token_values, **record.factors} if max_token_values and tokenizer is not None else {}
    num_tokens = sum(rollout.response_length for rollout in scored)
    values = {name: value for name, value in values.items() if len(value) == num_tokens}
    rows, first_token = [], 0
    for rollout in scored:
        prompt, outcome = rollout.prompt, outcomes[rollout.key]
        own = slice(first_token, first_token + rollout.response_length)
        first_token = own.stop
        if rollout.key not in kept:
            continue
        row = {
            "iteration": record.batch.iteration + 1,
            "prompt_id": prompt.prompt_id,
            "sample_index": rollout.sample_index,
            "source": prompt.source,
            "prompt": prompt.text,
            "response": rollout.text,
            "answer": prompt.answer,
            "reward": outcome.score.reward,
            "components": dict(outcome.score.components),
            "failure": outcome.score.failure,
            "response_length": outcome.response_length,
            "truncated": outcome.truncated,
        }
        if values:
            ids = rollout.token_ids[:max_token_values].tolist()
            row["tokens"] = [tokenizer.decode([token_id]) for token_id in ids]
            mask = torch.from_numpy(rollout.loss_mask)
            numbers = {name: _rounded(_spread(value[own], mask)[:max_token_values]) for name, value in values.items()}
            row["token_values"] = {
                name: known for name, known in numbers.items() if any(value is not None for value in known)
            }
        rows.append(row)
    order = {plan.prompt.prompt_id: position for position, plan in enumerate(record.batch.plans)}
    return sorted(rows, key=lambda row: (order[row["prompt_id"]], row["sample_index"]))


def _first(keys: list[tuple[int, int]], key: tuple[int, int]) -> int:
    """Position of the first key of the same prompt in sorted keys."""
    return bisect_left(keys, (key[0], -1))


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the response tokens at their places among all tokens, `[num_tokens]`, NaN at the others."""
    return torch.full(mask.shape, torch.nan).masked_scatter(mask, values.float().cpu())


def _rounded(values: Tensor) -> list[float | None]:
    """Numbers to a few digits; none for those that are not finite, which JSON lacks."""
    return [float(f"{value:.{_DIGITS}g}") if abs(value) < float("inf") else None for value in values.tolist()]


class RolloutTable(Callback):
    """Shows a few prompts' rollouts every so many iterations: all of them in `rollouts.jsonl`, some in the logger.

    The file lies in the trainer's log folder and holds the full texts, one JSON object per line; the page of `report`
    shows them with their tokens colored by advantage, factor or entropy. Loggers that show text (TensorBoard) or tables
    (Weights & Biases) get the first four of each prompt, texts cut to `max_characters`.

    Args:
        every_n_iterations: RL iterations from one table to the next; the first iteration has one.
        num_prompts: Prompts in a table, the first of the batch.
        rollouts_per_prompt: Rollouts written of each prompt, at most; the default keeps whole groups.
        max_characters: Characters of a prompt or response that go to the logger.
        max_token_values: First tokens of a rollout that are written with their advantage, factors and entropy,
            about 30 bytes for each token; 0 writes none. Entropies are known only where training computed them before
            the update.

    Raises:
        UserError: If `every_n_iterations` is below 1, or `max_token_values` below 0.
    """

    columns = ("prompt", "response", "answer", "reward", "response_length")

    def __init__(
        self,
        every_n_iterations: int = 10,
        num_prompts: int = 2,
        rollouts_per_prompt: int = 64,
        max_characters: int = 2000,
        max_token_values: int = 512,
    ) -> None:
        if every_n_iterations < 1:
            raise UserError(f"every_n_iterations must be at least 1, got {every_n_iterations}")
        if max_token_values < 0:
            raise UserError(f"RolloutTable.max_token_values must be at least 0, got {max_token_values}")
        self.every_n_iterations = every_n_iterations
        self.num_prompts = num_prompts
        self.rollouts_per_prompt = rollouts_per_prompt
        self.max_characters = max_characters
        self.max_token_values = max_token_values
        self._log_file: JsonLinesLog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the log folder; on every rank, because `trainer.log_dir` is a broadcast and would wait for them."""
        path = Path(trainer.log_dir or trainer.default_root_dir) / "rollouts.jsonl"
        self._log_file = None if trainer.fast_dev_run else JsonLinesLog(path)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the table if it is due; a group's rollouts may lie on several ranks."""
        record: IterationRecord = outputs["record"]
        if record.batch.iteration % self.every_n_iterations or self._log_file is None:
            return
        tokenizer = getattr(pl_module, "tokenizer", None)
        own = rollout_rows(record, self.num_prompts, self.rollouts_per_prompt, self.max_token_values, tokenizer)
        rows = gather_objects(own)
        if not trainer.is_global_zero:
            return
        order = {plan.prompt.prompt_id: position for position, plan in enumerate(record.batch.plans)}
        rows.sort(key=lambda row: (order[row["prompt_id"]], row["sample_index"]))
        self._log_file.append(rows, record.batch.iteration)
        self._log(trainer, rows, record.batch.iteration)

    def _log(self, trainer: Trainer, rows: list[dict[str, Any]], step: int) -> None:
        numbers: dict[Any, int] = {}
        cells = []
        for row in rows:
            number = numbers[row.get("prompt_id")] = numbers.get(row.get("prompt_id"), 0) + 1
            if number <= _LOGGED_PER_PROMPT:
                cells.append([str(row[name])[: self.max_characters] for name in self.columns])
        for logger in trainer.loggers:
            # by what they can do, not by class: importing the W&B logger's package must not become a requirement
            if hasattr(logger, "log_table"):
                logger.log_table(key="rollouts", columns=list(self.columns), data=cells, step=step)
            elif add_text := getattr(getattr(logger, "experiment", None), "add_text", None):
                add_text("rollouts", "\n\n---\n\n".join(map(self._markdown, cells)), step)

    def _markdown(self, row: list[str]) -> str:
        # indented lines are shown verbatim: responses are full of Markdown's special characters
        indented = (cell.replace("\n", "\n    ") for cell in row)
        return "\n\n".join(f"**{name}**\n\n    {cell}" for name, cell in zip(self.columns, indented, strict=True))
