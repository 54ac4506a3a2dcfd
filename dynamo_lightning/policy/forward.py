"""Quantities computed from the policy: the inputs of its vocabulary head, token statistics, and a loss over them.

Statistics come from the head's input and weight and from the function that the model applies afterwards
(`logits.py`), or from the model's own logits if that function is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.token_statistics import (
    MAX_LOGITS_BYTES,
    TokenStatistics,
    chunked_loss,
    statistics_from_logits,
    token_statistics,
)
from dynamo_lightning.policy import packed_attention
from dynamo_lightning.policy.logits import call_options, logit_transform
from dynamo_lightning.policy.packing import MicroBatch, TokenLayout, make_micro_batch, padded_rows
from dynamo_lightning.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_LENGTHS = ((2, 5), (3, 19), (2, 3))
"""Prompt and response tokens of the sequences that are compared; of different lengths, the longest in the middle."""


def head_inputs(
    policy: PreTrainedModel, micro_batch: MicroBatch, temperature: float = 1.0
) -> tuple[Tensor, dict[str, Any]]:
    """The inputs of the vocabulary head at the response tokens, and the head.

    The policy is called as a whole, so that sharding hooks run. A hook keeps the head's input and passes on one
    position of it, so that no logits but that one's are made; another takes the head's weight while it is gathered.

    Args:
        policy: The policy.
        micro_batch: Whole rollouts.
        temperature: Divides the logits.

    Returns:
        Inputs at each response token's predictor, `[num_tokens, hidden_size]`, and the vocabulary head as
        `token_statistics` takes it: `head_weight`, `head_bias`, and the `temperature` and `softcap` that make the
        policy's own logits of it, divided by the temperature.

    Raises:
        UserError: If the head is not a linear layer, or what follows it is neither a scale nor a softcap.
    """
    head = vocabulary_head(policy)
    transform = logit_transform(policy)
    if transform is None:
        raise UserError(
            f"{type(policy).__name__} makes its logits from the vocabulary head in an unknown way: they cannot be "
            "computed a piece of the vocabulary at a time"
        )
    hidden: list[Tensor] = []
    options: dict[str, Any] = transform.folded(temperature)

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(args[0])
        return (args[0][..., :1, :], *args[1:])

    handles = [
        head.register_forward_pre_hook(keep_input),
        head.register_forward_hook(
            lambda module, args, output: options.update(head_weight=module.weight, head_bias=module.bias)
        ),
    ]
    try:
        output = call_policy(policy, micro_batch)
    finally:
        for handle in handles:
            handle.remove()
    hidden_states = hidden[0].flatten(0, -2)[predictor_rows(policy, micro_batch)]
    if isinstance(policy, FullyShardedDataParallel) and hidden_states.requires_grad:
        # FSDP1 ends a backward pass only if it went through the wrapper's output, which the loss makes no use of.
        hidden_states = hidden_states + 0.0 * output.logits.sum().to(hidden_states.dtype)
    return hidden_states, options


def call_policy(policy: PreTrainedModel, micro_batch: MicroBatch) -> Any:
    """The policy's output for a micro-batch: one packed row, or padded rows if its `token_layout` says so."""
    if token_layout(policy) == "padded":
        ids, mask, _ = padded_rows(micro_batch)
        return policy(input_ids=ids, **call_options(policy, attention_mask=mask))
    is_packed_kernel = policy.config._attn_implementation == packed_attention.NAME
    buckets = {"sequence_buckets": micro_batch.sequence_buckets} if is_packed_kernel else {}
    with packed_attention.without_mask() if is_packed_kernel else nullcontext():
        return policy(
            input_ids=micro_batch.input_ids,
            position_ids=micro_batch.position_ids,
            **call_options(policy),
            **buckets,
        )


def token_layout(policy: PreTrainedModel) -> TokenLayout:
    """How sequences are laid out for this policy; `packed` unless `choose_layout` found that it mixes them."""
    return policy.__dict__.get("token_layout", "packed")


def set_token_layout(policy: PreTrainedModel, layout: TokenLayout) -> None:
    """Set how sequences are laid out for a policy from now on."""
    policy.__dict__["token_layout"] = layout


def predictor_rows(policy: PreTrainedModel, micro_batch: MicroBatch) -> Tensor:
    """Where each response token is predicted from among all positions of the policy's input, `[num_tokens]`."""
    if token_layout(policy) == "padded":
        return padded_rows(micro_batch)[2][micro_batch.predictor_positions]
    return micro_batch.predictor_positions


