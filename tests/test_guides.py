"""The guides docs/new_*.md: their YAML makes the class that they write, and their tables are complete."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from dynamo_lightning.cli import DynamoCLI, main

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    ("page", "module", "chosen"),
    [
        ("new_loss.md", "sapo", lambda cli: cli.model.loss.surrogate.negative_temperature == 1.05),
        ("new_estimator.md", "smoothed_rate", lambda cli: cli.datamodule.allocator.statistics.estimator.memory == 64),
        ("new_engine.md", "plain_engine", lambda cli: cli.model.collector.generator.max_length == 128),
    ],
)
def test_the_config_of_a_guide_makes_its_class(page, module, chosen, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (code, *_), (config,) = blocks(page, "python"), blocks(page, "yaml")
    (tmp_path / f"{module}.py").write_text(code)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(yaml.safe_load(config)))
    monkeypatch.setattr(DynamoCLI, "_run_subcommand", lambda self, subcommand: None)
    try:
        cli = main(["fit", "--config", "quickstart.yaml", "--config", "mine.yaml", "--trainer.logger", "false"])
        assert chosen(cli)
    finally:
        sys.modules.pop(module, None)


def test_the_page_on_estimators_has_all_of_the_library():
    import dynamo_lightning.allocation.estimators as estimators

    names = set(estimators.__all__) - {"VarianceEstimator"}
    words = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    text = (DOCS / "new_estimator.md").read_text()
    assert f"The {words[len(names)]} that come with the library" in text
    assert all(f"| `{name}`" in text for name in names)
