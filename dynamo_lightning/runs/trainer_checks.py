"""Trainer settings that do not apply to a policy update, refused before anything is loaded or sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from dynamo_lightning.errors import UserError

INSTEAD = {
    "gradient_clip_val": (None, "model.gradient_clip_val"),
    "accumulate_grad_batches": (1, "model.updates.max_tokens_per_micro_batch"),
}
"""Trainer options that manual optimization rules out: their default, and our option for the same purpose."""


def check_trainer(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse what Lightning would stop at later with an error that cannot name our options.

    Args:
        trainer: The trainer.
        module: The module it is about to run.

    Raises:
        UserError: Names the setting and what to use instead.
    """
    for flag, (default, instead) in INSTEAD.items():
        value = getattr(trainer, flag)
        if value != default:
            raise UserError(f"trainer.{flag}={value} does not apply to a policy update: use {instead}")
    if module._compiler_ctx is not None:
        raise UserError("torch.compile(module) would compile the whole RL loop: use model.policy.compile=true instead")
    for callback, option in ((LearningRateFinder, "optimizer.lr"), (BatchSizeFinder, "data.prompts_per_batch")):
        if any(isinstance(own, callback) for own in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError(
                f"{callback.__name__} searches by the loss of supervised batches, which says nothing about an RL "
                f"iteration: set {option} by hand"
            )


def check_data_module(trainer: L.Trainer) -> None:
    """Refuse a plain `DataLoader`, which has neither prompts nor an allocation of rollouts.

    Raises:
        UserError: If the trainer was given no `RolloutDataModule`.
    """
    given = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(given, "check_answers"):
        what = "a DataLoader" if given is None else f"a {type(given).__name__}"
        raise UserError(
            f"PolicyModule was given {what}, which has no prompts and no rollout budget: "
            "Trainer.fit(PolicyModule(…), datamodule=RolloutDataModule(train=PromptSource(…)))"
        )


def check_validation_interval(trainer: L.Trainer, num_batches: int) -> None:
    """Refuse a validation interval that no epoch reaches.

    Args:
        trainer: The trainer.
        num_batches: RL iterations of one epoch.

    Raises:
        UserError: Names the interval and the number of iterations.
    """
    interval = trainer.val_check_interval
    limit = trainer.limit_train_batches
    reached = min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and interval > reached:
        raise UserError(
            f"trainer.val_check_interval={interval} is more than the {reached} RL iterations of an epoch: lower it, or "
            "set trainer.check_val_every_n_epoch=null to count iterations across epochs"
        )


def check_number_of_responses(ks: Mapping[str, Sequence[int]], num_samples: int) -> None:
    """Check that every k of pass@k and maj@k is at least 1 and has enough responses.

    Args:
        ks: By option.
        num_samples: Responses to each evaluated prompt.

    Raises:
        UserError: Naming the option.
    """
    for option, values in ks.items():
        if values and not 1 <= min(values) <= max(values) <= num_samples:
            raise UserError(
                f"{option}={list(values)} needs at least {max(values)} responses for each prompt and every k at least "
                f"1, but data.eval_rollouts_per_prompt is {num_samples}"
            )
