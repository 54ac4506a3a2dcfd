"""Short runs of the embedded policy through the command line."""

import contextlib
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from dynamo_lightning.cli import main


@pytest.fixture(autouse=True)
def one_thread():
    """As fast for so small a policy, and steady on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def settings():
    """A healthy run of 12 small iterations, as a config's values."""
    source = {"path": "embedded:arithmetic/train.jsonl", "template": "{prompt}", "name": "arithmetic"}
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 12,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "dynamo_lightning.callbacks.Tripwires", "init_args": {}}],
        },
        "model": {
            "model_name": "embedded:arithmetic-qwen3",
            "sampling": {"max_response_length": 20},
            "reward": {"class_path": "dynamo_lightning.rewards.MathReward"},
            "scoring": {"num_workers": 1, "time_limit": 30.0},
            "updates": {"max_tokens_per_micro_batch": 1024},
        },
        "data": {"train": source, "max_prompt_length": 64, "prompts_per_batch": 8, "rollouts_per_prompt": 8},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
    }


@pytest.fixture
def fit(settings, tmp_path, monkeypatch):
    """Runs `fit` on the settings in an empty folder; gives the first row of each tripwire that went off."""

    def run(*arguments, name="run"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        Path("config.yaml").write_text(yaml.safe_dump(settings))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main(["fit", "--config", "config.yaml", *arguments])
        return rows(folder)

    return run


def rows(folder):
    """By name the first row of each tripwire that went off in the runs of a folder."""
    lines = [line for path in sorted(folder.rglob("tripwires.jsonl")) for line in path.read_text().splitlines()]
    found = {}
    for row in map(json.loads, lines):
        found.setdefault(row["tripwire"], row)
    return found


@pytest.fixture
def reward_function(settings, tmp_path, monkeypatch):
    """Makes the reward a function of the given body."""

    def make(body):
        (tmp_path / "tripped_reward.py").write_text(f"import time\n\ndef f(prompt, response, answer):\n    {body}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(tmp_path)
        settings["model"]["reward"] = {
            "class_path": "dynamo_lightning.rewards.FunctionReward",
            "init_args": {"function": "tripped_reward.f"},
        }

    yield make
    with contextlib.suppress(KeyError):
        del sys.modules["tripped_reward"]
