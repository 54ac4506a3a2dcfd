"""The policy's hidden states at the end of prompts: what it makes of a prompt before it says anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dynamo_lightning.distributed import gather_objects, rank, world_size
from dynamo_lightning.policy.forward import head_inputs, token_layout
from dynamo_lightning.policy.packing import MicroBatches
from dynamo_lightning.types import FloatArray, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def prompt_states(policy: PreTrainedModel, prompts: Sequence[Prompt], max_tokens: int) -> FloatArray:
    """Hidden states of the last layer at each prompt's last token, `[num_prompts, hidden_size]`, float32.

    They are what the vocabulary head gets. The prompts are split over the ranks and the states gathered: the same ones
    on every rank. Called on all ranks at once, with the precision context of training and the policy in `eval`.

    Args:
        policy: The policy, sharded or not.
        prompts: At least one, the same on every rank.
        max_tokens: Tokens of one forward pass.
    """
    # A response of one token, whatever it is: the prompt's last token is what would predict it.
    logprobs = np.zeros(1, dtype=np.float32)
    asked = [Rollout(p, 0, np.array(p.token_ids[-1:], dtype=np.int32), logprobs, "") for p in prompts]
    own = list(range(rank(), len(asked), world_size()))
    found: list[tuple[int, FloatArray]] = []
    micro_batches = MicroBatches(asked, own, asked[0], max_tokens, policy.device, token_layout(policy))
    for micro_batch, counts in micro_batches:
        states, _ = head_inputs(policy, micro_batch)
        if counts:
            # One response token each, so that the positions of response tokens are those of the prompts.
            positions = micro_batch.token_indices.tolist()
            found += zip(positions, states.float().cpu().numpy(), strict=True)
    by_position = dict(gather_objects(found))
    return np.stack([by_position[position] for position in range(len(asked))])
