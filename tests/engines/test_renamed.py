"""Names of version 0.1 still work, with one warning that gives the new name."""

import importlib
import subprocess
import sys
import warnings

import pytest
import yaml

from dynamo_lightning.cli import DynamoCLI, main
from dynamo_lightning.engines import renamed
from dynamo_lightning.engines.engine import Engine
from dynamo_lightning.engines.renamed import RENAMED

OLD_CLASSES = {
    "transformers.TransformersGenerator": {"batch_size": 7},
    "vllm_colocated.VLLMColocatedGenerator": {"memory_share": 0.2, "token_filter": {"top_k": 0}},
    "vllm_server.VLLMServerGenerator": {"urls": ["http://127.0.0.1:8000"], "requests_per_server": 3},
}


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(renamed, "_warned", set())


def test_every_old_name_is_the_new_class_and_warns_once():
    for old, new in RENAMED.items():
        with pytest.warns(FutureWarning) as caught:
            found = [load(old), load(old)]
        assert found == [load(new)] * 2
        assert [str(w.message) for w in caught] == [f"{old} is now {new}; the old name goes in version 0.3"]


def load(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_a_name_that_never_was_is_no_attribute():
    with pytest.raises(AttributeError, match=r"'dynamo_lightning\.rollout\.transformers' has no attribute 'Sampler'"):
        load("dynamo_lightning.rollout.transformers.Sampler")


def parse(monkeypatch, tmp_path, *args):
    """The generator in the configuration of a command line, and the warnings of renamed names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DynamoCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(DynamoCLI, "_run_subcommand", lambda self, subcommand: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generator = main(["fit", "--config=quickstart.yaml", *args]).config.fit.model.generator
    return generator, [str(w.message) for w in caught if w.category is FutureWarning and "is now" in str(w.message)]


@pytest.mark.parametrize("name", OLD_CLASSES)
def test_a_config_of_version_0_1_means_the_same_engine(monkeypatch, tmp_path, name):
    old = f"dynamo_lightning.rollout.{name}"
    config = {"model": {"generator": {"class_path": old, "init_args": OLD_CLASSES[name]}}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    generator, messages = parse(monkeypatch, tmp_path, "--config=old.yaml")
    assert generator.class_path == RENAMED[old]  # as the run's folder keeps it
    assert issubclass(load(generator.class_path), Engine)
    for option, value in OLD_CLASSES[name].items():
        found = generator.init_args[option]
        assert (found if not isinstance(value, dict) else {k: found[k] for k in value}) == value
    assert messages == [f"{old} is now {RENAMED[old]}; the old name goes in version 0.3"]


def test_a_short_name_of_version_0_1_is_found(monkeypatch, tmp_path):
    generator, messages = parse(monkeypatch, tmp_path, "--model.generator=VLLMColocatedGenerator")
    assert generator.class_path.endswith(".VLLMColocatedEngine")
    assert len(messages) == 1


def test_the_names_of_today_do_not_warn(monkeypatch, tmp_path):
    generator, messages = parse(monkeypatch, tmp_path, "--model.generator=VLLMColocatedEngine")
    assert generator.class_path.endswith(".VLLMColocatedEngine") and not messages


def test_an_engine_of_the_users_own_may_say_separate_engine():
    with pytest.warns(FutureWarning, match=r"OwnEngine\.separate_engine is now uses_external_engine"):

        class OwnEngine(Engine):
            separate_engine = True

    assert OwnEngine.uses_external_engine and not Engine.uses_external_engine


def test_the_old_command_for_wider_heads_says_the_new_one():
    command = [
        sys.executable,
        "-m",
        "dynamo_lightning.rollout.vllm_pad_heads",
        "--model_name=no_such",
        "--output_dir=x",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "is now dynamo_lightning.engines.vllm.pad_heads" in done.stderr
    assert done.returncode != 0 and "no_such" in done.stderr
