"""Signals that wait for the end of the running RL iteration, when all processes can act on them together.

Lightning's handlers act where the signal finds them: they save in the middle of an iteration, whose rollouts are
counted in the statistics but not yet trained on, and they communicate while other processes do something else.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer import Trainer

from dynamo_lightning.distributed import max_over_ranks


class DeferredSignals:
    """Notes SIGTERM, Ctrl-C and, under SLURM, the signal before a time limit; a second Ctrl-C acts at once."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._received: set[int] = set()
        self._requeue_signal: int | None = None

    def install(self, trainer: Trainer) -> None:
        """Take the place of Lightning's handlers, which it has just installed; only the main thread may."""
        self._received.clear()
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
        for number in (signal.SIGTERM, signal.SIGINT, self._requeue_signal):
            if number is not None:
                self._handlers[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give Lightning's handlers their place back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def must_stop(self, device: torch.device) -> int:
        """The signal that told any process to end, or 0; called by all of them, at the same point."""
        ours = self._received & {signal.SIGTERM, signal.SIGINT}
        return max_over_ranks(max(map(int, ours), default=0), device)

    def requeue_if_asked(self, device: torch.device) -> None:
        """Have Lightning save for SLURM and ask it to queue the job again, if any process was told to."""
        if self._requeue_signal is None or not max_over_ranks(int(self._requeue_signal in self._received), device):
            return
        self._received.discard(self._requeue_signal)
        self._handlers[self._requeue_signal](self._requeue_signal, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if number in self._received:
                raise KeyboardInterrupt
            print(
                "\nCtrl-C: the running iteration is finished and saved; a second Ctrl-C ends at once", file=sys.stderr
            )
        self._received.add(number)
