"""Whole runs on whatever Lightning runs on: `make test-gpu` runs those on a GPU."""

from pathlib import Path

import pytest
from launcher import command_line, run
from logged import column

on_both = pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def fit(config, name, *more):
    """In a process of its own: a precision may set torch's default type."""
    run(command_line, (["fit", "--config", config, "--name", name, *more],), timeout=300)


@on_both
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)])
def test_fit(config, accelerator, precision):
    fit(config, "one", f"--trainer.accelerator={accelerator}", f"--trainer.precision={precision}")
    assert len(column("one", "reward")) == 6
    assert min(column("one", "grad_norm")) > 0 and min(column("one", "entropy")) > 0


@on_both
def test_fsdp2_in_a_single_process(config, accelerator):
    accelerated = f"--trainer.accelerator={accelerator}"
    fit(config, "whole", accelerated)
    checkpoint = "dynamo_lightning.callbacks.IterationCheckpoint"

    def options(folder):
        callbacks = f"--trainer.callbacks=[{{class_path: {checkpoint}, init_args: {{dirpath: {folder}}}}}]"
        return accelerated, "--trainer.strategy=fsdp2", callbacks

    fit(config, "shards", *options("shards"), "--trainer.max_epochs=1")
    assert Path("shards/last.ckpt").is_dir()
    fit(config, "resumed", *options("more_shards"), "--ckpt_path=shards/last.ckpt")
    entropies = column("shards", "entropy") + column("resumed", "entropy")
    assert entropies == pytest.approx(column("whole", "entropy"), abs=1e-2)
