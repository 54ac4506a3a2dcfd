"""The few collective operations of the loop, and seeds that do not depend on how many processes share the work.

Everything works in a single process too, where the collectives are the identity.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dynamo_lightning.errors import RunError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_objects(items: list[T]) -> list[T]:
    """The items of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return list(items)
    parts: list[list[T] | None] = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts if part is not None for item in part]


def gather_values(values: Tensor) -> Tensor:
    """The values of all ranks, in rank order, on every rank; ranks may hold different numbers of values.

    Args:
        values: `[num_values on this rank]`.

    Returns:
        `[num_values on all ranks]`.
    """
    if world_size() == 1:
        return values
    sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(values)], dtype=torch.int64, device=values.device))
    longest = max(int(size) for size in sizes)
    padded = values.new_zeros(longest)
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def exchange_values(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Send each rank its own part of the values, and receive what all ranks send to this one.

    Args:
        values: What this rank sends, in the order of the receiving ranks, `[Σ counts]`, on the CPU.
        counts: How many values each rank gets, `[world_size]`.

    Returns:
        What this rank receives, in the order of the sending ranks, on the CPU.
    """
    if world_size() == 1:
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else values.device
    sent = torch.tensor(counts, dtype=torch.int64, device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    result = torch.empty(int(received.sum()), dtype=values.dtype, device=device)
    dist.all_to_all_single(result, values.to(device), received.tolist(), list(counts))
    return result.cpu()


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each named value summed over the ranks that have it, on every rank."""
    totals: dict[str, float] = {}
    for name, value in gather_objects(list(values.items())):
        totals[name] = totals.get(name, 0.0) + value
    return totals


def stop_together(message: str) -> None:
    """Raise on every rank what went wrong on any, so that none waits for another for ever.

    Args:
        message: Empty if nothing went wrong on this rank.

    Raises:
        RunError: With the first message that is not empty.
    """
    messages = gather_objects([message] if message else [])
    if messages:
        raise RunError(messages[0])


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest of all ranks' values."""
    if world_size() == 1:
        return value
    largest = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed from a key, the same on every machine and for any number of processes."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def run_seed() -> int:
    """The seed given to Lightning's `seed_everything` (`--seed_everything` on the command line), 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
