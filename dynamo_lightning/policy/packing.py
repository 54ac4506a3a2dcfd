"""Rollouts packed into micro-batches of a token budget: one row each, no padding.

Sequences are laid end to end with `position_ids` restarting at 0 and without an attention mask; transformers, or
`packed_attention.py`, then keeps them apart. Packed logits equal unpacked ones (tested for Qwen2, Qwen3, Llama, Mistral
and Gemma architectures).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
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
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise UserError(
            f"a prompt with its response has {longest} tokens, but model.updates.max_tokens_per_micro_batch "
            f"is {max_tokens}: raise it, or lower data.max_prompt_length or model.sampling.max_response_length"
        )
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    if layout == "padded":  # the first sequence of a micro-batch is its longest and says how wide it is
        for index in by_length:
            if not rows or (len(rows[-1]) + 1) * lengths[rows[-1][0]] > max_tokens:
                rows.append([])
            rows[-1].append(index)
        return rows
    free = FirstFit(len(lengths), max_tokens)
    for index in by_length:
        row = free.take(lengths[index])
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
    return rows


class FirstFit:
    """Bins of equal capacity of which the first with enough space is found in logarithmic time.

    A binary tree over the bins whose nodes hold the largest space below them.

    Args:
        num_bins: Number of bins.
        capacity: Space of each.
    """

    def __init__(self, num_bins: int, capacity: int) -> None:
        self._first_leaf = 1 << max(0, num_bins - 1).bit_length()
        self._largest = [capacity] * (2 * self._first_leaf)

    def take(self, space: int) -> int:
        """Take space, at most the capacity, from the first bin that has it; there are as many bins as calls."""
        largest, node = self._largest, 1
        while node < self._first_leaf:
            node = 2 * node if largest[2 * node] >= space else 2 * node + 1
        found = node - self._first_leaf
        largest[node] -= space
        while node > 1:
            node //= 2
            largest[node] = max(largest[2 * node], largest[2 * node + 1])
        return found


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


@dataclass(frozen=True)
class TokenArrays:
    """Prompts and responses of some of this rank's rollouts end to end, from which micro-batches are cut."""

    token_ids: NDArray[np.int32]
    """`[total_length]`."""
    starts: NDArray[np.int64]
    """Position of each sequence in `token_ids`, `[num_sequences + 1]`."""
    is_response: NDArray[np.bool_]
    """True where the policy sampled, `[total_length]`."""
    response_lengths: NDArray[np.int64]
    """Response tokens of each sequence, `[num_sequences]`."""
    response_offsets: NDArray[np.int64]
    """Position of each response among the response tokens of all of this rank's rollouts, `[num_sequences]`."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], indices: Sequence[int]) -> TokenArrays:
        """Arrays of the chosen rollouts, in the order of the indices."""
        response_lengths = np.array([rollout.response_length for rollout in rollouts], dtype=np.int64)
        chosen = [rollouts[i] for i in indices]
        lengths = [len(rollout.prompt.token_ids) + len(rollout.token_ids) for rollout in chosen]
        starts = np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])
        token_ids, is_response = np.empty(starts[-1], dtype=np.int32), np.empty(starts[-1], dtype=bool)
        if chosen:
            parts = [part for rollout in chosen for part in (rollout.prompt.token_ids, rollout.token_ids)]
            np.concatenate(parts, out=token_ids, casting="unsafe")
            prompts = {id(r.prompt): np.zeros(len(r.prompt.token_ids), dtype=bool) for r in chosen}
            masks = [part for rollout in chosen for part in (prompts[id(rollout.prompt)], rollout.loss_mask)]
            np.concatenate(masks, out=is_response)
        rows = np.asarray(indices, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(response_lengths)])[rows]
        return cls(token_ids, starts, is_response, response_lengths[rows], offsets)

    def cut(self, rows: Sequence[int], device: torch.device) -> MicroBatch:
        """Lay some of the sequences end to end.

        Args:
            rows: Sequences to take, by their position here.
            device: Where the tensors go.
        """
        chosen = np.asarray(rows, dtype=np.int64)
        lengths = self.starts[chosen + 1] - self.starts[chosen]
        first = np.cumsum(lengths) - lengths

        def of_each_token(values: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.repeat(values, lengths)

        positions = np.arange(lengths.sum()) - of_each_token(first)
        places = positions + of_each_token(self.starts[chosen])
        token_ids = self.token_ids[places].astype(np.int64)
        is_response = self.is_response[places]
        counts = self.response_lengths[chosen]
        before = np.cumsum(counts) - counts
        token_indices = np.arange(counts.sum()) + np.repeat(self.response_offsets[chosen] - before, counts)

        def tensor(values: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(values).to(device)

        return MicroBatch(
            tensor(token_ids)[None],
            tensor(positions)[None],
            tensor(np.flatnonzero(is_response) - 1),
            tensor(token_ids[is_response]),
            bucket_sequences(lengths, device),
            tensor(token_indices),
        )


def make_micro_batch(rollouts: Sequence[Rollout], indices: Sequence[int], device: torch.device) -> MicroBatch:
    """Lay the chosen rollouts end to end.

    Args:
        rollouts: All rollouts of this rank.
        indices: Those to take.
        device: Where the tensors go.
    """
    return TokenArrays.of(rollouts, indices).cut(range(len(indices)), device)


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


class MicroBatches:
    """The chosen rollouts in micro-batches, equally many on every rank, each made when its turn comes.

    Ranks agree on the number before the first is computed: sharded policies communicate in every forward pass.

    Yields micro-batches paired with whether they count: `(micro_batch, True)`, or `(filler, False)`.

    Args:
        rollouts: All rollouts of this rank.
        indices: Those to take.
        filler: Stands in on a rank that runs out of micro-batches before others do.
        max_tokens: Tokens a micro-batch may hold.
        device: Where the tensors go.
        layout: How the policy will be given them.
    """

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        indices: Sequence[int],
        filler: Rollout,
        max_tokens: int,
        device: torch.device,
        layout: TokenLayout = "packed",
    ) -> None:
        self._arrays = TokenArrays.of(rollouts, indices)
        self._rows = pack(np.diff(self._arrays.starts).tolist(), max_tokens, layout)
        self._num_micro_batches = max_over_ranks(len(self._rows), device)
        self._filler = filler
        self._device = device

    def __len__(self) -> int:
        """Number of micro-batches, fillers included."""
        return self._num_micro_batches

    def __iter__(self) -> Iterator[tuple[MicroBatch, bool]]:
        """Cut one micro-batch after the other."""
        for row in self._rows:
            yield self._arrays.cut(row, self._device), True
        for _ in range(len(self._rows), len(self)):
            yield make_micro_batch([self._filler], [0], self._device), False
