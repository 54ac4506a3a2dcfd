"""Rewards that hang are said at the first time-out, and end a run within a few time limits."""

import time

import pytest
import team_rewards as team
from text_engine import Characters, NoPolicy, TextEngine

from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.environments import SingleTurn
from dynamo_lightning.errors import RunError
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.rollout.collect import RolloutCollector


def collect(reward, make_rollout, batch, **config):
    with RewardScorer(reward, ScoringConfig(num_workers=2, time_limit=0.5, **config)) as scorer:
        engine = TextEngine(lambda request: request.prompt.answer, batch)
        collector = RolloutCollector(engine, SingleTurn(), scorer, SamplingConfig(), (4, 1))
        scorer.score([make_rollout(batch.prompts[0], 0, (1,), "warm")] if reward is not team.hang else [])
        rollouts, _ = collector.sample(NoPolicy(), Characters(), batch, "train", temperature=1.0)
        return collector.score(batch, rollouts)


@pytest.mark.parametrize(
    ("num_rollouts", "message"),
    [
        (32, r"rewards of 2 of the first 2 rollouts failed \(timeout: 2, crash: 0\), of a batch of 32: above"),
        (4096, r"reward 'hang' hangs: none of the first 6 responses .*model\.scoring\.time_limit=0\.5 seconds"),
    ],
)
def test_a_reward_that_always_hangs_ends_the_run_soon(make_prompt, make_batch, make_rollout, num_rollouts, message):
    batch = make_batch([make_prompt(0)], [num_rollouts])
    start = time.monotonic()
    with (
        pytest.warns(UserWarning, match=r"reward 'hang': .*model\.scoring\.time_limit=0\.5"),
        pytest.raises(RunError) as error,
    ):
        collect(team.hang, make_rollout, batch)
    assert time.monotonic() - start < 30.0, "most of it is the start of two workers"
    error.match(message)


def test_a_few_that_hang_do_not_end_the_run(make_prompt, make_batch, make_rollout):
    batch = make_batch([make_prompt(0, answer="hang"), make_prompt(1, answer="fine")], [2, 62])
    with pytest.warns(UserWarning, match="got no reward within"):
        outcomes = collect(team.hang_if_told, make_rollout, batch)
    assert [outcome.score.failure for outcome in outcomes] == ["timeout"] * 2 + [None] * 62
