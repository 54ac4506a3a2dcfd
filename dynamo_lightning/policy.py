"""Loading a Hugging Face causal language model, and reading token statistics off it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dynamo_lightning import packed_attention
from dynamo_lightning.embedded import local_path
from dynamo_lightning.lora import LoraConfig, add_adapters
from dynamo_lightning.losses.token_statistics import MAX_LOGITS_BYTES, TokenStatistics, chunked_loss, token_statistics
from dynamo_lightning.packing import MicroBatch, make_micro_batch
from dynamo_lightning.types import Prompt, Rollout

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
    """Attention kernel: `sdpa`, `flash_attention_2`, `flex_attention`, `eager`; `null` lets transformers choose. `sdpa`
    computes nothing between the sequences of a packed row."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights; `null` trains the weights."""
    compile: bool = False
    """Compile the decoder layers with `torch.compile` for scoring and updates; the first iteration waits for it."""
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


def load_tokenizer(model_name: str, config: PolicyConfig | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        model_name: Path or hub id of the model.
        config: Its revision, and whether its code may run; `PolicyConfig()` by default.

    Raises:
        ValueError: If it has no end-of-sequence token, or neither a pad token nor one to stand in for it.
    """
    from transformers import AutoTokenizer

    path, config = resolve_model_name(model_name), config or PolicyConfig()
    tokenizer = AutoTokenizer.from_pretrained(
        path, trust_remote_code=config.trust_remote_code, **({"revision": config.revision} if config.revision else {})
    )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {model_name} has no end-of-sequence token: responses could never end")
    if tokenizer.pad_token_id is None:
        # Padding is masked wherever it occurs, so any token serves; the end-of-sequence token is the usual stand-in.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(model_name: str, config: PolicyConfig) -> PreTrainedModel:
    """Load a causal language model on the CPU, ready for training.

    Raises:
        ValueError: If the attention kernel is unknown or not installed, or the layers to compile cannot be found.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path, trust = resolve_model_name(model_name), config.trust_remote_code
    architecture = AutoConfig.from_pretrained(
        path, trust_remote_code=trust, **({"revision": config.revision} if config.revision else {})
    )
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
            policy = AutoModelForCausalLM.from_pretrained(path, **options)
    except (ValueError, ImportError) as error:
        if config.attn_implementation is None or "attention" not in str(error).lower():
            raise
        raise ValueError(f"model.policy.attn_implementation={config.attn_implementation!r}: {error}") from error
    if policy.config._attn_implementation == "sdpa":
        packed_attention.register()
        policy.set_attn_implementation(packed_attention.NAME)
    if config.lora is not None:
        add_adapters(policy, config.lora)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for layer in decoder_layers(policy):
            layer.compile(dynamic=True)
    return policy.train()


def decoder_layers(policy: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a causal language model.

    Raises:
        ValueError: If they are not where transformers' language models have them.
    """
    layers = getattr(policy.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(policy).__name__} has no list of decoder layers: it cannot be compiled or sharded")
    return layers


def eos_token_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's and all of the generation config's, sorted."""
    configured = policy.generation_config.eos_token_id if policy.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None}))


def head_inputs(policy: PreTrainedModel, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Any]]:
    """What the logits of the response tokens are made from.

    The policy is called as a whole, so that sharding hooks run, but is asked for one position's logits only; hooks take
    the decoder's output and, while it is gathered, the head's weight.

    Returns:
        Hidden states at each response token's predictor, `[num_tokens, hidden_size]`, and the vocabulary head as
        `token_statistics` takes it: `head_weight`, `head_bias`, `softcap`.

    Raises:
        ValueError: If the head is not a linear layer.
    """
    head = vocabulary_head(policy)
    is_packed = policy.config._attn_implementation == packed_attention.NAME
    packed = {"sequence_buckets": micro_batch.sequence_buckets} if is_packed else {}
    hidden: list[Tensor] = []
    options: dict[str, Any] = {"softcap": getattr(policy.config, "final_logit_softcapping", None)}
    handles = [
        policy.get_decoder().register_forward_hook(
            lambda module, args, output: hidden.append(output.last_hidden_state)
        ),
        head.register_forward_hook(
            lambda module, args, output: options.update(head_weight=module.weight, head_bias=module.bias)
        ),
    ]
    try:
        with packed_attention.without_mask() if is_packed else nullcontext():
            output = policy(
                input_ids=micro_batch.input_ids,
                position_ids=micro_batch.position_ids,
                use_cache=False,
                logits_to_keep=1,
                **packed,
            )
    finally:
        for handle in handles:
            handle.remove()
    hidden_states = hidden[0][0, micro_batch.predictor_positions]
    if isinstance(policy, FullyShardedDataParallel) and hidden_states.requires_grad:
        # FSDP1 ends a backward pass only if it went through the wrapper's output, which the loss makes no use of.
        hidden_states = hidden_states + 0.0 * output.logits.sum().to(hidden_states.dtype)
    return hidden_states, options


@torch.no_grad()
def check_packing(policy: PreTrainedModel) -> None:
    """Check that sequences packed into one row do not see each other.

    Most attention kernels keep them apart by their positions; one that does not, or a recurrent layer, would mix
    unrelated rollouts without any other sign.

    Raises:
        ValueError: If the hidden states of a sequence depend on its neighbour.
    """
    prompt = Prompt(0, "", "", (1, 2), "")
    pair = [Rollout(prompt, index, tokens, (), "", False) for index, tokens in enumerate([(3, 4, 5), (6, 7, 8)])]
    together = head_inputs(policy, make_micro_batch(pair, [0, 1], policy.device))[0].float()
    alone = head_inputs(policy, make_micro_batch(pair, [1], policy.device))[0].float()
    difference = float((together[len(alone) :] - alone).norm() / alone.norm())
    exact = policy.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(policy.device.type)
    if not difference < (1e-3 if exact else 0.05):
        raise ValueError(
            f"{type(policy).__name__} with attention kernel {policy.config._attn_implementation!r} lets packed "
            f"sequences see each other (hidden states change by {difference:.1%}): choose another "
            "model.policy.attn_implementation, such as sdpa or flash_attention_2"
        )


def vocabulary_head(policy: PreTrainedModel) -> nn.Linear:
    """The layer that makes logits of hidden states.

    Raises:
        ValueError: If it is not a linear layer.
    """
    head = policy.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the vocabulary head of {type(policy).__name__} is a {type(head).__name__}, not a linear layer"
        )
    return head


def response_statistics(
    policy: PreTrainedModel,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
    entropy_gradient: bool = False,
) -> TokenStatistics:
    """Statistics of the policy's distribution at every response token of a micro-batch, `[num_tokens]` each."""
    hidden_states, head = head_inputs(policy, micro_batch)
    return token_statistics(
        hidden_states,
        targets=micro_batch.targets,
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        max_logits_bytes=max_logits_bytes,
        **head,
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
    hidden_states, head = head_inputs(policy, micro_batch)
    return chunked_loss(
        hidden_states,
        targets=micro_batch.targets,
        token_loss=token_loss,
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        max_logits_bytes=max_logits_bytes,
        **head,
    )
