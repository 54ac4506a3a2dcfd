"""Transforms that a model applies to the product of its vocabulary head, measured on the model itself.

Token statistics are computed from the head's input and weight, a piece of the vocabulary at a time. Several
architectures change the product afterwards: Granite and Cohere scale it, Gemma caps it softly. Their configurations
name this in a dozen ways, so it is measured: the head's output is replaced by known numbers over many orders of
magnitude, and what comes out as the model's logits shows the function.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LogitTransform:
    """`z → scale · z`, or with a softcap `z → softcap · tanh(scale · z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """The logits that a model makes of its head's output, elementwise."""
        scaled = self.scale * values
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def folded(self, temperature: float) -> dict[str, Any]:
        """The temperature and softcap that have the same effect on the head's own output as this transform.

        `softcap · tanh(scale · z / softcap) / T = c · tanh(z / c) / T'` with `c = softcap / scale`, `T' = T / scale`.
        """
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "softcap": softcap}


def call_options(policy: PreTrainedModel, **options: Any) -> dict[str, Any]:
    """Those of the options that the policy's forward pass takes, and no cache."""
    module: Any = getattr(policy, "module", policy)  # FSDP1's wrapper has a signature of its own
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    chosen = {name: value for name, value in options.items() if name in parameters or takes_any}
    return chosen | ({"use_cache": False} if "use_cache" in parameters or takes_any else {})


def logit_transform(policy: PreTrainedModel) -> LogitTransform | None:
    """The policy's transform, measured once; `None` if it is of another kind: its own logits must be used then.

    Every rank calls it at the same time.
    """
    if "logit_transform" not in policy.__dict__:
        policy.__dict__["logit_transform"] = measure_transform(policy)
    return policy.__dict__["logit_transform"]


def measure_transform(policy: PreTrainedModel) -> LogitTransform | None:
    """Replace the head's output by known values and find the function that makes logits of them.

    Returns:
        The transform; `None` if there is no linear head, if parameters take part in the function, or if it is neither a
        scale nor a softcap.
    """
    head = policy.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    grid = torch.logspace(-3, 4, head.out_features, dtype=dtype)
    grid = torch.where(torch.arange(head.out_features) % 2 == 0, grid, -grid)
    inputs, outputs = [], []
    for values in (grid, grid.flip(0)):  # the same function for every entry of the vocabulary
        values = values.to(policy.device)
        logits = logits_of(policy, head, values)
        if logits is None:
            return None
        inputs.append(values)
        outputs.append(logits)
    return fit_transform(torch.cat(inputs), torch.cat(outputs))


def logits_of(policy: PreTrainedModel, head: nn.Module, values: Tensor) -> Tensor | None:
    """The policy's logits if its head's output were these values, `[vocab_size]`.

    `None` if the head is not called, if logits of another shape come out, or if they depend on parameters otherwise.
    """
    calls: list[int] = []

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append(1)
        torch.set_grad_enabled(True)  # from here on: logits that depend on parameters show it; undone outside
        return values.expand(output.shape).clone()

    handle = head.register_forward_hook(replace)
    try:
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.int64, device=policy.device)
            logits = policy(input_ids=ids, **call_options(policy, position_ids=ids.cumsum(1) - 1)).logits
    finally:
        handle.remove()
    if not calls or logits.requires_grad or logits.shape[-1] != len(values):
        return None
    return logits.detach().flatten(0, -2)[-1]


def fit_transform(inputs: Tensor, outputs: Tensor) -> LogitTransform | None:
    """The scale and softcap that explain all outputs, to the rounding of their type; `None` if none do.

    Args:
        inputs: Values over many orders of magnitude, `[num_values]`.
        outputs: The function of each, `[num_values]`.
    """
    tolerance = max(8 * torch.finfo(outputs.dtype).eps, 1e-5)
    inputs, outputs = inputs.double(), outputs.double()
    if not torch.isfinite(outputs).all():
        return None
    linear = (outputs * inputs).sum() / inputs.square().sum()
    softcap = outputs.abs().max()
    bent = (outputs.abs() > 1e-3 * softcap) & (outputs.abs() < 0.9 * softcap)  # where the function can be inverted
    capped = softcap * torch.atanh(outputs[bent] / softcap) / inputs[bent]
    candidates = [LogitTransform(float(linear))]
    if len(capped):
        candidates.append(LogitTransform(float(capped.mean()), float(softcap)))
    for transform in candidates:
        if transform.scale > 0 and torch.allclose(transform(inputs), outputs, rtol=tolerance, atol=0.0):
            if abs(transform.scale - 1) < tolerance:
                transform = LogitTransform(1.0, transform.softcap)
            return transform
    return None


def own_logits(policy: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """The logits of one sequence as the model itself computes them, `[length, vocab_size]`, float32 or float64."""
    ids = torch.tensor([token_ids], dtype=torch.int64, device=policy.device)
    logits = policy(input_ids=ids, **call_options(policy)).logits[0]
    return logits if logits.dtype == torch.float64 else logits.float()
