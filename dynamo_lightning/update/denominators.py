"""Weights and advantages of the tokens of one optimizer step: all that depends on which rollouts it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamo_lightning.distributed import sum_over_ranks
from dynamo_lightning.losses.policy_loss import LossInputs, PolicyLoss
from dynamo_lightning.types import RolloutBatch
from dynamo_lightning.update.experience import Experience
from dynamo_lightning.update.logprobs import all_statistics
from dynamo_lightning.update.plan import StepPlan, row_indices
from dynamo_lightning.update.settings import UpdateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept_scale(batch: RolloutBatch, loss: PolicyLoss, step: StepPlan, kept: Tensor) -> Tensor:
    """Factor on the advantages that leaves only the kept tokens in the denominators of the surrogate.

    The weights themselves stay: a KL or entropy term and a penalty are means over all tokens.

    Args:
        batch: This rank's rollouts with their advantages.
        loss: Says how it is normalized.
        step: The optimizer step.
        kept: Tokens that count, `[num_tokens]`, bool.

    Returns:
        `[num_tokens]`: tokens of the step for each kept one under `token_mean`, tokens of the rollout for each kept one
        where a rollout is divided by its own length, else 1.
    """
    rollouts = batch.token_rollouts.to(kept.device)
    if loss.aggregation == "token_mean":
        counts = step.counted_groups[batch.group_indices].to(kept.device)[rollouts]
        totals = sum_over_ranks({"all": float(counts.sum()), "kept": float((counts & kept).sum())})
        return torch.full_like(kept, totals["all"] / max(totals["kept"], 1.0), dtype=torch.float32)
    if loss.length_normalisation == "response_length":
        own = torch.zeros(len(batch.rollouts), device=kept.device)
        own.index_add_(0, rollouts, kept.float())
        return (batch.response_lengths.to(kept.device) / own.clamp(min=1.0))[rollouts]
    return torch.ones_like(kept, dtype=torch.float32)


def advantages_at_later_step(
    policy: PreTrainedModel, experience: Experience, step: StepPlan, settings: UpdateSettings
) -> Tensor:
    """Advantages of a modulation that depends on what the surrogate clips at the current policy, `[num_tokens]`.

    Takes a forward pass over the rollouts of the step that have a candidate token and an advantage.

    Args:
        policy: After the steps before this one.
        experience: This rank's share of the batch.
        step: The optimizer step.
        settings: The loss and the token budget.
    """
    batch, loss = experience.batch, settings.loss
    modulated, old_logprobs = experience.modulated, experience.old_logprobs
    assert loss.batch_modulation is not None
    assert modulated.candidates is not None and old_logprobs is not None and experience.modulation_inputs is not None
    device = old_logprobs.device
    rollouts = batch.token_rollouts.to(device)
    advantages = experience.modulation_inputs.advantages
    candidates = torch.zeros(len(batch.rollouts), dtype=torch.int64, device=device)
    candidates.index_add_(0, rollouts, modulated.candidates.long())
    in_step = step.rollouts.to(device)
    with_candidates = in_step & (candidates > 0) & (batch.advantages != 0).to(device)
    indices = row_indices(with_candidates)
    current = all_statistics(policy, batch, indices, settings.config, settings.temperature).logprobs
    rows = with_candidates[rollouts].nonzero().squeeze(-1)
    inputs = LossInputs(old_logprobs, advantages, torch.ones_like(advantages), None, rollouts)[rows]
    is_clipped = torch.zeros_like(modulated.candidates)
    if len(rows):
        sizes = loss.update_sizes(current[rows] - old_logprobs[rows], inputs)
        is_clipped[rows] = (sizes == 0) & (inputs.advantages != 0)
    return loss.batch_modulation.at_later_step(
        experience.modulation_inputs, modulated, is_clipped=is_clipped, in_step=in_step[rollouts]
    )
