"""Weights of rollouts in the loss: how the loss is normalized.

All denominators are global: over every micro-batch and rank of the optimizer step. The mean of micro-batch means would
depend on how the batch happens to be cut.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["prompt_mean", "token_mean", "sequence_mean"]
LengthNormalisation = Literal["max_response_length", "response_length"]


def token_weights(
    group_sizes: Tensor,
    group_shares: Tensor,
    response_lengths: Tensor,
    *,
    aggregation: Aggregation,
    length_normalisation: LengthNormalisation,
    num_prompts: int,
    num_rollouts: int,
    num_tokens: int,
    max_response_length: int,
) -> Tensor:
    """Weight of each token of a rollout, so that the loss is `Σ weight · token loss`.

    | aggregation | weight of a rollout |
    |---|---|
    | `prompt_mean` | `s_i / (N n_i)`: unequal groups do not change the objective |
    | `sequence_mean` | `1 / Σ n_i`: prompt i weighs n_i |
    | `token_mean` | no weight of its own: every token weighs `1 / num_tokens` |

    A rollout's weight is spread over its tokens as `1 / max_response_length` each (Dr. GRPO, arXiv 2503.20783: no bias
    towards short right and long wrong responses) or as `1 / response_length` (their mean).

    Args:
        group_sizes: Number of rollouts in the group of each rollout, n, `[num_rollouts on this rank]`.
        group_shares: Share of the prompt's weight that the rollout's group has, s, `[num_rollouts on this rank]`; 1 but
            where a pilot and a commit group share a prompt.
        response_lengths: Tokens of each rollout, `[num_rollouts on this rank]`.
        aggregation: See the table.
        length_normalisation: How a rollout's weight is spread; without effect under `token_mean`.
        num_prompts: Prompts of the optimizer step that count, all ranks; see `counted_groups`.
        num_rollouts: Their rollouts, all ranks.
        num_tokens: Their response tokens, all ranks.
        max_response_length: The length limit, tokens.

    Returns:
        `[num_rollouts on this rank]`, float32.
    """
    if aggregation == "token_mean":
        return (response_lengths * 0.0 + 1.0 / num_tokens).float()
    rollout_weights = group_shares / (num_prompts * group_sizes) if aggregation == "prompt_mean" else 1.0 / num_rollouts
    spread = max_response_length if length_normalisation == "max_response_length" else response_lengths.double()
    return (response_lengths * 0.0 + rollout_weights / spread).float()


def counted_groups(group_sizes: Tensor, *, needs_others: bool) -> Tensor:
    """Groups that count in the denominators.

    A rollout whose group has lost all others (their rewards failed and were dropped) has no baseline, hence advantage 0
    whatever its reward: counting its prompt would shrink the step. Groups of equal rewards do count: leaving them out
    would weigh prompts by their outcomes and bias the gradient.

    Args:
        group_sizes: Rollouts left in each group of the optimizer step, all ranks, `[num_groups]`, int64.
        needs_others: The advantage compares a rollout with its group, so that a group of one has no signal.

    Returns:
        `[num_groups]`, bool: groups of two or more, or where there are none (only an entropy or KL term is left to
        normalize) or no comparison is made, all that have a rollout.
    """
    counted = group_sizes >= (2 if needs_others else 1)
    return counted if bool(counted.any()) else group_sizes >= torch.ones_like(group_sizes)
