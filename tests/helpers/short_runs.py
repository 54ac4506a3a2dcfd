"""Short runs of the embedded policy through the command line, and what their tripwires said."""

import json
import sys

import pytest


def healthy_settings():
    """Values of a config of 12 small iterations in which nothing is wrong."""
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


def tripwire_rows(folder):
    """Rows of every `tripwires.jsonl` below a folder."""
    lines = [line for path in sorted(folder.rglob("tripwires.jsonl")) for line in path.read_text().splitlines()]
    return list(map(json.loads, lines))


def first_rows(folder):
    """By name the first row of each tripwire that went off."""
    found = {}
    for row in tripwire_rows(folder):
        found.setdefault(row["tripwire"], row)
    return found


@pytest.fixture
def reward_function(settings, tmp_path, monkeypatch):
    """Makes the reward of the settings a function of the given body."""

    def make(body):
        (tmp_path / "own_reward.py").write_text(f"import time\n\n\ndef f(prompt, response, answer):\n    {body}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(tmp_path)
        settings["model"]["reward"] = {
            "class_path": "dynamo_lightning.rewards.FunctionReward",
            "init_args": {"function": "own_reward.f"},
        }

    yield make
    sys.modules.pop("own_reward", None)
