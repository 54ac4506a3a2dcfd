"""The page docs/new_reward.md does what it says: its module, its Python and its config."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dynamo_lightning.cli import DynamoCLI, main
from dynamo_lightning.rewards import MathReward, WeightedReward, as_reward
from dynamo_lightning.rewards.calling import ADDED_COLUMNS, COLUMNS_ON_REQUEST
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.types import Prompt, Rollout

PAGE = Path(__file__).parents[2] / "docs" / "new_reward.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("guide")
    module, usage = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (path / "my_rewards.py").write_text(module)
    (path / "usage.py").write_text(usage)
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (path / "mine.yaml").write_text(yaml.safe_dump(yaml.safe_load(block)))
    return path


@pytest.fixture
def importable(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)


def test_the_functions_of_the_page_are_scored_as_it_says(importable):
    import my_rewards

    rewards = [my_rewards.exact, my_rewards.patient, my_rewards.remote, my_rewards.Shortest()]
    hard = Prompt(0, "q", "q", (1,), "5", "trivia", {"level": 3})
    easy = Prompt(1, "q", "q", (1,), "5", "maths", {"level": 1})

    def rollout(prompt, index, text):
        return Rollout(prompt, index, (1,) * len(text), (0.0,) * len(text), text)

    groups = [[rollout(hard, 0, "5"), rollout(hard, 1, "5" * 500)], [rollout(easy, 0, "5")]]
    with RewardScorer(as_reward(rewards), ScoringConfig(num_workers=1)) as scorer:
        components = [[dict(score.components) for score in scores] for scores in scorer.score_groups(groups)]
    assert components == [
        [
            {"exact": 1.0, "patient": 0.001, "remote": 1.0, "shortest": 1.0},
            {"exact": 0.0, "patient": 0.5, "remote": 1.0, "shortest": 0.0},
        ],
        [{"exact": 1.0, "remote": 0.0, "shortest": 1.0}],
    ]


def test_the_python_of_the_page_runs(folder):
    subprocess.run([sys.executable, "usage.py"], cwd=folder, check=True)


def test_the_config_of_the_page_chooses_them_in_a_run(importable, monkeypatch):
    monkeypatch.setattr(DynamoCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = main(["fit", "--config", "quickstart.yaml", "--config", "mine.yaml", "--trainer.logger", "false"])
    reward = cli.model.reward
    assert isinstance(reward, WeightedReward) and reward.needs_group
    assert [part.name for part in reward.parts] == ["dataset", "patient", "shortest"]
    assert isinstance(reward.parts[0].of_dataset("gsm8k"), MathReward)
    assert reward.parts[0].of_dataset("other").name == "exact"


def test_the_page_names_every_column_that_a_reward_can_ask_for():
    assert all(f"`{name}`" in PAGE.read_text() for name in (*ADDED_COLUMNS, *COLUMNS_ON_REQUEST))
