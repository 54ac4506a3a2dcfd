"""From prompts to scored rollouts."""

import time

import pytest
from text_engine import Characters, NoPolicy, TextEngine

from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.environments import SingleTurn
from dynamo_lightning.rewards import FunctionReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.rollout.collect import RolloutCollector


class OneByOne(TextEngine):
    """Samples its requests one by one, last prompts first, each only when the one before it is scored."""

    def __init__(self, folder, batch):
        super().__init__(self.next_file, batch, one_by_one=True)
        self.folder, self.last = folder, None

    def next_file(self, request):
        deadline = time.monotonic() + 60.0
        while self.last is not None and not self.last.exists():
            assert time.monotonic() < deadline, "the reward waits for all responses"
            time.sleep(0.02)
        self.last = self.folder / f"{request.prompt.prompt_id}-{request.sample_index}"
        return str(self.last)


@pytest.fixture
def batch(make_prompt, make_batch):
    return make_batch([make_prompt(number) for number in range(2)], [2, 1])


@pytest.fixture
def collector(tmp_path, batch, monkeypatch):
    (tmp_path / "scored.py").write_text(
        "def f(prompt, response, answer):\n    return open(response, 'w').write('yes')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with RewardScorer(FunctionReward("scored.f"), ScoringConfig(num_workers=1)) as scorer:
        yield RolloutCollector(OneByOne(tmp_path, batch), SingleTurn(), scorer, SamplingConfig(), (4, 1))


def test_responses_are_scored_while_others_are_sampled(collector, batch):
    rollouts, filler = collector.sample(NoPolicy(), Characters(), batch, "train", temperature=1.0)
    assert [rollout.key for rollout in rollouts] == [(0, 0), (0, 1), (1, 0)]
    assert filler is rollouts[0]
    outcomes = collector.score(batch, rollouts)
    assert [(outcome.key, outcome.score.reward) for outcome in outcomes] == [((0, 0), 3), ((0, 1), 3), ((1, 0), 3)]
