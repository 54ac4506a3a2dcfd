"""Files from elsewhere run no code: checkpoints are tensors and plain values, model folders stay data."""

import json
import os
import pickle
import shutil

import pytest
import torch

from dynamo_lightning.checkpoints import read_weights
from dynamo_lightning.cli import main
from dynamo_lightning.policy.loading import PolicyConfig, load_architecture, load_policy

FIT = ["fit", "--config", "quickstart.yaml", "--trainer.logger", "false"]


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that exists once the code has run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "code-has-run"


def test_the_fixture_runs_code_where_it_is_let(marker):
    pickle.loads(pickle.dumps(RunsCode(marker)))
    assert marker.exists()


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict", "export"])
def test_a_checkpoint_that_would_run_code_is_refused_in_one_line(subcommand, marker, tiny_policy):
    torch.save({"state_dict": {}, "callbacks": RunsCode(marker)}, "untrusted.ckpt")
    options = ["--output_dir", "exported"] if subcommand == "export" else []
    model = ["--model.model_name", tiny_policy, "--ckpt_path", "untrusted.ckpt"]
    with pytest.raises(SystemExit, match=r"^error: ckpt_path: untrusted.ckpt is refused: .* it holds posix\.system"):
        main([subcommand, "--config", "quickstart.yaml", *model, *options])
    assert not marker.exists()


def test_an_index_of_shards_that_would_run_code_is_refused_in_one_line(marker, tiny_policy):
    os.mkdir("shards")
    with open("shards/.metadata", "wb") as file:
        pickle.dump(RunsCode(marker), file)
    with pytest.raises(SystemExit, match=r"^error: ckpt_path: shards/.metadata is refused: .* it holds posix\.system"):
        main([*FIT, "--model.model_name", tiny_policy, "--ckpt_path", "shards"])
    with pytest.raises(ValueError, match=r"posix\.system"):
        read_weights("shards")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__"])
def test_builtins_are_no_records_of_an_index(name, marker):
    os.mkdir("shards")
    with open("shards/.metadata", "wb") as file:
        pickle.dump(__builtins__[name] if isinstance(__builtins__, dict) else getattr(__builtins__, name), file)
    with pytest.raises(ValueError, match=f"builtins.{name}"):
        read_weights("shards")


def test_half_a_checkpoint_is_one_line(marker, tiny_policy):
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, "whole.ckpt")
    with open("whole.ckpt", "rb") as whole, open("half.ckpt", "wb") as half:
        half.write(whole.read()[:2000])
    with pytest.raises(SystemExit, match=r"^error: ckpt_path: half.ckpt is not a whole checkpoint"):
        main([*FIT, "--model.model_name", tiny_policy, "--ckpt_path", "half.ckpt"])


@pytest.fixture
def model_with_code(tmp_path, tiny_policy, marker):
    """A folder whose model class is code in the folder."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "of_its_own"
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnModel"}
    config["auto_map"] = {auto: f"own_code.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'of_its_own'\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    return str(folder)


def test_a_model_with_code_of_its_own_is_refused_in_one_line(model_with_code, marker):
    with pytest.raises(SystemExit, match=r"^error: .*code of its own, .* model\.policy\.trust_remote_code=true"):
        main([*FIT, "--model.model_name", model_with_code])
    for load in (load_architecture, load_policy):
        with pytest.raises(ValueError, match="trust_remote_code=true"):
            load(model_with_code, PolicyConfig())
    assert not marker.exists()


def test_code_of_a_model_runs_where_it_is_allowed(model_with_code, marker, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    policy = load_policy(model_with_code, PolicyConfig(trust_remote_code=True))
    assert type(policy).__name__ == "OwnModel" and marker.exists()


def test_code_of_models_does_not_run_by_default():
    assert PolicyConfig().trust_remote_code is False
