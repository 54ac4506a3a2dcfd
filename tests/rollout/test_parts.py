"""A pilot with the commit's least rollouts requested at once: same rollouts and sizes, whatever is finished first."""

import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
from text_engine import Characters, NoPolicy

from dynamo_lightning.allocation import PaperBernoulli
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.distributed import run_seed
from dynamo_lightning.engines.engine import Completion, Engine, SamplingConfig
from dynamo_lightning.environments import SingleTurn
from dynamo_lightning.errors import RunError
from dynamo_lightning.rewards import FunctionReward
from dynamo_lightning.rewards.group import GroupFunctionReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.rollout.collect import RolloutCollector
from dynamo_lightning.rollout.requests import make_requests
from dynamo_lightning.types import PromptBatch

PILOT, LEAST = 3, 2
REWARDS = """
def f(prompt, response, answer):
    return float(response.endswith("yes"))

def of_group(prompt, responses, answer):
    return [len(responses) + float(r.endswith("yes")) for r in responses]
"""


def response(prompt_id, index, order):
    """Of the first prompts of the batch more pilot responses are right."""
    return f"{index}{'yes' if index % PILOT < order[prompt_id] % (PILOT + 1) else 'no'}"


class Recorder(Engine):
    """Samples by the sample index, all requests of a call at once, and keeps what each call asked for."""

    def __init__(self, batch):
        self.order = {prompt.prompt_id: number for number, prompt in enumerate(batch.prompts)}
        plans = [replace(plan, size=64, first_sample_index=0) for plan in batch.plans]
        requests = make_requests(PromptBatch(batch.iteration, plans), "train", run_seed())
        self.key_of = {request.seed: request.key for request in requests}
        self.calls = []
        self.lock = threading.Lock()

    def generate(self, policy, tokenizer, requests, *, temperature):
        keys = [self.key_of[request.seed] for request in requests]
        with self.lock:
            self.calls.append({index for _, index in keys})
        self.wait({index for _, index in keys})
        texts = [response(*key, self.order) for key in keys]
        return [Completion(list(map(ord, text)), [-1.0] * len(text), True, 0) for text in texts]

    def wait(self, indices):
        pass


class Concurrent(Recorder):
    """Takes requests as they come; the commit's least are finished last, or before the pilot."""

    works_ahead = True

    def __init__(self, batch, least_first):
        super().__init__(batch)
        self.least_first = least_first
        self.pilot_done, self.least_done, self.rest_asked = (threading.Event() for _ in range(3))

    def begin(self, policy, tokenizer, *, longest, temperature):
        return lambda requests: self.generate(policy, tokenizer, requests, temperature=temperature)

    def wait(self, indices):
        if indices == set(range(PILOT)):
            assert not self.least_first or self.least_done.wait(60.0)
        elif indices == set(range(PILOT, PILOT + LEAST)):
            assert self.least_first or self.rest_asked.wait(60.0), "the rest waits for the commit's least"
            self.least_done.set()
        else:
            self.rest_asked.set()


