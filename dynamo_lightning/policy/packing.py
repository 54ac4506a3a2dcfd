"""Rollouts packed into micro-batches of a token budget: one row each, no padding.

Sequences are laid end to end with `position_ids` restarting at 0 and without an attention mask; transformers, or
`packed_attention.py`, then keeps them apart. Packed logits equal unpacked ones (tested for Qwen2, Qwen3, Llama, Mistral
and Gemma architectures).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynamo_lightning.distributed import max_over_ranks
from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.packed_attention import SequenceBuckets, bucket_sequences
from dynamo_lightning.types import Rollout

TokenLayout = Literal["packed", "padded"]
"""Sequences end to end in one row, or a row for each with padding on the right, for models that would mix them."""


@dataclass(frozen=True)
class MicroBatch:
    """Several rollouts in one row."""

    input_ids: Tensor
    """Prompts and responses end to end, `[1, row_length]`."""
    position_ids: Tensor
    """Position within each sequence, `[1, row_length]`."""
    predictor_positions: Tensor
    """Where in the row each response token is predicted from, `[num_tokens]`: the position before its own."""
    targets: Tensor
    """The response tokens, `[num_tokens]`."""
    sequence_buckets: SequenceBuckets
    """Where each sequence is, for attention."""
    token_indices: Tensor
    """Where each response token stands among all response tokens of this rank's rollouts, `[num_tokens]`."""


def pack(lengths: Sequence[int], max_tokens: int, layout: TokenLayout = "packed") -> list[list[int]]:
    """Distribute sequences over as few micro-batches as first-fit-decreasing finds.

    Args:
        lengths: Prompt and response tokens of each sequence.
        max_tokens: Tokens a micro-batch may hold; of a padded one, padding included.
        layout: How the sequences of a micro-batch are laid out.

    Returns:
        Indices into `lengths`, a list for each micro-batch.

    Raises:
        UserError: If a sequence is longer than a micro-batch.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > max_tokens:
            raise UserError(
                f"a prompt with its response has {lengths[index]} tokens, but model.updates.max_tokens_per_micro_batch "
                f"is {max_tokens}: raise it, or lower data.max_prompt_length or model.sampling.max_response_length"
            )
        if layout == "padded":  # sequences come longest first: the first of a micro-batch says how wide it is
            row = len(rows) - 1 if rows and free[-1] >= longest else None
        else:
            row = next((i for i, space in enumerate(free) if space >= lengths[index]), None)
        if row is None:
            rows.append([])
            free.append(max_tokens)
            row, longest = len(rows) - 1, lengths[index]
        rows[row].append(index)
        free[row] -= longest if layout == "padded" else lengths[index]
    return rows


def balance(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Spread items over ranks: the dearest first, each to the rank that has least so far.

    The largest total is at most 4/3 of the best possible (Graham, 1969).

    Args:
        costs: Of each item.
        num_ranks: Number of ranks.

    Returns:
        Indices into `costs`, ascending, a list for each rank.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, rank = heapq.heappop(heap)
        ranks[rank].append(index)
        heapq.heappush(heap, (total + costs[index], rank))
    return [sorted(indices) for indices in ranks]


def response_offsets(rollouts: Sequence[Rollout]) -> list[int]:
    """Where each rollout's response begins among all response tokens laid end to end, and their total, `[n + 1]`."""
    offsets = [0]
    for rollout in rollouts:
        offsets.append(offsets[-1] + len(rollout.token_ids))
    return offsets


def make_micro_batch(rollouts: Sequence[Rollout], indices: Sequence[int], device: torch.device) -> MicroBatch:
    """Lay the chosen rollouts end to end.

    Args:
        rollouts: All rollouts of this rank.
        indices: Those to take.
        device: Where the tensors go.
    """
    offsets = response_offsets(rollouts)
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    token_indices: list[int] = []
    for index in indices:
        prompt, response = rollouts[index].prompt.token_ids, rollouts[index].token_ids
        first_predictor = len(tokens) + len(prompt) - 1
        tokens.extend(prompt)
        tokens.extend(response)
        positions.extend(range(len(prompt) + len(response)))
        predictors.extend(range(first_predictor, first_predictor + len(response)))
        targets.extend(response)
        token_indices.extend(range(offsets[index], offsets[index + 1]))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return MicroBatch(
        tensor(tokens)[None],
        tensor(positions)[None],
        tensor(predictors),
        tensor(targets),
        bucket_sequences([len(rollouts[i].prompt.token_ids) + len(rollouts[i].token_ids) for i in indices], device),
        tensor(token_indices),
    )


def padded_rows(micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The sequences of a micro-batch in rows of their own, padded on the right.

    Returns:
        Token ids and attention mask, `[num_sequences, longest]` each, and where each position of the packed row is
        among all entries of these, `[row_length]`.
    """
    positions = micro_batch.position_ids[0]
    sequence = (positions == 0).cumsum(0) - 1
    longest = int(positions.max()) + 1
    entries = sequence * longest + positions
    ids = positions.new_zeros((int(sequence[-1]) + 1) * longest)
    ids[entries] = micro_batch.input_ids[0]
    mask = torch.zeros_like(ids)
    mask[entries] = 1
    return ids.view(-1, longest), mask.view(-1, longest), entries


def micro_batches(
    rollouts: Sequence[Rollout],
    indices: Sequence[int],
    spare: Rollout,
    max_tokens: int,
    device: torch.device,
    layout: TokenLayout = "packed",
) -> list[tuple[MicroBatch, bool]]:
    """The chosen rollouts in micro-batches, equally many on every rank.

    Ranks agree on the number before the first is computed: sharded policies communicate in every forward pass.

    Args:
        rollouts: All rollouts of this rank.
        indices: Those to take.
        spare: Stands in on a rank that runs out of micro-batches before others do.
        max_tokens: Tokens a micro-batch may hold.
        device: Where the tensors go.
        layout: How the policy will be given them.

    Returns:
        The micro-batches, paired with whether they count: `(micro_batch, True)`, or `(spare one, False)`.
    """
    lengths = [len(rollouts[i].prompt.token_ids) + len(rollouts[i].token_ids) for i in indices]
    rows = [[indices[i] for i in row] for row in pack(lengths, max_tokens, layout)]
    num_spare = max_over_ranks(len(rows), device) - len(rows)
    counted = [(make_micro_batch(rollouts, row, device), True) for row in rows]
    return counted + [(make_micro_batch([spare], [0], device), False)] * num_spare
