"""Writes down a few prompts with their responses and rewards, because curves do not show what the policy says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dynamo_lightning.errors import UserError
from dynamo_lightning.files import write_atomically
from dynamo_lightning.runs.csv_log import superseded_path
from dynamo_lightning.types import IterationRecord


def rollout_rows(record: IterationRecord, num_prompts: int, rollouts_per_prompt: int) -> list[dict[str, Any]]:
    """This rank's first rollouts of its first prompts, with their scores, as JSON-ready rows.

    Args:
        record: The iteration.
        num_prompts: Prompts to show.
        rollouts_per_prompt: Rollouts to show of each.

    Returns:
        A row per rollout; rollouts that were dropped before scoring have none.
    """
    outcomes = {outcome.key: outcome for outcome in record.outcomes}
    shown: dict[int, int] = {}
    rows = []
    for rollout in record.rollouts:
        prompt, outcome = rollout.prompt, outcomes.get(rollout.key)
        new_prompt_is_too_many = prompt.prompt_id not in shown and len(shown) == num_prompts
        if outcome is None or new_prompt_is_too_many or shown.get(prompt.prompt_id, 0) == rollouts_per_prompt:
            continue
        shown[prompt.prompt_id] = shown.get(prompt.prompt_id, 0) + 1
        rows.append(
            {
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
        )
    return rows


def set_aside(path: Path, iteration: int) -> None:
    """Moves the rows of a resumed run that it replaces to a file beside: those of iterations it had begun and lost.

    Args:
        path: `rollouts.jsonl`.
        iteration: RL iterations finished before the first row that is to be written.
    """
    if not path.is_file():
        return
    kept: list[str] = []
    later: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            is_later = json.loads(line)["iteration"] > iteration
        except (ValueError, KeyError, TypeError):  # torn by a kill
            is_later = True
        (later if is_later else kept).append(line)
    if later:
        superseded_path(path).write_text("".join(later), encoding="utf-8")
        write_atomically(path, "".join(kept))


class RolloutTable(Callback):
    """Shows a few rollouts every so many iterations: all of them in `rollouts.jsonl`, cut ones in the logger.

    The file lies in the trainer's log folder and holds the full texts, one JSON object per line. Loggers that show text
    (TensorBoard) or tables (Weights & Biases) get the same rows, texts cut to `max_characters`. Only rank 0's rollouts.

    Args:
        every_n_iterations: RL iterations from one table to the next; the first iteration has one.
        num_prompts: Prompts in a table.
        rollouts_per_prompt: Rollouts shown of each prompt.
        max_characters: Characters of a prompt or response that go to the logger.
    """

    columns = ("prompt", "response", "answer", "reward", "response_length")

    def __init__(
        self,
        every_n_iterations: int = 10,
        num_prompts: int = 2,
        rollouts_per_prompt: int = 4,
        max_characters: int = 2000,
    ) -> None:
        if every_n_iterations < 1:
            raise UserError(f"every_n_iterations must be at least 1, got {every_n_iterations}")
        self.every_n_iterations = every_n_iterations
        self.num_prompts = num_prompts
        self.rollouts_per_prompt = rollouts_per_prompt
        self.max_characters = max_characters
        self._path: Path | None = None
        self._opened = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the log folder; on every rank, because `trainer.log_dir` is a broadcast and would wait for them."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._path = None if trainer.fast_dev_run else folder / "rollouts.jsonl"  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the table if it is due."""
        record: IterationRecord = outputs["record"]
        due = record.batch.iteration % self.every_n_iterations == 0
        if not due or not trainer.is_global_zero or self._path is None:
            return
        rows = rollout_rows(record, self.num_prompts, self.rollouts_per_prompt)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._opened:
            self._opened = True
            set_aside(self._path, record.batch.iteration)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._log(trainer, rows, record.batch.iteration)

    def _log(self, trainer: Trainer, rows: list[dict[str, Any]], step: int) -> None:
        cells = [[str(row[name])[: self.max_characters] for name in self.columns] for row in rows]
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
