"""The number of processes changes the speed, not the result."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def train(config, folder, *more):
    """Run `fit` in a process of its own and give its last checkpoint."""
    checkpoint = "dynamo_lightning.callbacks.IterationCheckpoint"
    subprocess.run(
        [
            sys.executable, "-m", "dynamo_lightning", "fit", "--config", config, "--name", folder,
            f"--trainer.callbacks=[{{class_path: {checkpoint}, init_args: {{dirpath: {folder}}}}}]",
            "--data.prompts_per_batch=5", *more,
        ],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return torch.load(Path(folder, "last.ckpt"), weights_only=True)


def column(run, metric):
    """The logged values of a metric."""
    with open(f"runs/{run}/version_0/metrics.csv") as file:
        return [float(row[metric]) for row in csv.DictReader(file) if row[metric]]


def test_two_processes_learn_what_one_learns(config):
    one = train(config, "one")
    two = train(config, "two", "--trainer.strategy=ddp", "--trainer.devices=2")
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, atol=1e-5, rtol=0)
    statistics = [checkpoint["RolloutDataModule"]["statistics"] for checkpoint in (one, two)]
    for name, value in statistics[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, statistics[1][name]), name
    assert one["global_step"] == two["global_step"]
    for metric in ("reward", "entropy", "alloc/budget", "policy_loss", "completions/mean_length", "val/sums/pass@1"):
        assert column("two", metric) == pytest.approx(column("one", metric), abs=1e-5), metric
