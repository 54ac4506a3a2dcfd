"""The same policy with wider attention heads, for kernels that do not take every head size.

vLLM's CPU kernels take 32, 64, 80, 96, 112, 128 and more, but not the 24 of the embedded policy:

    python -m dynamo_lightning.engines.vllm.pad_heads --model_name embedded:arithmetic-qwen3 --head_dim 32 \
        --output_dir build/arithmetic-qwen3-32

Zeros are added to queries, keys and values, and what depends on the head size is set right: the normalisation of
queries and keys averages over more dimensions, the attention's scale is 1/√head_dim, and rotary frequencies are powers
`θ^(−2i/head_dim)`. The logits stay the same but for rounding, and the zeros stay zeros in training: neither side of a
product of two of them has a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynamo_lightning.errors import UserError


def pad_heads(weights: Mapping[str, Tensor], head_dim: int, wider: int) -> dict[str, Tensor]:
    """Weights of a Qwen3 model with zeros in every head.

    Args:
        weights: Checkpoint by parameter name.
        head_dim: Its head size, even.
        wider: Head size wanted, even, larger.

    Returns:
        The weights, where the names are the same.
    """
    half, share = head_dim // 2, head_dim / wider

    def pad(values: Tensor) -> Tensor:
        """Zeros behind either half of each head in the first dimension: rotary embedding pairs the halves."""
        heads = values.reshape(-1, 2, half, *values.shape[1:])
        padding = heads.new_zeros(heads.shape[0], 2, wider // 2 - half, *values.shape[1:])
        return torch.cat([heads, padding], dim=2).reshape(-1, *values.shape[1:])

    padded = {}
    for name, value in weights.items():
        layer = name.split(".")[-2] if "." in name else ""
        if layer in ("q_proj", "k_proj", "v_proj"):
            value = pad(value)
        elif layer == "o_proj":
            value = pad(value.T).T.contiguous()
        elif layer == "k_norm":
            value = pad(value) * share**0.5
        elif layer == "q_norm":  # as for keys, and √(wider / head_dim) for the attention's scale
            value = pad(value)
        padded[name] = value
    return padded


def write_padded(model_name: str, output_dir: str, head_dim: int = 32) -> None:
    """Write a policy with wider heads, and its tokenizer, to a folder.

    Args:
        model_name: Path or hub id of a Qwen3 model.
        output_dir: Folder for the result.
        head_dim: Head size wanted.

    Raises:
        UserError: If the model is no Qwen3, or has wider heads already.
    """
    from transformers import AutoModelForCausalLM

    from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer

    policy = load_policy(model_name, PolicyConfig())
    config: Any = policy.config
    if config.model_type != "qwen3":
        raise UserError(
            f"model_name={model_name} is a {config.model_type} model, but heads of qwen3 only can be padded"
        )
    narrow = config.head_dim
    if not narrow < head_dim or head_dim % 2:
        raise UserError(f"head_dim={head_dim} must be even and larger than the model's {narrow}")
    weights = pad_heads(policy.state_dict(), narrow, head_dim)
    config.head_dim = head_dim
    config.rope_parameters["rope_theta"] **= head_dim / narrow
    padded = AutoModelForCausalLM.from_config(config, dtype=policy.dtype)
    padded.load_state_dict(weights)
    padded.save_pretrained(output_dir)
    load_tokenizer(model_name).save_pretrained(output_dir)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(write_padded, as_positional=False)
