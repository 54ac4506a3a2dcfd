"""Loading a Hugging Face causal language model, and reading token statistics off it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dynamo_lightning.embedded import local_path
from dynamo_lightning.losses.token_statistics import MAX_LOGITS_BYTES, TokenStatistics, chunked_loss, token_statistics
from dynamo_lightning.packing import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class PolicyConfig:
    """How the policy is loaded."""

    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the architecture and the tokenizer from `model_name` and draws the weights from the seed."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Type of the weights; `auto` takes the checkpoint's. Mixed precision is `trainer.precision`, over float32."""
    attn_implementation: str | None = None
    """Attention kernel: `sdpa`, `flash_attention_2`, `flex_attention`, `eager`; `null` lets transformers choose."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


def resolve_model_name(model_name: str) -> str:
    """Path or hub id of a model, with `embedded:` names resolved.

    Raises:
        FileNotFoundError: If the name is a path, but there is no such folder.
    """
    path = local_path(model_name)
    looks_local = path != model_name or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise FileNotFoundError(f"model.model_name: there is no folder {path}")
    return str(Path(path).expanduser()) if looks_local else path


def load_tokenizer(model_name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        ValueError: If it has no end-of-sequence token, or neither a pad token nor one to stand in for it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model_name(model_name), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {model_name} has no end-of-sequence token: responses could never end")
    if tokenizer.pad_token_id is None:
        # Padding is masked wherever it occurs, so any token serves; the end-of-sequence token is the usual stand-in.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(model_name: str, config: PolicyConfig) -> PreTrainedModel:
    """Load a causal language model on the CPU, ready for training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.revision is not None:
        options["revision"] = config.revision
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    path = resolve_model_name(model_name)
    if config.init == "random":
        architecture = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        policy = AutoModelForCausalLM.from_config(
            architecture, dtype=None if dtype == "auto" else dtype, trust_remote_code=config.trust_remote_code
        )
    else:
        policy = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()


def eos_token_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's and all of the generation config's, sorted."""
    configured = policy.generation_config.eos_token_id if policy.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None}))


def response_hidden_states(policy: PreTrainedModel, micro_batch: MicroBatch) -> Tensor:
    """Input of the vocabulary head at each response token's predictor, `[num_tokens, hidden_size]`.

    The policy is called as a whole, so that sharding hooks run, but is asked for one position's logits only; a hook on
    its decoder takes the hidden states on the way.
    """
    captured: list[Tensor] = []
    handle = policy.get_decoder().register_forward_hook(
        lambda module, args, output: captured.append(output.last_hidden_state)
    )
    try:
        policy(
            input_ids=micro_batch.input_ids,
            position_ids=micro_batch.position_ids,
            use_cache=False,
            logits_to_keep=1,
        )
    finally:
        handle.remove()
    return captured[0][0, micro_batch.predictor_positions]


def head_options(policy: PreTrainedModel) -> dict[str, Any]:
    """The vocabulary head as `token_statistics` takes it: `head_weight`, `head_bias`, `softcap`.

    Raises:
        ValueError: If the head is not a linear layer.
    """
    head = policy.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the vocabulary head of {type(policy).__name__} is a {type(head).__name__}, not a linear layer"
        )
    softcap = getattr(policy.config, "final_logit_softcapping", None)
    return {"head_weight": head.weight, "head_bias": head.bias, "softcap": softcap}


def response_statistics(
    policy: PreTrainedModel,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    entropy_gradient: bool = False,
) -> TokenStatistics:
    """Statistics of the policy's distribution at every response token of a micro-batch, `[num_tokens]` each."""
    return token_statistics(
        response_hidden_states(policy, micro_batch),
        targets=micro_batch.targets,
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        max_logits_bytes=max_logits_bytes,
        **head_options(policy),
    )


def response_loss(
    policy: PreTrainedModel,
    micro_batch: MicroBatch,
    token_loss: Callable[[TokenStatistics, slice], Tensor],
    *,
    couples_tokens: bool,
    temperature: float,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    entropy_gradient: bool = False,
) -> Tensor:
    """A loss over the response tokens of a micro-batch, a scalar.

    Args:
        policy: The policy.
        micro_batch: Whole rollouts.
        token_loss: Share of the loss of some of the tokens, a scalar, from their statistics and where they are.
        couples_tokens: Whether it must see all tokens at once; otherwise it is called for a chunk at a time, which
            saves one of the head's four matrix products.
        temperature: Divides the logits.
        max_logits_bytes: Bound on the memory of the logits held at once.
        entropy_gradient: Whether the loss is differentiated through entropies and Σπ²Λ.
    """
    if couples_tokens:
        statistics = response_statistics(
            policy,
            micro_batch,
            temperature=temperature,
            max_logits_bytes=max_logits_bytes,
            entropy_gradient=entropy_gradient,
        )
        return token_loss(statistics, slice(0, len(micro_batch.targets)))
    return chunked_loss(
        response_hidden_states(policy, micro_batch),
        targets=micro_batch.targets,
        token_loss=token_loss,
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        max_logits_bytes=max_logits_bytes,
        **head_options(policy),
    )
