"""PyTorch's `sdpa` without what it would compute in vain: between packed sequences, and copies of shared keys.

In a packed row, PyTorch's `sdpa` works on every pair of positions and masks most of them: time and memory grow with the
square of the row. Here sequences of about equal length are taken out of the row, side by side, and attended to with the
causal kernel, which needs no mask; only `flash_attention_2` does as well, and it has to be installed. Registered with
transformers as `packed_sdpa`, which gives what `sdpa` gives wherever no sequences are given, in generation for example.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from dynamo_lightning.errors import UserError

NAME = "packed_sdpa"
_PLAIN_OPTIONS = frozenset({"dropout", "scaling", "sliding_window", "position_ids", "use_cache"})
"""Options allowed while one token is generated; the mask has the sliding window, dropout is off."""
_without_mask = ContextVar("without_mask", default=False)


@dataclass(frozen=True)
class SequenceBuckets:
    """Where the sequences of a row are; those of about equal length together."""

    positions: tuple[Tensor, ...]
    """For each bucket positions in the row, `[num_sequences, longest]`; what is missing on the right repeats the last,
    which no earlier position attends to."""
    order: Tensor
    """Where each position of the row is among all entries of the buckets laid end to end, `[row_length]`."""


def bucket_sequences(lengths: ArrayLike, device: torch.device) -> SequenceBuckets:
    """Put sequences laid end to end into buckets; a fifth of a bucket's entries may be missing, or 8 per sequence.

    Args:
        lengths: Of the sequences, in the order of the row, each at least 1.
        device: Where the tensors go.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    by_length = np.argsort(-sizes, kind="stable")
    positions, order = [], np.empty(starts[-1], dtype=np.int64)
    offset = first = 0
    while first < len(by_length):
        longest = sizes[by_length[first]]
        # Lengths fall: the bucket ends before the first sequence that would leave too much of it empty.
        shortest = longest - max(8, longest // 5)
        last = first + int(np.searchsorted(-sizes[by_length[first:]], -shortest, side="right"))
        bucket = by_length[first:last]
        own, step = sizes[bucket][:, None], np.arange(longest)[None, :]
        places = starts[bucket][:, None] + np.minimum(step, own - 1)
        is_token = step < own
        order[places[is_token]] = offset + np.flatnonzero(is_token)
        offset += places.size
        positions.append(torch.from_numpy(places).to(device))
        first = last
    return SequenceBuckets(tuple(positions), torch.from_numpy(order).to(device))


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_buckets: SequenceBuckets | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of the name `packed_sdpa`, as transformers calls it.

    Args:
        module: The attention layer.
        query: `[batch_size, num_heads, query_length, head_dim]`.
        key: `[batch_size, num_key_value_heads, key_length, head_dim]`.
        value: As the key.
        attention_mask: Only without buckets.
        sequence_buckets: The sequences of the one row; `None` attends as `sdpa` does.
        **options: Scaling, dropout, sliding window, …

    Returns:
        `[batch_size, query_length, num_heads, head_dim]`, and no attention weights.

    Raises:
        UserError: If the layer asks for what the kernel does not compute.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    left_out = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if left_out:
        raise UserError(
            f"model.policy.attn_implementation: sdpa leaves out {left_out[0]} of {type(module).__name__}: choose eager"
        )
    if sequence_buckets is None:
        if query.shape[2] == 1 and query.shape[1] != key.shape[1] and options.keys() <= _PLAIN_OPTIONS:
            return _grouped_decoding(query, key, value, attention_mask, options.get("scaling")), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    outputs = []
    for positions in sequence_buckets.positions:
        num_sequences, length = positions.shape
        queries, keys, values = (
            x[0].index_select(1, positions.flatten()).unflatten(1, (num_sequences, length)).transpose(0, 1)
            for x in (query, key, value)
        )
        mask = None
        if window is not None and length > window:
            steps = torch.arange(length, device=query.device)
            distance = steps[:, None] - steps[None, :]
            mask = ((distance >= 0) & (distance < window))[None, None].expand(num_sequences, 1, -1, -1)
        output, _ = sdpa_attention_forward(
            module, queries, keys, values, mask, **(options | {"is_causal": mask is None})
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, sequence_buckets.order)[None], None


def _grouped_decoding(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attend from one position; heads that share a key head are laid out as several queries of it.

    `sdpa` would copy the whole cache of keys and values for each of them, at every token, because of the mask.
    """
    grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    output = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.flatten(1, 2)[:, None]


def packed_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """The mask of `sdpa`; none `without_mask`."""
    from transformers.masking_utils import sdpa_mask

    return None if _without_mask.get() else sdpa_mask(*arguments, **options)


@contextmanager
def without_mask() -> Iterator[None]:
    """Make no mask inside: its size is the square of the row's."""
    token = _without_mask.set(True)
    try:
        yield
    finally:
        _without_mask.reset(token)


def register() -> None:
    """Make the name known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
