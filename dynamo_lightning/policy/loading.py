"""Loading a Hugging Face causal language model and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dynamo_lightning.errors import MissingFileError, UserError
from dynamo_lightning.policy import packed_attention
from dynamo_lightning.policy.dropout import disable_dropout
from dynamo_lightning.policy.embedded import local_path
from dynamo_lightning.policy.hub import loading, require_model
from dynamo_lightning.policy.lora import LoraConfig, add_adapters

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PolicyConfig:
    """How the policy is loaded."""

    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes only the architecture and the tokenizer from `model_name` and draws the weights from the seed."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Type of the weights; `auto` takes the checkpoint's. Mixed precision is `trainer.precision`, over float32."""
    attn_implementation: str | None = None
    """Attention kernel: `sdpa`, `flash_attention_2`, `flex_attention`, `eager`; `null` lets transformers choose. `sdpa`
    computes nothing between the sequences of a packed row."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights; `null` trains the weights."""
    compile: bool = False
    """Compile the decoder layers with `torch.compile` for training passes; the first iteration waits for it."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


def resolve_model_name(model_name: str) -> str:
    """Path or hub id of a model, with `embedded:` names resolved.

    Raises:
        MissingFileError: If the name is a path, but there is no such folder.
    """
    path = local_path(model_name)
    looks_local = path != model_name or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise MissingFileError(f"model.model_name: there is no folder {path}")
    return str(Path(path).expanduser()) if looks_local else path


def load_tokenizer(model_name: str, config: PolicyConfig | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        model_name: Path or hub id of the model.
        config: Its revision, and whether its code may run; `PolicyConfig()` by default.

    Raises:
        UserError: If it has no end-of-sequence token, or neither a pad token nor one to stand in for it.
    """
    from transformers import AutoTokenizer

    path, config = resolve_model_name(model_name), config or PolicyConfig()
    require_model(path, config.revision)
    revision = {"revision": config.revision} if config.revision else {}
    with loading(model_name):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code, **revision)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model_name} has no end-of-sequence token: responses could never end")
    if tokenizer.pad_token_id is None:
        # Padding is masked wherever it occurs, so any token serves; the end-of-sequence token is the usual stand-in.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_architecture(model_name: str, config: PolicyConfig) -> PretrainedConfig:
    """The configuration of a model, without its weights."""
    from transformers import AutoConfig

    path = resolve_model_name(model_name)
    require_model(path, config.revision)
    revision = {"revision": config.revision} if config.revision else {}
    with loading(model_name):
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code, **revision)


def load_policy(model_name: str, config: PolicyConfig) -> PreTrainedModel:
    """Load a causal language model on the CPU, ready for training.

    Raises:
        UserError: If the attention kernel is unknown or not installed, or the layers to compile cannot be found.
    """
    from transformers import AutoModelForCausalLM

    path, trust = resolve_model_name(model_name), config.trust_remote_code
    architecture = load_architecture(model_name, config)
    options: dict[str, Any] = {"trust_remote_code": trust, "dtype": architecture.dtype}
    if config.dtype != "auto":
        options["dtype"] = getattr(torch, config.dtype)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    try:
        if config.init == "random":
            policy = AutoModelForCausalLM.from_config(architecture, **options)
        else:
            if config.revision is not None:
                options["revision"] = config.revision
            with loading(model_name):
                policy = AutoModelForCausalLM.from_pretrained(path, **options)
    except (ValueError, ImportError) as error:
        if config.attn_implementation is None or "attention" not in str(error).lower():
            raise
        raise UserError(f"model.policy.attn_implementation={config.attn_implementation!r}: {error}") from error
    choose_kernel(policy, config.attn_implementation)
    disable_dropout(policy)
    if config.lora is not None:
        add_adapters(policy, config.lora)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for layer in decoder_layers(policy):
            layer.compile(dynamic=True)
    return policy.train()


def choose_kernel(policy: PreTrainedModel, wanted: str | None) -> None:
    """Replace `sdpa` by a kernel that computes what the model's own `eager` attention does.

    Args:
        policy: As loaded, with the kernel that transformers or the user chose.
        wanted: The user's choice, if there is one.

    Raises:
        UserError: If the user chose `sdpa` and the model has a part that it leaves out.
    """
    if policy.config._attn_implementation != "sdpa":
        return
    left_out = parts_without_sdpa(policy)
    if left_out:
        if wanted == "sdpa":
            raise UserError(
                f"model.policy.attn_implementation='sdpa' leaves out the {left_out} of {type(policy).__name__}: choose "
                "eager, or flash_attention_2 on a GPU"
            )
        policy.set_attn_implementation("eager")
        return
    packed_attention.register()
    try:
        policy.set_attn_implementation(packed_attention.NAME)
    except ValueError:  # an architecture that knows its kernels by name
        policy.set_attn_implementation("eager" if wanted is None else wanted)


def parts_without_sdpa(policy: PreTrainedModel) -> str:
    """Parts of a model's attention that PyTorch's `sdpa` silently leaves out, in words; empty if there are none."""
    if getattr(policy.config.get_text_config(), "attn_logit_softcapping", None):
        return "soft cap of attention logits (attn_logit_softcapping)"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in policy.named_parameters()):
        return "attention sinks"
    return ""


def decoder_layers(policy: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a causal language model.

    Raises:
        UserError: If they are not where transformers' language models have them.
    """
    layers = getattr(policy.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{type(policy).__name__} has no list of decoder layers: it cannot be compiled or sharded")
    return layers


def eos_token_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's and all of the generation config's, sorted."""
    configured = policy.generation_config.eos_token_id if policy.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None}))
