"""What is read off the policy: the inputs of its vocabulary head, token statistics, and a loss over them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.token_statistics import MAX_LOGITS_BYTES, TokenStatistics, chunked_loss, token_statistics
from dynamo_lightning.policy import packed_attention
from dynamo_lightning.policy.packing import MicroBatch, make_micro_batch
from dynamo_lightning.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def head_inputs(policy: PreTrainedModel, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Any]]:
    """What the logits of the response tokens are made from.

    The policy is called as a whole, so that sharding hooks run, but is asked for one position's logits only; hooks take
    the decoder's output and, while it is gathered, the head's weight.

    Returns:
        Hidden states at each response token's predictor, `[num_tokens, hidden_size]`, and the vocabulary head as
        `token_statistics` takes it: `head_weight`, `head_bias`, `softcap`.

    Raises:
        UserError: If the head is not a linear layer.
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
        UserError: If the hidden states of a sequence depend on its neighbour.
    """
    prompt = Prompt(0, "", "", (1, 2), "")
    pair = [Rollout(prompt, index, tokens, (), "", False) for index, tokens in enumerate([(3, 4, 5), (6, 7, 8)])]
    together = head_inputs(policy, make_micro_batch(pair, [0, 1], policy.device))[0].float()
    alone = head_inputs(policy, make_micro_batch(pair, [1], policy.device))[0].float()
    difference = float((together[len(alone) :] - alone).norm() / alone.norm())
    exact = policy.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(policy.device.type)
    if not difference < (1e-3 if exact else 0.05):
        raise UserError(
            f"{type(policy).__name__} with attention kernel {policy.config._attn_implementation!r} lets packed "
            f"sequences see each other (hidden states change by {difference:.1%}): choose another "
            "model.policy.attn_implementation, such as sdpa or flash_attention_2"
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
