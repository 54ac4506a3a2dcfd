"""A run that is killed and resumed ends like one that never was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


def load(path):
    return torch.load(path, weights_only=True, map_location="cpu")


def flat(value, name=""):
    """Leaves of nested dictionaries and lists by path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for index, item in enumerate(value) for k, v in flat(item, f"{name}/{index}").items()}
    return {name: value}


def assert_identical(first, second):
    first, second = flat(first), flat(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, f"{name}: {value} and {second[name]}"


def command(config, folder, *more):
    callback = "dynamo_lightning.callbacks.IterationCheckpoint"
    return [
        sys.executable, "-m", "dynamo_lightning", "fit", "--config", config,
        f"--trainer.callbacks=[{{class_path: {callback}, init_args: {{every_n_iterations: 1, dirpath: {folder}}}}}]",
        "--trainer.max_epochs=4", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("after_checkpoint", ["iteration=000002.ckpt", "iteration=000007.ckpt"])
def test_killed_and_resumed_run_is_bit_identical(config, after_checkpoint):
    whole = Path("whole", "last.ckpt")
    if not whole.exists():
        subprocess.run(command(config, "whole"), check=True, capture_output=True)
    process = subprocess.Popen(command(config, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not Path("killed", after_checkpoint).exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command(config, "killed", "--ckpt_path=killed/last.ckpt"), check=True, capture_output=True)
    expected, resumed = load(whole), load("killed/last.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "RolloutDataModule"):
        assert_identical(expected[part], resumed[part])
    assert expected["global_step"] == resumed["global_step"]
    assert expected["RolloutDataModule"]["stream"]["iteration"] == 12
