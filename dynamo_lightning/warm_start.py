"""Supervised fine-tuning on demonstrations: what a policy needs before reinforcement learning can sharpen it.

`python -m dynamo_lightning warm_start` also made the embedded policy, from random weights; `make policy` does it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dynamo_lightning.data.collate import collate
from dynamo_lightning.data.templates import resolve_template
from dynamo_lightning.distributed import run_seed
from dynamo_lightning.errors import MissingFileError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynamo_lightning.module import PolicyModule


@dataclass(frozen=True)
class Demonstrations:
    """Prompts with the responses to learn."""

    path: str
    """A .jsonl file."""
    prompt_column: str = "prompt"
    """Column of the prompt."""
    response_column: str = "response"
    """Column of the response; the end-of-sequence token is added to it."""
    template: str = "{prompt}"
    """Text with `{prompt}` in it, or a name such as `qwen2.5-math`: the one that reinforcement learning will use."""
    batch_size: int = 128
    """Demonstrations of one optimizer step, on each rank."""


def load_demonstrations(
    demonstrations: Demonstrations, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each prompt and of its response with the end-of-sequence token.

    Raises:
        MissingFileError: If there is no such file.
        UserError: If a column is missing or the file is empty.
    """
    from datasets import Dataset

    if not Path(demonstrations.path).is_file():
        raise MissingFileError(f"demonstrations.path: there is no file {demonstrations.path}")
    rows = Dataset.from_json(demonstrations.path)
    for option in ("prompt_column", "response_column"):
        if getattr(demonstrations, option) not in rows.column_names:
            raise UserError(
                f"demonstrations.{option}={getattr(demonstrations, option)!r} is not a column of "
                f"{demonstrations.path}, which has {rows.column_names}"
            )
    if len(rows) == 0:
        raise UserError(f"demonstrations.path: {demonstrations.path} has no rows")
    template = resolve_template(demonstrations.template, "demonstrations.template")
    assert template is not None
    prompts = [template.replace("{prompt}", prompt) for prompt in rows[demonstrations.prompt_column]]
    prompt_ids = tokenizer(prompts).input_ids
    response_ids = tokenizer(list(rows[demonstrations.response_column]), add_special_tokens=False).input_ids
    return [(p, [*r, tokenizer.eos_token_id]) for p, r in zip(prompt_ids, response_ids, strict=True)]


class SupervisedModule(L.LightningModule):
    """Maximum likelihood of the responses, given their prompts.

    Args:
        policy_module: Holds the policy, the optimizer and its schedule.
    """

    def __init__(self, policy_module: PolicyModule) -> None:
        super().__init__()
        assert policy_module.policy is not None
        self.policy: PreTrainedModel = policy_module.policy
        # In a list, so that it is no submodule and its policy is not saved twice.
        self._policy_module = [policy_module]

    def configure_optimizers(self) -> Any:
        """As in reinforcement learning: `--optimizer` and `--lr_scheduler`."""
        return self._policy_module[0].configure_optimizers()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the response tokens."""
        loss = self.policy(**batch, use_cache=False).loss
        self.log("warm_start/loss", loss, prog_bar=True)
        return loss


def warm_start(trainer: L.Trainer, model: PolicyModule, demonstrations: Demonstrations, output_dir: str) -> None:
    """Train the policy on demonstrations and write it in Hugging Face format.

    Args:
        trainer: Runs the training; its `max_steps` or `max_epochs` end it.
        model: Holds the policy, the optimizer and its schedule.
        demonstrations: What to learn.
        output_dir: Folder for the policy and its tokenizer.
    """
    model.configure_model()
    assert model.policy is not None
    rows = load_demonstrations(demonstrations, model.tokenizer)
    loader: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]  # a list is a map-style data set
        batch_size=demonstrations.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(run_seed()),
        collate_fn=lambda batch: collate(batch, int(model.tokenizer.pad_token_id)),
    )
    # Imported here: the callbacks import what the command line need not wait for.
    from dynamo_lightning.callbacks import ProgressLines

    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, ProgressLines) for callback in callbacks):
        callbacks.append(ProgressLines())
    trainer.fit(SupervisedModule(model), loader)
    if trainer.is_global_zero:
        model.policy.save_pretrained(output_dir)
        model.tokenizer.save_pretrained(output_dir)
