"""Checks before the first rollout: what is read off the policy is what the policy itself computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.forward import (
    check_packing,
    is_exact,
    probe_rollouts,
    response_statistics,
    set_token_layout,
)
from dynamo_lightning.policy.logits import call_options, own_logits
from dynamo_lightning.policy.packing import TokenLayout, make_micro_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def logprob_difference(policy: PreTrainedModel) -> float:
    """Mean difference between the log-probabilities that training computes and the model's own, nats."""
    rollouts = probe_rollouts(policy)
    differences = []
    for index, rollout in enumerate(rollouts):
        micro_batch = make_micro_batch(rollouts, [index], policy.device)
        computed = response_statistics(policy, micro_batch, temperature=1.0).logprobs
        logits = own_logits(policy, [*rollout.prompt.token_ids, *rollout.token_ids])
        own = logits.log_softmax(-1)[micro_batch.predictor_positions].gather(1, micro_batch.targets[:, None])
        differences.append((computed - own.squeeze(1)).abs())
    return float(torch.cat(differences).mean())


def has_mask_table(policy: PreTrainedModel) -> bool:
    """True if a model keeps a causal mask of its longest sequence, so that no row may be longer."""
    longest = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    return any(buffer.ndim == 4 and buffer.shape[-2:] == (longest, longest) for buffer in policy.buffers())


def choose_layout(policy: PreTrainedModel) -> TokenLayout:
    """Find the layout in which training computes the policy's own log-probabilities: packed if possible, else padded.

    Sets the policy's `token_layout`. Called on all ranks at the same time, in the precision context of training.

    Raises:
        UserError: If there is none.
    """
    reason = ""
    layouts: tuple[TokenLayout, ...] = ("packed", "padded")
    if "position_ids" not in call_options(policy, position_ids=None):
        layouts, reason = (
            ("padded",),
            f"{type(policy).__name__} takes no positions, which keep packed sequences apart",
        )
    elif has_mask_table(policy):
        layouts, reason = ("padded",), f"{type(policy).__name__} has a causal mask of fixed size: rows cannot be longer"
    for layout in layouts:
        set_token_layout(policy, layout)
        try:
            check_packing(policy)
        except UserError as error:
            reason = str(error)
            continue
        difference, limit = logprob_difference(policy), 1e-4 if is_exact(policy) else 0.05
        if difference <= limit:
            if layout == "padded":
                rank_zero_warn(
                    f"{reason}. Sequences are padded to the longest of their micro-batch instead, which gives the same "
                    "numbers more slowly"
                )
            return layout
        reason = (
            f"{type(policy).__name__} with attention kernel {policy.config._attn_implementation!r}: scored "
            f"log-probabilities differ from the model's own by {difference:.1e} nats on average (at most {limit:.0e} "
            "is allowed): set model.policy.attn_implementation=eager"
        )
    set_token_layout(policy, "packed")
    raise UserError(reason)
