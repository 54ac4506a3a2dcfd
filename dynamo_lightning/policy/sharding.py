"""A policy whose parameters are spread over processes, by FSDP2 or FSDP1, and what must be done differently then.

FSDP2 cuts every parameter (a `DTensor`) and gathers a layer's parameters when the layer is called. FSDP1 wraps modules
and flattens their parameters; it is here for teams whose configs say `fsdp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.loading import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_policy(policy: PreTrainedModel, strategy: Strategy, precision: str) -> PreTrainedModel:
    """Spread a policy over the processes if the strategy is one that does: each decoder layer, and the rest.

    A tied head stays with its embedding. Called in `configure_model`, where Lightning has FSDP1's `wrap` set up.

    Args:
        policy: Whole, the same on every process.
        strategy: The trainer's.
        precision: The trainer's; with `bf16-mixed` FSDP2 gathers bfloat16 parameters and adds up float32 gradients.

    Returns:
        The policy itself, or FSDP1's wrapper, which stands for it.

    Raises:
        UserError: If the policy has no list of decoder layers, or the processes would share the same data.
    """
    if isinstance(strategy, ModelParallelStrategy):
        if (size := strategy.device_mesh["tensor_parallel"].size()) != 1:
            raise UserError(
                f"trainer.strategy: {type(strategy).__name__} would make {size} processes work on the same data, which "
                "this model does not support: use fsdp2, or set tensor_parallel_size to 1 and data_parallel_size to "
                f"{strategy.device_mesh.size()}"
            )
        mixed = precision == "bf16-mixed"
        types = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
        for layer in [*decoder_layers(policy), policy]:
            fully_shard(layer, mesh=strategy.device_mesh["data_parallel"], mp_policy=types)
    elif isinstance(strategy, FSDPStrategy):
        layers = decoder_layers(policy)
        for index, layer in enumerate(layers):
            layers[index] = wrap(layer)
        return cast("PreTrainedModel", wrap(policy))
    return policy


@contextmanager
def unwrapped(policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The policy itself, to call other methods than `forward`, such as `generate`, which do not go through a wrapper.

    FSDP1's has its embedding and head whole inside; FSDP2 has no wrapper.
    """
    if isinstance(policy, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(policy, recurse=False, writeback=False):
            yield policy.module
    else:
        yield policy


def clip_gradient(policy: PreTrainedModel, max_norm: float | None) -> Tensor:
    """Scale the gradient down to a total norm of `max_norm`, over all processes; `None` leaves it.

    Returns:
        The norm before, a scalar.
    """
    if isinstance(policy, FullyShardedDataParallel):
        return policy.clip_grad_norm_(float("inf") if max_norm is None else max_norm)
    parameters = [parameter for parameter in policy.parameters() if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm is not None and torch.isfinite(norm):
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@contextmanager
def gradient_sync(model: nn.Module | None, policy: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Add gradients up over processes in the backward pass inside, or keep this process's own.

    Args:
        model: What the strategy calls; DDP's wrapper under DDP.
        policy: The policy.
        enabled: Whether to add up.
    """
    wrapper = model if isinstance(model, DistributedDataParallel) else policy
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(wrapper, DistributedDataParallel | FullyShardedDataParallel) and not enabled:
        with wrapper.no_sync():
            yield
    else:
        yield
