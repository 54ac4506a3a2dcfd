"""A checkpoint, written and read again."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from lightning import Trainer

from dynamo_lightning.checkpoints import read_weights
from dynamo_lightning.checks.result import CheckResult
from dynamo_lightning.module import PolicyModule


def check_checkpoint(trainer: Trainer, model: PolicyModule, folder: Path) -> CheckResult:
    """Write a checkpoint before the first optimizer step into a temporary folder, and compare what is read from it."""
    path = folder / "check.ckpt"
    start = time.perf_counter()
    trainer.save_checkpoint(path)
    written = time.perf_counter() - start
    start = time.perf_counter()
    weights = read_weights(str(path))
    read = time.perf_counter() - start
    own = model.state_dict()
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    numbers = {"bytes": size, "write_seconds": written, "read_seconds": read}
    differing = [name for name in own if name not in weights or not torch.equal(weights[name], own[name].cpu())]
    if differing or weights.keys() != own.keys():
        return CheckResult(
            "checkpoint",
            "error",
            f"{len(differing)} of {len(own)} weights are not read as they were written, the first is "
            f"{differing[0] if differing else 'one in excess'}: use another trainer.strategy",
            numbers,
        )
    return CheckResult(
        "checkpoint",
        "ok",
        f"{size / 2**20:,.1f} MiB written in {written:.1f} s and read in {read:.1f} s, all {len(own)} weights equal",
        numbers,
    )
