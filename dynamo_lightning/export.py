"""From a Lightning checkpoint to a folder that transformers and vLLM load."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from dynamo_lightning.checkpoints import read_weights, shapes_of
from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.loading import load_policy
from dynamo_lightning.policy.lora import merged_parameters

if TYPE_CHECKING:
    from dynamo_lightning.module import PolicyModule


def export_policy(
    model: PolicyModule, ckpt_path: str, output_dir: str, dtype: Literal["float32", "bfloat16", "float16"] | None = None
) -> None:
    """Write the policy of a checkpoint in Hugging Face format, adapters merged, with tokenizer and generation config.

    The folder appears whole or not at all.

    Args:
        model: Says which architecture and tokenizer; its weights are replaced.
        ckpt_path: A checkpoint of this model.
        output_dir: The folder to write; must not exist, or be empty.
        dtype: Type of the written weights; by default that of the checkpoint.

    Raises:
        MissingFileError: If there is no such checkpoint.
        UserError: If the folder is not empty, or the checkpoint is of another model.
    """
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"output_dir {output_dir} is there already and not an empty folder")
    weights = read_weights(ckpt_path)
    model.configure_model()
    model.check_weights(shapes_of(weights))
    model.load_state_dict(weights)
    policy = model.policy
    assert policy is not None
    if model.policy_config.lora is not None:
        merged = dict(merged_parameters(policy))
        policy = load_policy(model.model_name, replace(model.policy_config, lora=None))
        policy.load_state_dict(merged, strict=False)  # a tied head is not repeated
    if dtype is not None:
        policy.to(getattr(torch, dtype))
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    policy.save_pretrained(partial)
    model.tokenizer.save_pretrained(partial)
    if target.exists():
        target.rmdir()
    os.replace(partial, target)
