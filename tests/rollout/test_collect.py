"""From prompts to scored rollouts."""

import time

import pytest

from dynamo_lightning.engines.engine import Engine, SamplingConfig
from dynamo_lightning.rewards import FunctionReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.rollout.collect import RolloutCollector


class OneByOne(Engine):
    """Samples its requests one by one, last prompts first, each only when the one before it is scored."""

    def __init__(self, folder, make_rollout):
        self.folder, self.make_rollout, self.last = folder, make_rollout, None

    def batches(self, requests):
        return [[position] for position in reversed(range(len(requests)))]

    def generate(self, policy, tokenizer, requests, *, max_response_length, temperature):
        deadline = time.monotonic() + 60.0
        while self.last is not None and not self.last.exists():
            assert time.monotonic() < deadline, "the reward waits for all responses"
            time.sleep(0.02)
        (request,) = requests
        self.last = self.folder / f"{request.prompt.prompt_id}-{request.sample_index}"
        return [self.make_rollout(request.prompt, request.sample_index, (1,), str(self.last))]


class NoPolicy:
    def eval(self):
        pass


@pytest.fixture
def collector(tmp_path, make_rollout, monkeypatch):
    (tmp_path / "scored.py").write_text(
        "def f(prompt, response, answer):\n    return open(response, 'w').write('yes')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with RewardScorer(FunctionReward("scored.f"), ScoringConfig(num_workers=1)) as scorer:
        yield RolloutCollector(OneByOne(tmp_path, make_rollout), scorer, SamplingConfig(), (4, 1))


def test_responses_are_scored_while_others_are_sampled(collector, make_prompt, make_batch):
    batch = make_batch([make_prompt(number) for number in range(2)], [2, 1])
    rollouts, spare = collector.sample(NoPolicy(), None, batch, "train", temperature=1.0)
    assert [rollout.key for rollout in rollouts] == [(0, 0), (0, 1), (1, 0)]
    assert spare is rollouts[0]
    outcomes = collector.score(batch, rollouts)
    assert [(outcome.key, outcome.score.reward) for outcome in outcomes] == [((0, 0), 3), ((0, 1), 3), ((1, 0), 3)]
