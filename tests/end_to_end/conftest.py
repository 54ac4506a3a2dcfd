"""Small runs through the command line and the library."""

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parent))  # the launcher's processes import what they run


@pytest.fixture
def config(tiny_policy, prompt_file, tmp_path, monkeypatch):
    """Writes a config of a few seconds, in a fresh working folder, and gives its path."""
    monkeypatch.chdir(tmp_path)
    source = {"path": prompt_file, "template": "{prompt}"}
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "dynamo_lightning.callbacks.IterationCheckpoint",
                    "init_args": {"every_n_iterations": 1, "dirpath": "checkpoints"},
                },
                {"class_path": "dynamo_lightning.callbacks.RunReport"},
            ],
        },
        "model": {
            "model_name": tiny_policy,
            "sampling": {"max_response_length": 6},
            "scoring": {"num_workers": 1, "time_limit": 60.0},
            "reward": {"class_path": "dynamo_lightning.rewards.FunctionReward", "init_args": {"function": "reward.f"}},
        },
        "data": {
            "train": source,
            "val": [source],
            "test": [source],
            "predict": [source],
            "prompts_per_batch": 4,
            "rollouts_per_prompt": 4,
            "eval_rollouts_per_prompt": 2,
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    }
    # An untrained policy never answers a sum: reward what it does now and then, so that there is something to learn.
    (tmp_path / "reward.py").write_text("def f(prompt, response, answer):\n    return float(response[:1].isdigit())\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture
def summary():
    """Reads a run's summary."""

    def read(version: int = 0) -> dict:
        with open(f"runs/dynamo/version_{version}/summary.json") as file:
            return json.load(file)

    return read
