"""Set-ups of a trained policy that answers sums, checked through the command line."""

import json

import pytest
import yaml

from dynamo_lightning.cli import main


@pytest.fixture
def settings():
    """A healthy set-up of the embedded policy, as a config's values."""
    source = {"path": "embedded:arithmetic/train.jsonl", "template": "{prompt}", "name": "arithmetic"}
    return {
        "trainer": {"accelerator": "cpu", "max_epochs": 5},
        "model": {
            "model_name": "embedded:arithmetic-qwen3",
            "sampling": {"max_response_length": 20},
            "reward": {"class_path": "dynamo_lightning.rewards.MathReward"},
            "scoring": {"num_workers": 1, "time_limit": 30.0},
            "updates": {"max_tokens_per_micro_batch": 1024},
        },
        "data": {"train": source, "max_prompt_length": 64, "prompts_per_batch": 8, "rollouts_per_prompt": 8},
    }


@pytest.fixture
def check(settings, tmp_path, monkeypatch, capsys):
    """Runs `check --json` on the settings in an empty folder; gives the results by name and the exit code."""

    def run(*arguments):
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
        code = 0
        capsys.readouterr()
        try:
            main(["check", "--config", str(config), "--json=true", *arguments])
        except SystemExit as end:
            code = end.code
        out = capsys.readouterr().out
        assert list(folder.iterdir()) == []
        report = json.loads(out[out.index("{") :])
        return {result["name"]: result for result in report["checks"]}, code

    return run


@pytest.fixture
def reward_function(settings, tmp_path, monkeypatch):
    """Makes the reward a function of the given body."""

    def make(body):
        (tmp_path / "check_reward.py").write_text(f"import time\n\ndef f(prompt, response, answer):\n    {body}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(tmp_path)
        settings["model"]["reward"] = {
            "class_path": "dynamo_lightning.rewards.FunctionReward",
            "init_args": {"function": "check_reward.f"},
        }

    yield make
    import sys

    sys.modules.pop("check_reward", None)


@pytest.fixture
def embedded_policy_that_ends_with(tmp_path):
    """Makes a copy of the embedded policy whose configured end-of-sequence token is another one."""

    def make(token):
        from transformers import AutoModelForCausalLM

        from dynamo_lightning.policy.loading import load_tokenizer, resolve_model_name

        name = resolve_model_name("embedded:arithmetic-qwen3")
        policy, tokenizer = AutoModelForCausalLM.from_pretrained(name), load_tokenizer("embedded:arithmetic-qwen3")
        old = tokenizer.eos_token
        tokenizer.eos_token = token
        tokenizer.add_special_tokens({"additional_special_tokens": [old]})
        policy.config.eos_token_id = policy.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(token)
        folder = tmp_path / "other-end"
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make
