"""Weights and advantages of the tokens of one optimizer step: all that depends on which rollouts take part in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamo_lightning.distributed import sum_over_ranks
from dynamo_lightning.losses.policy_loss import LossInputs, PolicyLoss
from dynamo_lightning.losses.weights import counted_groups, token_weights
from dynamo_lightning.update.scoring import Experience, all_statistics

if TYPE_CHECKING:
    from dynamo_lightning.update.steps import PolicyHolder


def step_weights(experience: Experience, loss: PolicyLoss, chosen: Tensor, max_response_length: int) -> Tensor:
    """Weight of each of this rank's response tokens, see `token_weights`, `[num_tokens]`.

    Args:
        experience: This rank's share of the batch.
        loss: Says how it is normalized.
        chosen: Groups of the optimizer step, `[num_groups]`, bool.
        max_response_length: The length limit, tokens.
    """
    batch = experience.batch
    lengths = batch.response_lengths
    sizes = torch.where(chosen, batch.group_sizes, 0)
    counted = counted_groups(sizes, needs_others=loss.advantage.equal_rewards_give_zero)
    weights = token_weights(
        batch.group_sizes[batch.group_indices],
        batch.group_shares[batch.group_indices],
        lengths,
        aggregation=loss.aggregation,
        length_normalisation=loss.length_normalisation,
        num_prompts=len(batch.group_prompts[counted].unique()),
        num_rollouts=int(batch.group_sizes[counted].sum()),
        num_tokens=int(batch.group_tokens[counted].sum()),
        max_response_length=max_response_length,
    )
    return weights.repeat_interleave(lengths)


def kept_scale(experience: Experience, loss: PolicyLoss, chosen: Tensor, kept: Tensor) -> Tensor:
    """Factor on the advantages that leaves only the kept tokens in the denominators of the surrogate.

    The weights themselves stay: a KL or entropy term and a penalty are means over all tokens.

    Args:
        experience: This rank's share of the batch.
        loss: Says how it is normalized.
        chosen: Groups of the optimizer step, `[num_groups]`, bool.
        kept: Tokens that count, `[num_tokens]`, bool.

    Returns:
        `[num_tokens]`: tokens of the step for each kept one under `token_mean`, tokens of the rollout for each kept one
        where a rollout is divided by its own length, else 1.
    """
    batch = experience.batch
    rollouts = batch.token_rollouts.to(kept.device)
    if loss.aggregation == "token_mean":
        counted = counted_groups(
            torch.where(chosen, batch.group_sizes, 0), needs_others=loss.advantage.equal_rewards_give_zero
        )
        counts = counted[batch.group_indices].to(kept.device)[rollouts]
        totals = sum_over_ranks({"all": float(counts.sum()), "kept": float((counts & kept).sum())})
        return torch.full_like(kept, totals["all"] / max(totals["kept"], 1.0), dtype=torch.float32)
    if loss.length_normalisation == "response_length":
        own = torch.zeros(len(batch.rollouts), device=kept.device)
        own.index_add_(0, rollouts, kept.float())
        return (batch.response_lengths.to(kept.device) / own.clamp(min=1.0))[rollouts]
    return torch.ones_like(kept, dtype=torch.float32)


def advantages_at_later_step(module: PolicyHolder, experience: Experience, chosen: Tensor) -> Tensor:
    """Advantages of a modulation that looks at what the surrogate clips by now, `[num_tokens]`.

    Takes a forward pass over the rollouts of the step that have a candidate token and an advantage.

    Args:
        module: Holds the policy and the loss.
        experience: This rank's share of the batch.
        chosen: Groups of the optimizer step, `[num_groups]`, bool.
    """
    batch, loss, policy = experience.batch, module.loss, module.policy
    modulated, old_logprobs = experience.modulated, experience.old_logprobs
    assert policy is not None and loss.modulation is not None
    assert modulated.candidates is not None and old_logprobs is not None and experience.modulation_inputs is not None
    device = old_logprobs.device
    rollouts = batch.token_rollouts.to(device)
    advantages = experience.modulation_inputs.advantages
    candidates = torch.zeros(len(batch.rollouts), dtype=torch.int64, device=device)
    candidates.index_add_(0, rollouts, modulated.candidates.long())
    takes_part = chosen[batch.group_indices].to(device)
    looked_at = takes_part & (candidates > 0) & (batch.advantages != 0).to(device)
    indices = looked_at.nonzero().squeeze(-1).tolist()
    current = all_statistics(policy, batch, indices, module.update_config, module.sampling.temperature).logprobs
    rows = looked_at[rollouts].nonzero().squeeze(-1)
    inputs = LossInputs(old_logprobs, advantages, torch.ones_like(advantages), None, rollouts)[rows]
    is_clipped = torch.zeros_like(modulated.candidates)
    if len(rows):
        sizes = loss.update_sizes(current[rows] - old_logprobs[rows], inputs)
        is_clipped[rows] = (sizes == 0) & (inputs.advantages != 0)
    return loss.modulation.at_later_step(
        experience.modulation_inputs, modulated, is_clipped=is_clipped, in_step=takes_part[rollouts]
    )
