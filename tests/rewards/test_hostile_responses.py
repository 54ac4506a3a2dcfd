"""A thousand hostile responses: each gets a score, within its limits, and honest responses among them get theirs."""

import resource
from collections import Counter

import pytest

from dynamo_lightning.rewards import FormatReward, MathReward, WeightedReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.types import Prompt, Rollout

TIME_LIMIT, MEMORY_LIMIT_GB = 1.0, 0.5


def make_rollout(response, answer):
    return Rollout(Prompt(0, "", "", (1,), answer), 0, (1,), (0.0,), response)


def score(rollouts):
    reward = WeightedReward([MathReward(), FormatReward()], [1.0, 0.1])
    config = ScoringConfig(num_workers=2, time_limit=TIME_LIMIT, memory_limit_gb=MEMORY_LIMIT_GB)
    with RewardScorer(reward, config) as scorer:
        return scorer.score(rollouts)


@pytest.mark.slow
def test_a_thousand_hostile_responses_are_scored_and_counted(tmp_path, monkeypatch):
    from hostile_responses import hostile_responses  # importable like the rewards that misbehave

    monkeypatch.chdir(tmp_path)
    hostile = list(hostile_responses(1000))
    rollouts = [make_rollout(response, answer) for _, response, answer in hostile]
    honest = [make_rollout(rf"So it is \boxed{{{number}}}.", str(number)) for number in range(100)]
    mixed = [
        rollout
        for ten, one in zip(zip(*[iter(rollouts)] * 10, strict=True), honest, strict=True)
        for rollout in (*ten, one)
    ]
    scores = score(mixed)
    assert len(scores) == 1100
    assert [s.failure for s in scores[10::11]] == [None] * 100
    assert [s.components["math"] for s in scores[10::11]] == [1.0] * 100
    of_hostile = [s for index, s in enumerate(scores) if index % 11 != 10]
    assert all(s.components["math"] == 0.0 for s in of_hostile if s.failure is None)
    failures = Counter(s.failure for s in of_hostile)
    assert sum(failures.values()) == 1000
    assert failures[None] > 900
    # Linux counts in KiB, over all processes that have ended: no worker was larger than its start and its limit.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < (MEMORY_LIMIT_GB + 1.0) * 2**20
    assert list(tmp_path.iterdir()) == [], "no code was run"