class Failing(Concurrent):
    """Cannot sample the commit's least."""

    def wait(self, indices):
        if PILOT in indices:
            raise RunError("the server is gone")


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    (tmp_path / "yes.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    with RewardScorer(FunctionReward("yes.f"), ScoringConfig(num_workers=1, time_limit=60.0)) as scorer:
        yield scorer


@pytest.fixture
def make_data(tiny_policy, prompt_file):
    def make(**options):
        source = PromptSource(prompt_file, template="{prompt}")
        options = {"prompts_per_batch": 6, "rollouts_per_prompt": 8, "pilot": PILOT, "min_rollouts": 2} | options
        # An estimator that believes the little it has seen, so that sizes differ.
        data = RolloutDataModule(source, tokenizer_name=tiny_policy, estimator=PaperBernoulli(), **options)
        data.setup("fit")
        return data, next(iter(data.train_dataloader()))

    return make


def collect(make_data, scorer, make_engine, **options):
    data, batch = make_data(**options)
    engine = make_engine(batch)
    collector = RolloutCollector(engine, SingleTurn(), scorer, SamplingConfig(max_response_length=8), (4, 1))
    return engine, collector.collect(NoPolicy(), Characters(), data, batch, lambda name: nullcontext())


def one_part_after_the_other(make_data, scorer, **options):
    """Plans, rollouts and outcomes with the pilot sampled and scored before anything of the commit is requested."""
    data, batch = make_data(**options)
    collector = RolloutCollector(Recorder(batch), SingleTurn(), scorer, SamplingConfig(max_response_length=8), (4, 1))
    plans, rollouts, outcomes = [], [], []
    for part in data.parts(batch):
        own, _ = collector.sample(NoPolicy(), Characters(), part, "train", 1.0)
        scored = collector.score(part, own)
        data.observe(part, scored)
        plans, rollouts, outcomes = plans + list(part.plans), rollouts + own, outcomes + list(scored)
    return plans, rollouts, outcomes


ENGINES = {
    "in_one_go": Recorder,
    "least_last": lambda batch: Concurrent(batch, least_first=False),
    "least_first": lambda batch: Concurrent(batch, least_first=True),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("baseline", ["separate", "cross", "pooled"])
def test_plans_rollouts_and_outcomes_are_those_of_one_part_after_the_other(make_data, scorer, name, baseline):
    options = {"pilot_baseline": baseline}
    plans, rollouts, outcomes = one_part_after_the_other(make_data, scorer, **options)
    _, collected = collect(make_data, scorer, ENGINES[name], **options)
    assert [group.plan for group in collected.groups] == plans
    assert len({plan.size for plan in plans}) > 2, "the pilot's outcomes must matter"
    found = [rollout for group in collected.groups for rollout in group.rollouts]
    assert found == sorted(rollouts, key=lambda rollout: rollout.sample_index >= PILOT)
    assert sorted(collected.outcomes, key=str) == sorted(outcomes, key=str)


def test_the_least_commit_is_requested_with_the_pilot_and_the_rest_when_all_pilots_are_scored(make_data, scorer):
    engine, collected = collect(make_data, scorer, Recorder)
    largest = max(group.plan.size for group in collected.groups)
    assert engine.calls == [set(range(PILOT + LEAST)), set(range(PILOT + LEAST, PILOT + largest))]


def test_an_engine_that_takes_requests_as_they_come_has_the_least_commit_while_the_rest_is_placed(make_data, scorer):
    engine, _ = collect(make_data, scorer, ENGINES["least_last"])
    assert sorted(map(min, engine.calls)) == [0, PILOT, PILOT + LEAST]
    assert min(engine.calls[-1]) == PILOT + LEAST, "the rest is asked for last, and before the least are there"


@pytest.mark.parametrize("name", ["in_one_go", "least_first"])
def test_a_commit_that_is_at_its_least_everywhere_asks_for_nothing_more(make_data, scorer, name):
    engine, collected = collect(make_data, scorer, ENGINES[name], rollouts_per_prompt=PILOT + LEAST)
    assert set().union(*engine.calls) == set(range(PILOT + LEAST))
    assert [len(group.rollouts) for group in collected.groups] == [PILOT] * 6 + [LEAST] * 6
    assert len(collected.outcomes) == 6 * (PILOT + LEAST)


def test_a_reward_of_groups_gets_the_whole_commit_group_at_once(make_data, tmp_path, scorer):
    with RewardScorer(GroupFunctionReward("yes.of_group"), ScoringConfig(num_workers=1, time_limit=60.0)) as of_groups:
        _, collected = collect(make_data, of_groups, Recorder)
    for group in collected.groups:
        assert {int(outcome.score.reward) for outcome in group.outcomes} <= {group.plan.size, group.plan.size + 1}


def test_what_fails_in_the_background_stops_the_run(make_data, scorer):
    with pytest.raises(RunError, match="the server is gone"):
        collect(make_data, scorer, lambda batch: Failing(batch, least_first=False))


def test_without_a_pilot_there_is_one_request_of_everything(make_data, scorer):
    engine, collected = collect(make_data, scorer, Recorder, pilot=0)
    assert engine.calls == [set(range(8))]
    assert {group.plan.commit_least for group in collected.groups} == {0}
