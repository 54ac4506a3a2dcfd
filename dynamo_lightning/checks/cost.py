"""Time and memory of an RL iteration, scaled up from a measured small one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dynamo_lightning.checks.case import CheckCase
from dynamo_lightning.checks.result import CheckResult
from dynamo_lightning.types import IterationRecord

GIB = 2**30
INTERVAL = 0.02
"""Seconds between two looks at the memory of a process on a CPU."""


@dataclass
class PhaseMemory:
    """Largest memory of each phase of an iteration, bytes: of the GPU, or of the process."""

    device: torch.device
    peaks: dict[str, int] = field(default_factory=dict)
    """Largest use by phase."""

    def wrap(
        self, phase: Callable[[str], AbstractContextManager[None]]
    ) -> Callable[[str], AbstractContextManager[None]]:
        """A timer of phases that also measures memory."""

        @contextmanager
        def measured(name: str) -> Iterator[None]:
            with self.measure(name), phase(name):
                yield

        return measured

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Record the largest memory until the end of the block."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device))
            return
        done = threading.Event()
        found = [resident_bytes()]

        def watch() -> None:
            while not done.wait(INTERVAL):
                found.append(resident_bytes())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.peaks[name] = max(self.peaks.get(name, 0), *found, resident_bytes())


def resident_bytes() -> int:
    """Memory of this process, bytes; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.is_file() else 0


def check_time(case: CheckCase, record: IterationRecord, seconds: Mapping[str, float]) -> CheckResult:
    """Expected seconds of an RL iteration by phase: measured seconds times the number of rollouts.

    Engines and GPUs do more at once than a small batch asks of them, so this is an upper bound there.
    """
    rollouts = len(record.outcomes)
    wanted = case.datamodule.allocator.budget.of(case.datamodule.prompts_per_batch)
    factor = max(1.0, wanted / rollouts)
    phases = ("generate", "reward", "logprobs", "update")
    expected = {name: seconds.get(name, 0.0) * factor for name in phases}
    expected["sync"] = seconds.get("sync", 0.0)  # depends on the weights only
    total = sum(expected.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in expected.items())
    numbers = {
        "seconds": expected,
        "total": total,
        "measured_rollouts": rollouts,
        "batch_rollouts": wanted,
        "measured": dict(seconds),
    }
    return CheckResult(
        "time",
        "ok",
        f"at most about {total:.1f} s for an RL iteration of {wanted} rollouts ({parts}), from {rollouts} measured",
        numbers,
    )


def check_memory(case: CheckCase, record: IterationRecord, memory: PhaseMemory, before: int) -> CheckResult:
    """Expected memory by phase; what the update needs beyond the start grows with the tokens of a micro-batch."""
    limit = case.model.update_config.max_tokens_per_micro_batch
    used = min(limit, record.num_tokens)
    budget = case.datamodule.allocator.budget.of(case.datamodule.prompts_per_batch)
    per_batch = record.num_tokens * budget / max(1, len(record.outcomes))
    factor = max(1.0, min(limit, per_batch) / max(1, used))
    expected = {}
    for name, peak in memory.peaks.items():
        grows = name in ("logprobs", "update")
        expected[name] = before + (peak - before) * factor if grows else float(peak)
    place = "GPU memory" if memory.device.type == "cuda" else "memory of the process"
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in expected.items())
    numbers = {"bytes": expected, "measured_bytes": memory.peaks, "tokens": used, "factor": factor}
    message = f"{place} in GiB: {parts} (micro-batches of {used * factor:,.0f} tokens, measured with {used:,})"
    available = available_bytes(memory.device)
    if available and max(expected.values(), default=0) > available:
        return CheckResult(
            "memory",
            "warning",
            f"{message}, more than the {available / GIB:.1f} GiB there are: lower model.updates."
            "max_tokens_per_micro_batch",
            {**numbers, "available": available},
        )
    return CheckResult("memory", "ok", message, {**numbers, "available": available})


def available_bytes(device: torch.device) -> int:
    """Memory of the device, bytes; 0 if it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    meminfo = Path("/proc/meminfo")
    return int(meminfo.read_text().split()[1]) * 1024 if meminfo.is_file() else 0
