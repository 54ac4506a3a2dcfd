"""The page docs/new_environment.md does what it says: training with its environment."""

import csv
import re
import sys
from pathlib import Path

import pytest
import yaml

from dynamo_lightning.cli import main
from dynamo_lightning.environments import Response
from dynamo_lightning.types import Prompt

PAGE = Path(__file__).parents[2] / "docs" / "new_environment.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    text = PAGE.read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "try_again.py").write_text(code[0])
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(yaml.safe_load(block)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("try_again", None)


def test_the_environment_asks_again_and_halves_the_reward(folder):
    from try_again import TryAgain

    def said(text):
        return Response(text, list(map(ord, text)), True)

    environment = TryAgain(tries=3)
    environment.reset(Prompt(1, "1+1=", "1+1=", (1,), "2"))
    assert environment.step(said("2")).observation == " 1+1="
    assert environment.step(said(r"so \boxed{2}")).reward == 0.5
    environment = TryAgain(tries=1)
    environment.reset(Prompt(1, "1+1=", "1+1=", (1,), "2"))
    last = environment.step(said("3"))
    assert (last.observation, last.reward) == (None, 0.0)


def test_the_config_of_the_page_trains_on_conversations(folder):
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.num_sanity_val_steps=0"]
    options = ["--data.prompts_per_batch=8", "--model.sampling.max_response_length=60", "--trainer.limit_val_batches=1"]
    main(["fit", "--config=quickstart.yaml", "--config=mine.yaml", *short, *options])
    (log,) = folder.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(log.open()) if row["reward"]]
    assert len(rows) == 2
    for row in rows:
        assert row["rewards/environment/mean"] == row["reward"]
        assert float(row["completions/max_length"]) > 10, "more than one response"
        assert float(row["sampling/sampling_logp_difference/mean"]) < 1e-4, "trained on what was sampled, and only that"
        assert 0 < float(row["reward"]) < 1
    assert any(float(row["grad_norm"]) > 0 for row in rows if row["grad_norm"])
