"""Set-ups of a trained policy that answers sums, checked through the command line."""

import json

import pytest
import yaml
from short_runs import healthy_settings, reward_function  # noqa: F401  # a fixture

from dynamo_lightning.cli import main


@pytest.fixture
def settings():
    """A healthy set-up of the embedded policy, as a config's values."""
    settings = healthy_settings()
    settings["trainer"] = {"accelerator": "cpu", "max_epochs": 5}
    del settings["seed_everything"], settings["optimizer"]
    return settings


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
