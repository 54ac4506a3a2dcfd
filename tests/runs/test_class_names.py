"""Class names as the documentation writes them, and what is suggested for misspelled ones."""

import subprocess
import sys

import pytest
import yaml

from dynamo_lightning.allocation import AllocationRule
from dynamo_lightning.cli import main
from dynamo_lightning.losses.advantages import Advantage
from dynamo_lightning.losses.modulation import Modulation
from dynamo_lightning.losses.surrogate import Surrogate
from dynamo_lightning.runs.class_names import class_choices, config_with_class_paths, with_class_paths


@pytest.fixture(scope="module")
def options():
    return {
        "model.loss.surrogate": class_choices(Surrogate),
        "model.loss.advantage": class_choices(Advantage),
        "model.loss.modulation": class_choices(Modulation | None),
        "data.rule": class_choices(AllocationRule),
    }


@pytest.mark.parametrize(
    ("option", "name", "path"),
    [
        ("model.loss.surrogate", "GSPO", "dynamo_lightning.losses.gspo.GSPO"),
        ("model.loss.surrogate", "gspo", "dynamo_lightning.losses.gspo.GSPO"),
        ("model.loss.advantage", "Dr. GRPO", "dynamo_lightning.losses.advantages.DrGRPO"),
        ("model.loss.advantage", "W-REINFORCE", "dynamo_lightning.losses.advantages.WReinforce"),
        ("model.loss.modulation", "Clip-Cov", "dynamo_lightning.losses.covariance.ClipCov"),
        ("model.loss.modulation", "STEER", "dynamo_lightning.losses.steer.Steer"),
        ("model.loss.modulation", "fork tokens", "dynamo_lightning.losses.fork_tokens.ForkTokens"),
        ("data.rule", "uniform_rule", "dynamo_lightning.allocation.rules.UniformRule"),
    ],
)
def test_a_class_is_found_by_the_name_that_the_documentation_gives_it(options, option, name, path):
    assert with_class_paths([f"--{option}={name}"], options) == [f"--{option}={path}"]
    assert with_class_paths([f"--{option}", name], options) == [f"--{option}", path]
    assert with_class_paths([f"--{option}.class_path={name}"], options) == [f"--{option}.class_path={path}"]
    *groups, key = option.split(".")
    for value in (name, {"class_path": name}):
        tree = {key: value}
        for group in reversed(groups):
            tree = {group: tree}
        resolved = yaml.safe_load(config_with_class_paths(yaml.safe_dump(tree), options))
        for part in option.split("."):
            resolved = resolved[part]
        assert resolved in (path, {"class_path": path})


def test_other_values_stay_as_they_are(options):
    arguments = ["--name", "gspo", "--model.loss.surrogate=my_module.gspo", "--model.loss.modulation=null", "gspo"]
    assert with_class_paths(arguments, options) == arguments
    text = "name: gspo\nmodel:\n  loss: {surrogate: mine.GSPO, modulation: null}\n  x: 'surrogate gspo'\n"
    assert config_with_class_paths(text, options) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.prompts_per_batc=1"], r"--data\.prompts_per_batc=1: did you mean --data\.prompts_per_batch\?"),
        (["--trainer.max_epoch", "3"], r"did you mean --trainer\.max_epochs\?"),
        (["--model.loss.surrogate=GPSO"], r"model\.loss\.surrogate=GPSO is no class .*: did you mean GSPO\?"),
        (["--data.rule=Nonsense"], r"data\.rule=Nonsense is no class .*choose one of .*RLOORule.*UniformRule"),
        (["--config=typo.yaml"], r"prompts_per_batc.*did you mean --data\.prompts_per_batch\?"),
        (["--trainer.logger=lightning.pytorch.loggers.WandbLogger"], r"trainer\.logger.*wandb"),
    ],
)
def test_a_misspelled_option_or_class_is_one_line_with_the_nearest_name(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text("data:\n  prompts_per_batc: 3\n")
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as exit_:
        main(["fit", "--config=quickstart.yaml", *arguments])
    assert "\n" not in str(exit_.value)


def test_the_overview_lists_every_command_quickly(capsys):
    for arguments, code in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == code
        text = capsys.readouterr().out
        for command in ("fit", "validate", "test", "predict", "export", "warm_start", "report", "--version"):
            assert command in text


def test_a_command_that_does_not_exist_is_one_line():
    with pytest.raises(SystemExit, match=r"^error: exprot is no command: did you mean export\?; --help lists them$"):
        main(["exprot"])


def test_version():
    code = (
        "import sys; sys.argv = ['dynamo_lightning', '--version']; from dynamo_lightning.cli import console; console()"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("dynamo_lightning 0.")
