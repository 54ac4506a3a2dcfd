"""Conversations: what the policy sampled, what it was told, and what is trained on."""

import numpy as np
import pytest
import torch
from conversations import Countdown, Speaker
from text_engine import Characters

from dynamo_lightning.engines.engine import Completion
from dynamo_lightning.environments import Environment, SingleTurn, Step
from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.policy.packing import make_micro_batch
from dynamo_lightning.rollout.runner import sample_rollouts
from dynamo_lightning.types import RolloutRequest, Turn


@pytest.fixture
def requests(make_prompt):
    return [RolloutRequest(make_prompt(1), 0, 11), RolloutRequest(make_prompt(2, (8, 9)), 1, 22)]


def play(environment, requests, engine=None, limit=40):
    options = {"max_response_length": limit, "temperature": 1.0, "environment": environment}
    return sample_rollouts(engine or Speaker(), None, Characters(), requests, **options)


def test_a_conversation_keeps_every_token_once_and_masks_what_it_was_told(requests):
    first, second = play(Countdown(tries=3, observation="?!"), requests)
    assert [rollout.key for rollout in (first, second)] == [(1, 0), (2, 1)]
    for rollout in (first, second):
        assert "".join(map(chr, rollout.token_ids)) == "a?!bb?!ccc"
        assert rollout.loss_mask.tolist() == [True, False, False, True, True, False, False, True, True, True]
        assert "".join(map(chr, rollout.response_ids)) == "abbccc"
        assert rollout.logprobs.tolist() == [-1, -2, -2, -3, -3, -3]
        assert rollout.turns == (Turn(0, 1, 1), Turn(3, 5, 2), Turn(7, 10, 3))
        assert (rollout.text, rollout.status, rollout.environment_reward) == ("a\nbb\nccc", "finished", 23.0)
        assert rollout.response_length == 6


def test_later_turns_read_exactly_the_tokens_before_and_have_seeds_of_their_own(requests):
    engine = Speaker()
    play(Countdown(tries=2), requests, engine)
    (first, second) = engine.asked
    assert [request.token_ids for request in first] == [(5, 6, 7), (8, 9)]
    assert [request.token_ids for request in second] == [(5, 6, 7, ord("a"), ord("?")), (8, 9, ord("a"), ord("?"))]
    assert [request.max_tokens for request in second] == [38, 38]
    assert len({request.seed for request in (*first, *second)}) == 4


def test_a_single_turn_asks_once_and_leaves_the_reward_to_the_function(requests):
    engine = Speaker()
    rollouts = play(SingleTurn(), requests, engine)
    assert len(engine.asked) == 1
    assert all(rollout.environment_reward is None and rollout.loss_mask.all() for rollout in rollouts)
    assert all(rollout.turns == (Turn(0, 1, 1),) for rollout in rollouts)


@pytest.mark.parametrize(
    ("limit", "tokens", "status"), [(1, "a", "finished"), (3, "a", "truncated"), (4, "a??c", "truncated")]
)
def test_an_observation_without_room_for_a_response_ends_the_rollout(requests, limit, tokens, status):
    tries = 1 if status == "finished" else 3
    rollout = play(Countdown(tries, observation="??"), requests, limit=limit)[0]
    assert ("".join(map(chr, rollout.token_ids)), rollout.status) == (tokens, status)


def test_every_rollout_has_an_environment_of_its_own_which_is_closed(requests):
    Countdown.closed = []
    configured = Countdown(tries=2)
    play(configured, requests)
    assert configured.tries == 2 and not hasattr(configured, "prompt_id")
    assert sorted(Countdown.closed) == [1, 2]


class Breaking(Environment):
    def __init__(self, where):
        self.where = where

    def reset(self, prompt):
        if self.where == "reset" and prompt.prompt_id == 1:
            raise OSError("no sandbox")
        self.breaks = prompt.prompt_id == 1

    def step(self, response):
        if self.where == "step" and self.breaks:
            raise ZeroDivisionError("a tool")
        return Step()


@pytest.mark.parametrize(("where", "words"), [("reset", "OSError: no sandbox"), ("step", "ZeroDivisionError: a tool")])
def test_an_exception_of_an_environment_fails_its_rollout_alone(requests, where, words):
    failed, fine = play(Breaking(where), requests)
    assert (failed.status, failed.failure) == ("failed", f"the environment Breaking raised {words}")
    assert len(failed.token_ids) == 1
    assert (fine.status, fine.failure) == ("finished", "")


class Returning(Environment):
    def __init__(self, value):
        self.value = value

    def step(self, response):
        return self.value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, r"Returning \(model\.environment\) returned None from step\(\): return a Step"),
        ("text", r"returned 'text' from step\(\)"),
        (Step(reward=float("nan")), "returned the reward nan: it must be finite"),
        (Step([{"role": "user", "content": "again"}]), "the tokenizer has no chat template: return the text"),
    ],
)
def test_what_is_no_step_is_one_line_that_names_the_environment(requests, value, words):
    with pytest.raises(UserError, match=words):
        play(Returning(value), requests)


class Wrong(Speaker):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def generate(self, policy, tokenizer, requests, *, temperature):
        one = {
            "count": None,
            "echo": Completion([*requests[0].token_ids, *range(40)], [-1.0] * 43, True, 0),
            "nothing": Completion([], [], True, 0),
            "lengths": Completion([1, 2], [-1.0], True, 0),
            "nan": Completion([1], [float("nan")], True, 0),
            "negative": Completion([-1], [-1.0], True, 0),
        }[self.kind]
        return [one] * len(requests) if one else []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("count", "0 responses to 2 requests"),
        ("echo", "a response of 43 tokens where 1 to 40 were asked for"),
        ("nothing", "a response of 0 tokens"),
        ("lengths", "2 tokens with 1 log-probabilities"),
        ("nan", "log-probabilities, which must be as many, and finite"),
        ("negative", "negative token id, -1"),
    ],
)
def test_an_engine_that_answers_something_else_is_named(requests, kind, words):
    with pytest.raises(RunError, match=rf"the engine Wrong \(model\.generator\) returned.*{words}"):
        play(SingleTurn(), requests, Wrong(kind))


def test_micro_batches_have_predictions_of_sampled_tokens_only(requests):
    rollouts = play(Countdown(tries=2, observation="?!"), requests)
    micro_batch = make_micro_batch(rollouts, [1, 0], torch.device("cpu"))
    assert "".join(map(chr, micro_batch.targets.tolist())) == "abbabb"
    row = micro_batch.input_ids[0]
    assert torch.equal(row[micro_batch.predictor_positions + 1], micro_batch.targets)
    assert micro_batch.token_indices.tolist() == [3, 4, 5, 0, 1, 2]
    whole = [np.array([*r.prompt.token_ids, *r.token_ids]) for r in (rollouts[1], rollouts[0])]
    assert row.tolist() == np.concatenate(whole).tolist()
