"""Weight of each response token in the loss of an optimizer step."""

from __future__ import annotations

from torch import Tensor

from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.losses.weights import token_weights
from dynamo_lightning.types import RolloutBatch
from dynamo_lightning.update.plan import StepPlan


def step_weights(batch: RolloutBatch, loss: PolicyLoss, step: StepPlan, max_response_length: int) -> Tensor:
    """Weight of each of this rank's response tokens, see `token_weights`, `[num_tokens]`.

    Args:
        batch: This rank's rollouts with their advantages.
        loss: Says how it is normalized.
        step: The optimizer step.
        max_response_length: The length limit, tokens.
    """
    lengths, counted = batch.response_lengths, step.counted_groups
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
