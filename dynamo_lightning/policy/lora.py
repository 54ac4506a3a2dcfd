"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: trained instead of the weights, merged on the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from dynamo_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of rank r: a layer computes `W x + (alpha / r) B A x`, of which only A and B are trained."""

    rank: int = 32
    """r."""
    alpha: int = 64
    """Scale of what the adapters add, times r."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Ends of the names of the layers that get adapters, such as `q_proj`; `all-linear` is every one but the head."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1:
            raise UserError(f"model.policy.lora.rank must be at least 1, got {self.rank}")
        if not self.target_modules:
            raise UserError("model.policy.lora.target_modules is empty: nothing would be trained")


def add_adapters(policy: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze the policy and give its layers adapters, which add nothing at first.

    Raises:
        UserError: If peft is not installed, or no layer has such a name.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("model.policy.lora needs peft: pip install -e '.[lora]'") from error
    target: Any = config.target_modules
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules="all-linear" if target == ["all-linear"] else target,
        task_type="CAUSAL_LM",
    )
    try:
        policy.add_adapter(settings)
    except ValueError as error:
        raise UserError(f"model.policy.lora.target_modules={target}: {error}") from error


@contextmanager
def without_adapters(policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The policy as it was before it got adapters: the reference of a KL term."""
    policy.disable_adapters()
    try:
        yield policy
    finally:
        policy.enable_adapters()


def merged_parameters(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, whole, as a policy without adapters has them; a tied head is not repeated.

    With a sharded policy every rank must run through all of it: each parameter is gathered in turn.
    """
    layers = dict(policy.named_modules())
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            continue
        value = _whole(parameter)
        layer_name, is_adapted, part = name.partition(".base_layer.")
        if is_adapted and part == "weight":
            layer: Any = layers[layer_name]
            (adapter,) = layer.active_adapters
            a, b = _whole(layer.lora_A[adapter].weight), _whole(layer.lora_B[adapter].weight)
            value = (value.float() + layer.scaling[adapter] * (b.float() @ a.float())).to(value.dtype)
        yield name.replace(".base_layer.", "."), value


def _whole(parameter: Tensor) -> Tensor:
    """A parameter that may be spread over processes, gathered, without gradient."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