def response_logits(policy: PreTrainedModel, micro_batch: MicroBatch, temperature: float) -> Tensor:
    """The policy's own logits at every response token divided by the temperature, `[num_tokens, vocab_size]`."""
    logits = call_policy(policy, micro_batch).logits
    return logits.flatten(0, -2)[predictor_rows(policy, micro_batch)] / temperature


def uses_own_logits(policy: PreTrainedModel) -> bool:
    """True if statistics are made from the policy's whole logits: the head is adapted, or followed by a function.

    Right for any model, but all logits of a micro-batch are held at once.
    """
    head = policy.get_output_embeddings()
    is_adapted_or_missing = head is None or hasattr(head, "base_layer")
    return is_adapted_or_missing or (isinstance(head, nn.Linear) and logit_transform(policy) is None)


def probe_rollouts(policy: PreTrainedModel) -> list[Rollout]:
    """Rollouts of arbitrary tokens from the middle of the vocabulary, away from most special tokens."""
    vocab_size = int(policy.config.get_text_config().vocab_size)
    longest = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or 2**31
    low, width, rollouts, token = vocab_size // 4, max(1, vocab_size // 2), [], 0
    for index, lengths in enumerate(PROBE_LENGTHS):
        prompt_length, response_length = lengths if sum(lengths) <= longest // 2 else (1, 1)
        tokens = [low + (token + 7 * i + i * i) % width for i in range(prompt_length + response_length)]
        token += 11
        prompt = Prompt(index, "", "", tuple(tokens[:prompt_length]), "")
        rollouts.append(
            Rollout(prompt, 0, np.array(tokens[prompt_length:], dtype=np.int32), np.zeros(0, np.float32), "")
        )
    return rollouts


def is_exact(policy: PreTrainedModel) -> bool:
    """True if the policy computes in float32 or float64."""
    return policy.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(policy.device.type)


@torch.no_grad()
def packing_difference(policy: PreTrainedModel) -> float:
    """Relative change of a sequence's hidden states, or logits, by the neighbours that it is laid out with."""
    rollouts = probe_rollouts(policy)

    def read(indices: list[int]) -> Tensor:
        micro_batch = make_micro_batch(rollouts, indices, policy.device)
        if uses_own_logits(policy):
            return response_logits(policy, micro_batch, 1.0).float()
        return head_inputs(policy, micro_batch)[0].float()

    together = read([0, 1, 2])
    alone = torch.cat([read([index]) for index in range(3)])
    return float((together - alone).norm() / alone.norm())


def check_packing(policy: PreTrainedModel) -> None:
    """Check that sequences packed into one row do not see each other.

    Most attention kernels keep them apart by their positions; one that does not, or a recurrent layer, would mix
    unrelated rollouts without any other sign.

    Raises:
        UserError: If the hidden states of a sequence depend on its neighbour.
    """
    difference = packing_difference(policy)
    if not difference < (1e-3 if is_exact(policy) else 0.05):
        raise UserError(
            f"{type(policy).__name__} with attention kernel {policy.config._attn_implementation!r} lets packed "
            f"sequences see each other (hidden states change by {difference:.1%}): choose another "
            "model.policy.attn_implementation, such as eager, sdpa or flash_attention_2"
        )


def vocabulary_head(policy: PreTrainedModel) -> nn.Linear:
    """The layer that makes logits of hidden states.

    Raises:
        UserError: If it is not a linear layer.
    """
    head = policy.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
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
    if uses_own_logits(policy):
        logits = response_logits(policy, micro_batch, temperature)
        return TokenStatistics(*statistics_from_logits(logits, micro_batch.targets, entropy_gradient))
    hidden_states, head = head_inputs(policy, micro_batch, temperature)
    return token_statistics(
        hidden_states,
        targets=micro_batch.targets,
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
    if couples_tokens or uses_own_logits(policy):
        statistics = response_statistics(
            policy,
            micro_batch,
            temperature=temperature,
            max_logits_bytes=max_logits_bytes,
            entropy_gradient=entropy_gradient,
        )
        return token_loss(statistics, slice(0, len(micro_batch.targets)))
    hidden_states, head = head_inputs(policy, micro_batch, temperature)
    return chunked_loss(
        hidden_states,
        targets=micro_batch.targets,
        token_loss=token_loss,
        entropy_gradient=entropy_gradient,
        max_logits_bytes=max_logits_bytes,
        **head,
    )
