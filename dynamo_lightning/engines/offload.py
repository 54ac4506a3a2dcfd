"""The optimizer's state in host memory, while an engine on the same device needs the memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class OptimizerOffload:
    """Moves optimizer state to the host, and back to its device."""

    def __init__(self) -> None:
        self._away: list[tuple[dict[Any, Any], str, torch.device]] = []

    def offload(self, optimizers: Iterable[Optimizer]) -> None:
        """Move the state to the host; shards of sharded parameters stay shards."""
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.device.type != "cpu":
                        self._away.append((state, name, value.device))
                        state[name] = value.to("cpu")

    def restore(self) -> None:
        """Move the offloaded state back to its device."""
        for state, name, device in self._away:
            state[name] = state[name].to(device)
        self._away.clear()
