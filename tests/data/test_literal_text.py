"""Text on the command line is what was typed, whatever YAML would make of it."""

import pytest
import yaml

from dynamo_lightning.cli import DynamoCLI, main
from dynamo_lightning.data.literal_text import LiteralText, literal_arguments

PATTERNS = ["#### (.+)", "Answer: (.+)", "[A-D](.+)", "%(.+)", "? (.+)", "!(.+)", "{(.+)}", "NULL (.+)"]


@pytest.fixture
def parse(monkeypatch):
    monkeypatch.setattr(DynamoCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(DynamoCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda *arguments: main(["fit", "--config", "quickstart.yaml", *arguments])


def test_text_options_are_literal_null_is_null_and_configs_are_written_plainly(parse):
    options = {
        "data.train.answer_pattern": "#### (.+)",
        "data.train.prompt_pattern": "Question: (.+)",
        "data.train.name": "# 1",
        "data.train.system_prompt": "[be] brief: yes",
        "data.template": "# {prompt}",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    cli = parse(*arguments, "--data.train.subset", "null", "--model.policy.revision=#5")
    config = cli.config["fit"]
    found = {name: config[name] for name in options}
    assert found == options and {type(value) for value in found.values()} == {str}
    assert config["data.train.subset"] is None
    assert config["model.policy.revision"] == "#5", "any option: a comment is not nothing"
    assert yaml.safe_load(cli.parser.dump(cli.config))["fit"]["data"]["train"]["answer_pattern"] == "#### (.+)"


@pytest.mark.parametrize("text", PATTERNS)
def test_values_are_marked_in_both_spellings_of_an_option(text):
    option = "--data.train.answer_pattern"
    for arguments in ([option, text], [f"{option}={text}"]):
        name, value = literal_arguments(arguments)
        assert (name, str(value), type(value)) == (option, text, LiteralText)


def test_other_arguments_are_left_alone():
    arguments = [
        "fit",
        "--data.train.max_prompts",
        "5",
        "--data.val=[{path: x}]",
        "--data.train.name",
        "null",
        "--x",
        "#",
    ]
    assert literal_arguments(arguments) == arguments
    assert not any(isinstance(argument, LiteralText) for argument in literal_arguments(arguments))
    assert literal_arguments({"a": 1}) == {"a": 1}
