"""The optimizer's state in the host's memory, while an engine on the same device needs the room."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class OptimizerOffload:
    """Takes optimizer state to the host, and back to where it was."""

    def __init__(self) -> None:
        self._away: list[tuple[dict[Any, Any], str, torch.device]] = []

    def take_away(self, optimizers: Iterable[Optimizer]) -> None:
        """Move the state that is not on the host there; shards of sharded parameters stay shards."""
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.device.type != "cpu":
                        self._away.append((state, name, value.device))
                        state[name] = value.to("cpu")

    def bring_back(self) -> None:
        """Move what was taken away back."""
        for state, name, device in self._away:
            state[name] = state[name].to(device)
        self._away.clear()
