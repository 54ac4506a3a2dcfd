"""Whole responses, one a line of `responses.jsonl`, that a second reading of the reward came up with."""

import json
from pathlib import Path

import pytest

from dynamo_lightning.rewards import MathReward

RESPONSES = [json.loads(line) for line in Path(__file__).with_name("responses.jsonl").read_text("utf-8").splitlines()]
THINKING = "<think>Is it \\boxed{42}? Yes, the answer is 42.</think>"


@pytest.mark.parametrize("answer_kind", ["number", "expression"])
def test_right_responses_are_paid_whatever_kind_of_answer_is_wanted(answer_kind):
    reward = MathReward(answer_kind=answer_kind, unparsable="text")
    right = [case for case in RESPONSES if case["paid"]]
    assert len(right) > 100
    assert [case for case in right if not reward("", case["response"], case["gold"])] == []


def test_wrong_responses_are_not_paid_where_a_number_is_wanted():
    reward = MathReward(answer_kind="number", unparsable="text")
    wrong = [case for case in RESPONSES if not case["paid"]]
    assert len(wrong) > 150
    assert [case for case in wrong if reward("", case["response"], case["gold"])] == []


@pytest.mark.parametrize(
    ("response", "by_tags", "required", "ignored"),
    [
        (f"{THINKING} It is 41.", 0, 0, 1),
        (f"{THINKING} It is 42.", 1, 1, 1),
        (f"{THINKING}", 0, 0, 1),
        ("so it is 41 or</think> \\boxed{42}", 1, 1, 1),
        ("<think>the answer is \\boxed{42}", 0, 0, 1),
        ("\\boxed{42}", 1, 0, 1),
        ("[THINK]no[/THINK]\\boxed{42}", 1, 1, 1),
        ("<think>a</think>\\boxed{41}<think>\\boxed{42}</think>", 0, 0, 0),
    ],
)
def test_what_follows_the_reasoning_is_graded(response, by_tags, required, ignored):
    verdicts = [MathReward(thinking=thinking)("", response, "42") for thinking in (None, True, False)]
    assert verdicts == [by_tags, required, ignored]


def test_a_prompt_that_opens_the_reasoning_wants_it_closed():
    assert MathReward()("6 times 7?<think>\n", "\\boxed{42}", "42") == 0.0
    assert MathReward()("6 times 7?<think>\n", "</think>\\boxed{42}", "42") == 1.0
    assert MathReward()("6 times 7?<think></think>\n", "\\boxed{42}", "42") == 1.0


def test_options_are_checked():
    with pytest.raises(ValueError, match="answer_kind must be number or expression, got 'decimal'"):
        MathReward(answer_kind="decimal")
    with pytest.raises(ValueError, match="unparsable must be refuse or text, got 'skip'"):
        MathReward(unparsable="skip")
