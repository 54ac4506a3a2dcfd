"""Trainer settings that do not apply to a policy update, refused before anything is loaded or sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import FSDPStrategy

from dynamo_lightning.allocation.prompt_features import HIDDEN_STATE
from dynamo_lightning.errors import UserError

if TYPE_CHECKING:
    from dynamo_lightning.engines.engine import Engine

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


def check_staleness(max_staleness: int, pilot: int, features: Sequence[str]) -> None:
    """Refuse what an iteration's plan needs to know before older rollouts are trained on.

    Args:
        max_staleness: Of the model.
        pilot: Of the data.
        features: Of the data's estimator.

    Raises:
        UserError: If staleness is allowed together with a pilot, or with hidden states of the current policy.
    """
    if max_staleness and pilot:
        raise UserError(
            f"model.max_staleness={max_staleness} does not go with data.pilot={pilot}: set one of them to 0"
        )
    if max_staleness and HIDDEN_STATE in features:
        raise UserError(
            f"model.max_staleness={max_staleness} does not go with data.estimator.features={list(features)}: set it to "
            f"0, or leave {HIDDEN_STATE!r} out"
        )


def check_strategy(trainer: L.Trainer, generator: Engine) -> None:
    """Refuse a strategy that an engine cannot take weights from.

    Raises:
        UserError: If FSDP1 would have to hand whole weights to an engine outside the policy.
    """
    if generator.uses_external_engine and isinstance(trainer.strategy, FSDPStrategy):
        raise UserError(
            f"trainer.strategy fsdp (FSDP1) does not go with model.generator={type(generator).__name__}, which needs "
            "whole weights: use --trainer.strategy fsdp2"
        )


def check_micro_batch(prompt_length: int, max_response_length: int, max_tokens: int) -> None:
    """Refuse micro-batches that the longest sequence does not fit into.

    Args:
        prompt_length: Tokens of the longest prompt.
        max_response_length: `model.sampling.max_response_length`.
        max_tokens: `model.updates.max_tokens_per_micro_batch`.

    Raises:
        UserError: Names both options.
    """
    longest = prompt_length + max_response_length
    if longest > max_tokens:
        raise UserError(
            f"the longest prompt and a response of model.sampling.max_response_length={max_response_length} have "
            f"{longest} tokens together, but model.updates.max_tokens_per_micro_batch is {max_tokens}: raise it"
        )


def check_thresholds(of_advantage: float, of_data: float) -> None:
    """Refuse two answers to what a right response is.

    Raises:
        UserError: If advantage and data take different rewards as right.
    """
    if of_advantage != of_data:
        raise UserError(
            f"model.loss.advantage takes rewards from {of_advantage} on as right, data.success_threshold={of_data}: "
            "set both to the same"
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
