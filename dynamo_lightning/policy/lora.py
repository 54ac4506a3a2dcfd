"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: trained instead of the weights, merged on the way out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dynamo_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of rank r: a layer computes `W x + (alpha / r) B A x`, of which only A and B are trained.

    The settings are peft's. Its `lora_dropout` is not among them: training passes are without any dropout.
    """

    rank: int = 32
    """r."""
    alpha: int = 64
    """Scale of what the adapters add, times r."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Ends of the names of the layers that get adapters, such as `q_proj`; `all-linear` is every one but the head,
    experts of mixtures included."""
    target_parameters: list[str] = field(default_factory=list)
    """Ends of the names of stacked parameters that get adapters, such as `experts.gate_up_proj`; `all-linear` finds
    them by itself."""
    use_rslora: bool = False
    """Scale by `alpha / √r` instead (rank-stabilized LoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Learn the magnitude of each output in addition (DoRA, arXiv 2402.09353); not for stacked parameters."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers: a regular expression for the end of the name, and the rank."""
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    """Other scales for some layers, likewise."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained too: none, all of the model, or those of layers with adapters."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, ranks in (("rank", [self.rank]), ("rank_pattern", self.rank_pattern.values())):
            if min(ranks, default=1) < 1:
                raise UserError(f"model.policy.lora.{name} must be at least 1, got {min(ranks)}")
        if not self.target_modules and not self.target_parameters:
            raise UserError("model.policy.lora.target_modules is empty: nothing would be trained")
        if self.use_dora and self.target_parameters:
            raise UserError(
                f"model.policy.lora.use_dora=true does not go with target_parameters={self.target_parameters}: peft "
                "has no DoRA for stacked parameters"
            )


def add_adapters(policy: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze the policy and give its layers adapters, which add nothing at first.

    Raises:
        UserError: If peft is not installed, refuses the settings, or finds no layer of such a name.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("model.policy.lora needs peft: pip install -e '.[lora]'") from error
    from transformers.pytorch_utils import Conv1D

    everything = config.target_modules == ["all-linear"]
    experts = stacked_experts(policy) if everything else []
    if experts and config.use_dora:
        raise UserError(
            f"model.policy.lora.use_dora=true: peft has no DoRA for stacked experts ({', '.join(experts)}): list "
            "other layers in model.policy.lora.target_modules, such as [q_proj, v_proj], or set use_dora=false"
        )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules="all-linear" if everything else config.target_modules,
        target_parameters=[*config.target_parameters, *experts] or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        bias=config.bias,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in policy.modules()),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            policy.add_adapter(settings)
    except ValueError as error:
        raise UserError(
            f"model.policy.lora.target_modules={config.target_modules}, target_parameters="
            f"{config.target_parameters}: {error}"
        ) from error
    for text in (str(note.message) for note in notes):
        for name in ("rank_pattern", "alpha_pattern"):
            unused = [key for key in getattr(config, name) if repr(key) in text and "did not match" in text]
            if unused and name in text:
                raise UserError(f"model.policy.lora.{name}: no layer with adapters has a name that ends in {unused[0]}")
        # peft also notes which layers are stored transposed, and patterns that it made up itself.
        if "fan_in_fan_out is set to" not in text and "keys did not match" not in text:
            rank_zero_warn(text)


def stacked_experts(policy: PreTrainedModel) -> list[str]:
    """Ends of the names of parameters that hold a matrix for each expert, such as `experts.gate_up_proj`."""
    found: dict[str, None] = {}
    for name, module in policy.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and "experts" in name.rpartition(".")[2]:
                found[f"{name.rpartition('.')[2]}.{own}"] = None
    return list(found)


@contextmanager
def without_adapters(policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The policy as it was before it got adapters: the reference of a KL term."""
    policy.disable_adapters()
    try:
        yield policy
    finally:
        policy.enable_adapters()


def merged_parameters(policy: PreTrainedModel, cast: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, whole, as a policy without adapters has them; a tied head is not repeated.

    Adapted layers are merged by peft itself, in float32 on a copy of one layer at a time. With a sharded policy every
    rank must run through all of it: each parameter is gathered in turn.

    Args:
        policy: With or without adapters.
        cast: Round merged values to the type of the parameter that they take the place of.
    """
    adapted = adapted_layers(policy)
    done: set[str] = set()
    for name, parameter in policy.named_parameters():
        prefix = next((prefix for prefix in prefixes(name) if prefix in adapted), None)
        if prefix is None:
            yield name, _whole(parameter)
        elif prefix not in done:
            done.add(prefix)
            for own_name, value, dtype in merged_layer(adapted[prefix]):
                yield f"{prefix}.{own_name}", value.to(dtype) if cast else value


def prefixes(name: str) -> Iterator[str]:
    """Names of the modules that hold a parameter, the outermost first."""
    parts = name.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def adapted_layers(policy: PreTrainedModel) -> dict[str, Any]:
    """The layers that have adapters, by name."""
    if not getattr(policy, "_hf_peft_config_loaded", False):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in policy.named_modules() if isinstance(module, BaseTunerLayer)}


@torch.no_grad()
def merged_layer(layer: Any) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Parameters of an adapted layer after the merge, in at least float32, each with its name and own type."""
    types = {name: parameter.dtype for name, parameter in layer.get_base_layer().named_parameters()}
    merged = copy.deepcopy(layer)
    for module in merged.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = _whole(parameter)
            value = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    if hasattr(merged, "unload_and_optionally_merge_module"):  # stacked parameters
        base = merged.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        merged.merge()
        base = merged.get_base_layer()
    for name, parameter in base.named_parameters():
        yield name, parameter.detach(), types[name]


def _whole(parameter: Tensor) -> Tensor:
    """A parameter that may be spread over processes, gathered, without gradient."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
