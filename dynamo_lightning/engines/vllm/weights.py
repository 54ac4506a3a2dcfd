"""The policy's weights on their way to an engine: names, casts and the checks that they have arrived.

A push that is skipped, or reaches only part of the engine, shows in no metric for a long time: at a small learning
rate the weights of one step differ from the last ones by less than sampling noise, and in bfloat16 mostly not at all.
So each parameter has a checksum of its bits, which a single changed bit changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dynamo_lightning.policy.lora import merged_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cast_weights(policy: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter as the engine gets it: see `merged_parameters`, cast."""
    for name, value in merged_parameters(policy):
        yield name, value.to(dtype)


def checksum(values: Tensor) -> int:
    """Sum of all elements' bit patterns as unsigned integers, modulo 2⁶³.

    The order of elements and zeros do not matter, and sums of parts add up: engines transpose, pad and fuse parameters.
    """
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.detach().contiguous().view(kind)
    mask = (1 << 8 * values.element_size()) - 1
    # Signed bit patterns differ from unsigned ones by multiples of 2^bits: the sum needs their number only.
    total = int(bits.sum(dtype=torch.int64))
    if kind != torch.int64:
        total += (mask + 1) * int((bits < 0).sum())
    return total % (1 << 63)


def sum_workers(workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `weight_checksums` of all workers of an engine, added up; `copies` is their number."""
    totals: dict[str, int] = {}
    for worker in workers:
        for name, value in worker["checksums"].items():
            totals[name] = totals.get(name, 0) + int(value)
    return {"checksums": totals, "packed": workers[0]["packed"], "copies": len(workers)}


def compare_checksums(
    expected: Mapping[str, int], resident: Mapping[str, int], packed: Mapping[str, Sequence[str]], copies: int = 1
) -> tuple[list[str], int]:
    """Parameters of the engine that are not the policy's.

    Args:
        expected: Checksum of each parameter of the policy, by its name.
        resident: Checksum of each parameter that the engine still has in readable form, by its name, over all workers.
        packed: Parts of the engine's fused layers, such as `qkv_proj: [q_proj, k_proj, v_proj]`.
        copies: Number of workers; a parameter is spread over them, repeated on each, or spread over some of them and
            repeated (keys and values with fewer heads than there are workers).

    Returns:
        The names that differ, and how many parameters of the engine could be compared.
    """
    repeats = [number for number in range(1, copies + 1) if copies % number == 0]
    different, num_compared = [], 0
    for name, value in resident.items():
        layer = name.split(".")[-2] if "." in name else ""
        parts = [name.replace(f".{layer}.", f".{part}.") for part in packed.get(layer, [layer])]
        if not all(part in expected for part in parts):
            continue
        num_compared += 1
        possible = {
            sum(times * expected[part] for times, part in zip(numbers, parts, strict=True)) % (1 << 63)
            for numbers in product(repeats, repeat=len(parts))
        }
        if value % (1 << 63) not in possible:
            different.append(name)
    return different, num_compared


def fingerprint(policy: PreTrainedModel) -> tuple[int, ...]:
    """Changes whenever a parameter is written to in place, and costs nothing to compute.

    A sharded policy exchanges its parameters for gathered ones and back, so nothing can be told from them: only which
    policy it is.
    """
    versions = () if isinstance(policy, FSDPModule) else tuple(parameter._version for parameter in policy.parameters())
    return (id(policy), *versions)


def probe_sequences(policy: PreTrainedModel, seed: int, count: int, length: int) -> list[list[int]]:
    """Random token sequences on which engine and policy are compared, other ones for each seed: `[count][length]`."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = int(policy.config.get_text_config().vocab_size)
    return torch.randint(0, vocab_size, (count, length), generator=generator).tolist()


@torch.no_grad()
def sequence_logprobs(policy: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The policy's log-probability of each token but the first, `[count, length − 1]`, float32, on the CPU."""
    tokens = torch.tensor(sequences, device=policy.device)
    training = policy.training
    policy.eval()
    logits = policy(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    policy.train(training)
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1).cpu()
