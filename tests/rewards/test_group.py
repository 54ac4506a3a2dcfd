"""Rewards of a whole group: complete, on every rank, whichever batches its responses were sampled in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import team_rewards as team
from text_engine import Characters, NoPolicy, TextEngine

from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.environments import SingleTurn
from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards import GroupFunctionReward, MathReward, OverlongShaping, WeightedReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.rollout.collect import RolloutCollector

TEXTS = {(0, 0): "a", (0, 1): "bbb", (0, 2): "cc", (1, 0): "d"}


def collect(reward, make_prompt, make_batch, make_rollout, **config):
    batch = make_batch([make_prompt(0), make_prompt(1)], [3, 1])
    with RewardScorer(reward, ScoringConfig(num_workers=1, **config), max_response_length=10) as scorer:
        engine = TextEngine(lambda request: TEXTS[request.key], batch, one_by_one=True)
        collector = RolloutCollector(engine, SingleTurn(), scorer, SamplingConfig(), (4, 1))
        rollouts, _ = collector.sample(NoPolicy(), Characters(), batch, "train", temperature=1.0)
        return [outcome.score for outcome in collector.score(batch, rollouts)]


def test_a_group_is_seen_whole(make_prompt, make_batch, make_rollout):
    reward = WeightedReward(
        [
            GroupFunctionReward("team_rewards.rank_by_length"),
            GroupFunctionReward("team_rewards.group_size"),
            MathReward(),
        ],
        [1.0, 10.0, 100.0],
    )
    scores = collect(OverlongShaping(reward), make_prompt, make_batch, make_rollout)
    assert [score.reward for score in scores] == [30.0, 31.0, 30.0, 11.0]
    assert dict(scores[1].components) == {"rank_by_length": 1.0, "group_size": 3.0, "math": 0.0, "overlong": 0.0}


def test_a_list_of_another_length_is_refused(make_prompt, make_batch, make_rollout):
    reward = GroupFunctionReward("team_rewards.too_few")
    scores = collect(reward, make_prompt, make_batch, make_rollout, max_failure_share=1.0)
    assert [score.failure for score in scores] == ["crash"] * 3 + [None]
    assert "must return 3 numbers, one for each response, got 1" in scores[0].message


def test_a_function_of_one_response_is_no_group_function():
    def wrong(prompt, answer, responses):
        return []

    with pytest.raises(UserError, match=r"must take \(prompt, responses, answer\) in this order"):
        GroupFunctionReward(wrong)
    assert GroupFunctionReward(team.group_size)("q", ["a", "b"], "5").tolist() == [2, 2]


def test_two_processes_see_whole_groups_and_end_together_when_a_reward_hangs_on_one(tmp_path):
    script = Path(__file__).parent / "two_processes.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=240)[0].splitlines() for process in processes]
    expected = [((0, 0), 0.0), ((0, 1), 0.0), ((0, 2), 1.0), ((1, 0), 1.0), ((2, 0), 0.0), ((2, 1), 1.0)]
    assert [lines[0] for lines in printed] == [repr(expected)] * 2
    assert printed[0][1] == printed[1][1]
    assert "the rewards of 1 of the first 1 rollouts failed" in printed[0][1]
