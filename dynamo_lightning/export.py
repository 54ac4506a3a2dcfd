"""From a Lightning checkpoint to a folder that transformers and vLLM load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dynamo_lightning.checkpoints import read_weights, shapes_of
from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.files import folder_written_atomically
from dynamo_lightning.policy.forward import probe_rollouts
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.policy.logits import own_logits
from dynamo_lightning.policy.lora import merged_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dynamo_lightning.module import PolicyModule

EXPORT_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest relative difference of logits between a policy as trained and as written, by the coarser type."""


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
        RunError: If what was written does not compute what the trained policy does; the folder is removed.
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
    policy.eval()
    expected = probe_logits(policy)
    own_type = policy.dtype
    if model.policy_config.lora is not None:
        policy = merged_policy(model, policy)
    torch.nn.Module.to(policy, own_type if dtype is None else getattr(torch, dtype))
    with folder_written_atomically(target) as partial:
        policy.save_pretrained(partial)
        model.tokenizer.save_pretrained(partial)
        check_export(partial, model.policy_config, policy.config._attn_implementation, expected)


def merged_policy(model: PolicyModule, policy: PreTrainedModel) -> PreTrainedModel:
    """A policy without adapters that computes what this one does, in at least float32.

    Raises:
        RunError: If the merged parameters are not all of a plain policy's; a tied head is not repeated.
    """
    own_type = next(parameter.dtype for parameter in policy.parameters())
    merged = dict(merged_parameters(policy, cast=False))
    plain = load_policy(model.model_name, replace(model.policy_config, lora=None)).eval()
    plain.to(torch.promote_types(own_type, torch.float32))
    missing, unexpected = plain.load_state_dict(merged, strict=False)
    missing = [name for name in missing if name in dict(plain.named_parameters())]
    if missing or unexpected:
        raise RunError(
            f"the merged policy lacks {missing[:3]} and has {unexpected[:3]} in excess: output_dir was not written"
        )
    return plain


@torch.no_grad()
def probe_logits(policy: PreTrainedModel) -> Tensor:
    """Logits of a few arbitrary sequences, `[num_tokens, vocab_size]`, float32."""
    sequences = [[*rollout.prompt.token_ids, *rollout.token_ids] for rollout in probe_rollouts(policy)]
    return torch.cat([own_logits(policy, sequence) for sequence in sequences]).float()


def check_export(folder: Path, config: PolicyConfig, kernel: str, expected: Tensor) -> None:
    """Load what was written, as others would, and compare its logits with the trained policy's.

    Args:
        folder: With the weights.
        config: Whether the model's code may run.
        kernel: The attention kernel that the trained policy was read with.
        expected: The trained policy's `probe_logits`.

    Raises:
        RunError: If the difference is more than rounding to the written type explains.
    """
    from transformers import AutoModelForCausalLM

    written = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=kernel, trust_remote_code=config.trust_remote_code
    ).eval()
    difference = float((probe_logits(written) - expected).norm() / expected.norm().clamp(min=1e-30))
    limit = EXPORT_TOLERANCE[max(written.dtype, config_dtype(config, written), key=lambda kind: torch.finfo(kind).eps)]
    if not difference <= limit:
        raise RunError(
            f"the exported policy's logits differ from the trained policy's by {difference:.1e} of their size (at most "
            f"{limit:.0e} is allowed for {written.dtype}): nothing was written to output_dir; "
            "the checkpoint is as it was"
        )


def config_dtype(config: PolicyConfig, written: PreTrainedModel) -> torch.dtype:
    """The type that the policy was trained in."""
    return written.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
