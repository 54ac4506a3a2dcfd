"""Log-probabilities and other statistics of response tokens under the policy, without gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynamo_lightning.distributed import derive_seed, run_seed, sum_over_ranks
from dynamo_lightning.errors import RunError
from dynamo_lightning.losses.token_statistics import TokenStatistics, columns_of
from dynamo_lightning.policy.forward import response_statistics, token_layout
from dynamo_lightning.policy.packing import MicroBatches
from dynamo_lightning.types import RolloutBatch
from dynamo_lightning.update.config import UpdateConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def all_statistics(
    policy: PreTrainedModel, batch: RolloutBatch, indices: Sequence[int], config: UpdateConfig, temperature: float
) -> TokenStatistics:
    """Statistics of all response tokens of this rank's rollouts, `[num_tokens]` each, without gradient.

    Float32, or float64 for a float64 policy; 0 for rollouts that are not among the chosen.
    """
    num_tokens = int(batch.response_lengths.sum())
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    columns = [torch.zeros(num_tokens, dtype=dtype, device=policy.device) for _ in range(4)]
    budget = config.max_tokens_per_micro_batch
    layout = token_layout(policy)
    for micro_batch, counts in MicroBatches(batch.rollouts, indices, batch.filler, budget, policy.device, layout):
        statistics = response_statistics(
            policy, micro_batch, temperature=temperature, max_logits_bytes=config.max_logits_bytes
        )
        if counts:
            for column, part in zip(columns, columns_of(statistics), strict=True):
                column[micro_batch.token_indices] = part.to(dtype)
    return TokenStatistics(*columns)


def engine_statistics(batch: RolloutBatch, policy: PreTrainedModel) -> TokenStatistics:
    """Statistics that the engine gave of all response tokens of this rank, as `all_statistics` returns them."""
    empty = np.empty((0, len(fields(TokenStatistics))), dtype=np.float32)
    given = [rollout.token_statistics for rollout in batch.rollouts if rollout.token_statistics is not None]
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    columns = torch.from_numpy(np.concatenate([empty, *given])).to(policy.device, dtype)
    return TokenStatistics(*columns.unbind(-1))


def check_finite(batch: RolloutBatch, logprobs: Tensor) -> None:
    """Stop, on every rank, if a log-probability is NaN or infinite.

    Args:
        batch: This rank's rollouts.
        logprobs: Of their response tokens, `[num_tokens]`.

    Raises:
        RunError: Names the prompts.
    """
    parts = logprobs.split(batch.response_lengths.tolist())
    prompt_ids = (
        {
            rollout.prompt.prompt_id
            for rollout, part in zip(batch.rollouts, parts, strict=True)
            if not torch.isfinite(part).all()
        }
        if not torch.isfinite(logprobs).all()
        else set()
    )
    count = int(sum_over_ranks({"prompts": float(len(prompt_ids))})["prompts"])
    if count:
        named = ", ".join(map(str, sorted(prompt_ids)[:10])) or "on other processes"
        raise RunError(
            f"the policy's log-probabilities of responses to {count} prompts are not finite (prompt ids {named}) at "
            f"iteration {batch.iteration}: training stops before the policy is lost; the last checkpoint is intact"
        )


def token_keys(batch: RolloutBatch, device: torch.device) -> Tensor:
    """A random number for each response token of this rank, `[num_tokens]`, int64, from 0.

    A pure function of run seed, iteration, prompt, sample index and position: the same on whichever rank and in
    whichever micro-batch the token is.
    """
    numbers = [np.zeros(0, dtype=np.uint64)]
    for rollout in batch.rollouts:
        seed = derive_seed(run_seed(), "tokens", batch.iteration, *rollout.key)
        numbers.append(np.random.Philox(key=seed).random_raw(rollout.response_length))
    return torch.from_numpy((np.concatenate(numbers) >> np.uint64(1)).astype(np.int64)).to(device)
