"""Rewards as users write them: functions, async, what does not apply, other libraries' numbers, data sets, answers."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import team_rewards as team

from dynamo_lightning.errors import UserError
from dynamo_lightning.evaluation.benchmarks import describe
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.rewards import (
    DatasetReward,
    FormatReward,
    FunctionReward,
    MathReward,
    Reward,
    WeightedReward,
    as_reward,
)
from dynamo_lightning.rewards.columns import check_answer, check_columns
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.types import Prompt, Rollout

ONE_WORKER = ScoringConfig(num_workers=1, failure_score=-1.0)
CALL = {"prompt": "2 + 3", "answer": "5"}


def rollout(text, answer="5", source="sums", answers=(), prompt_text="", token_ids=(1,), **columns):
    prompt = Prompt(0, "2 + 3", prompt_text, (1,), answer, source, columns, answers=answers)
    return Rollout(prompt, 0, token_ids, (-0.5,) * len(token_ids), text)


def score(reward, *rollouts, config=ONE_WORKER):
    with RewardScorer(reward, config) as scorer:
        return scorer.score(rollouts)


def test_a_module_takes_a_function_a_list_of_them_or_a_reward():
    assert PolicyModule(reward=team.length).reward(response="abc", **CALL) == 3
    both = PolicyModule(reward=[MathReward(), team.length]).reward
    assert both(response="5", **CALL) == 1.0 + 1
    assert both.components(response="5", **CALL) == {"math": 1.0, "length": 1.0}
    assert isinstance(PolicyModule().reward, MathReward)
    pickle.dumps(PolicyModule().reward)  # the command line's default is not picklable by itself


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "empty list"),
        ("math", "is a str"),
        (MathReward, "make a reward of it"),
        (3, "is a int"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_reward_is_refused(given, message):
    with pytest.raises(UserError, match=rf"model\.reward.*{message}"):
        as_reward(given)


def closure(factor):
    def scaled(prompt, response, answer):
        return factor * len(response)

    return scaled


@pytest.mark.parametrize("function", [lambda prompt, response, answer: 1.0, closure(2)])
def test_a_lambda_or_closure_is_refused_with_the_remedy(function):
    with pytest.raises(
        UserError, match=r"^model\.reward: the function '.*(lambda|scaled).*put it in a module"
    ) as error:
        RewardScorer([team.length, function], ScoringConfig()).start()
    assert "\n" not in str(error.value)


def test_a_function_of_a_notebook_is_refused_with_the_remedy():
    script = (
        "from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig\n"
        "def mine(prompt, response, answer):\n    return 1.0\n"
        "RewardScorer(mine, ScoringConfig()).start()\n"
    )
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True)
    assert "UserError: model.reward: 'mine' is defined in a notebook or on the command line: put it" in done.stderr


def test_arguments_in_another_order_are_refused():
    def swapped(answer, prompt, response):
        return 0.0

    with pytest.raises(UserError, match=r"must take \(prompt, response, answer\) in this order"):
        FunctionReward(swapped)


def test_async_rewards_are_waited_for():
    (got,) = score([team.slow_length, team.length], rollout("abc"))
    assert (got.reward, dict(got.components)) == (6.0, {"slow_length": 3.0, "length": 3.0})


def test_a_reward_that_does_not_apply_is_left_out_of_the_sum_and_of_its_own_mean():
    short, long = score([team.length, team.only_long], rollout("abc"), rollout("abcd"))
    assert (short.reward, dict(short.components)) == (3.0, {"length": 3.0})
    assert (long.reward, dict(long.components)) == (5.0, {"length": 4.0, "only_long": 1.0})


def test_a_response_to_which_no_reward_applies_fails():
    (got,) = score(team.only_long, rollout("abc"))
    assert (got.failure, got.reward, got.message) == ("crash", -1.0, "no reward applies: only_long returned None")


def test_numbers_of_other_libraries_are_numbers():
    values = {
        "np.bool_": 1.0, "np.float32": 0.5, "np.int64": 3.0, "0-d": 0.25, "torch": 0.75, "bfloat16": 2.0,
        "torch.bool": 1.0, "decimal": 1.5, "fraction": 0.125, "true": 1.0,
    }  # fmt: skip
    refused = ["list", "vector", "complex", "huge", "decimal nan"]
    scores = score(team.scalar, *(rollout(text) for text in [*values, *refused]))
    assert [got.reward for got in scores[: len(values)]] == list(values.values())
    assert all("must be a finite number, got" in got.message for got in scores[len(values) :])
    assert "GroupReward" in scores[len(values)].message


def test_the_data_sets_name_reaches_rewards_that_ask_for_it():
    plain, own = score(team.dataset_length, rollout("a"), rollout("a", source="gsm8k"))
    assert (plain.reward, own.reward) == (4.4, 5.5)


def test_each_data_set_can_have_its_own_reward():
    reward = WeightedReward([DatasetReward({"sums": MathReward(), "words": FunctionReward("team_rewards.equal")}),
                             FunctionReward("team_rewards.length")], [2.0, 1.0])  # fmt: skip
    sums, words, others = score(
        reward, rollout("5.0"), rollout("5.0", source="words"), rollout("five", answer="five", source="others")
    )
    assert dict(sums.components) == {"dataset": 1.0, "length": 3.0} and sums.reward == 5.0
    assert dict(words.components) == {"dataset": 0.0, "length": 3.0}
    assert dict(others.components) == {"length": 4.0}
    alone = DatasetReward({"sums": MathReward()}, default=FunctionReward("team_rewards.length"))
    assert [dict(got.components) for got in score(alone, rollout("5"), rollout("5", source="x"))] == [
        {"math": 1.0}, {"length": 1.0},
    ]  # fmt: skip


def test_an_evaluation_is_found_again_under_rewards_of_data_sets():
    described = describe(DatasetReward({"sums": MathReward()}, default=FunctionReward("team_rewards.equal")))
    assert described["rewards"]["sums"]["class"] == "dynamo_lightning.rewards.math.MathReward"
    assert described["default"]["function"] == "team_rewards.equal"


def test_an_answer_is_checked_by_the_reward_of_its_data_set():
    reward = DatasetReward({"sums": MathReward()}, default=FunctionReward("team_rewards.equal"))
    check_answer(reward, Prompt(0, "q", "q", (1,), "???", "words"))
    with pytest.raises(ValueError, match="reference answer"):
        check_answer(reward, Prompt(0, "q", "q", (1,), "???", "sums"))
    with pytest.raises(ValueError, match="reference answer"):
        check_answer(reward, Prompt(0, "q", "q", (1,), "5", "sums", answers=("5", "???")))


def test_any_of_several_answers_is_right():
    scores = score(MathReward(), *(rollout(text, answer="1", answers=("1", "2")) for text in ("1", "2", "3")))
    assert [got.reward for got in scores] == [1.0, 1.0, 0.0]
    assert score(team.any_answer, rollout("2", answer="1", answers=("1", "2")))[0].reward == 3.0
    assert score(team.any_answer, rollout("5"))[0].reward == 2.0


class OwnNames(Reward):
    def __call__(self, question, completion, gold, level=0):
        return float(level)


@pytest.mark.parametrize("name", ["question", "self", "prompt", "response", "answer", "completion", "gold", "function"])
def test_a_column_with_the_name_of_any_parameter_does_no_harm(name):
    columns = {name: "x", "level": 1}
    for reward in ("team_rewards.other_names", "team_rewards.length"):
        assert score(FunctionReward(reward), rollout("a", **columns))[0].reward == 1.0
    weighted = WeightedReward([OwnNames(), MathReward()], [1.0, 1.0])
    if name not in ("self", "prompt", "response", "answer"):
        assert weighted.components("2 + 3", "5", "5", **columns) == {"own_names": 1.0, "math": 1.0}


def test_colliding_columns_are_named_and_missing_ones_refused():
    prompts = [Prompt(0, "q", "q", (1,), "5", "sums", {"question": "x", "dataset": "y"}, place="line 1 of 'a.jsonl'")]
    with pytest.warns(UserWarning) as warned:
        check_columns(as_reward(team.other_names), prompts, "data.train")
    assert [str(w.message)[:72] for w in warned] == [
        "data.train: the columns dataset of data set 'sums' do not reach rewards,",
        "data.train: the columns question of data set 'sums' have the names of pa",
    ]
    expected = (
        r"reward 'needs_level' needs the column 'level', which data set 'sums' \(data\.train\) lacks; its columns "
        r"besides prompt and answer: dataset, question\. Add it"
    )
    with pytest.warns(UserWarning), pytest.raises(UserError, match=expected):
        check_columns(
            WeightedReward([MathReward(), FunctionReward("team_rewards.needs_level")], [1, 1]), prompts, "data.train"
        )
    more = [
        Prompt(0, "q", "q", (1,), "5", "s", {"level": 1}),
        Prompt(1, "r", "r", (1,), "5", "s", {}, place="line 2 of 'a'"),
    ]
    with pytest.raises(UserError, match="lacks at line 2 of 'a'"):
        check_columns(as_reward(team.needs_level), more, "data.train")


def test_a_lookup_of_a_missing_column_names_the_columns_there_are():
    (got,) = score(team.looks_up, rollout("a", difficulty=1))
    assert got.message.startswith("KeyError: None; the row's columns: dataset, difficulty, max_response_length,")


class Tokenizer:
    """Token 0 ends a response, 1 is `<think>`, 2 is `</think>`."""

    all_special_ids = (0, 1, 2)

    def decode(self, token_ids, skip_special_tokens):
        words = {0: "<eos>", 1: "<think>", 2: "</think>", 3: "hm", 4: "\\boxed{5}"}
        return "".join(words[i] for i in token_ids if not (skip_special_tokens and i in self.all_special_ids))


def test_special_tokens_reach_rewards_that_ask_for_them():
    response = rollout("hm\\boxed{5}", token_ids=(1, 3, 2, 4, 0))
    pattern = r"<think>.*</think>\s*\\boxed\{.*\}"
    expected = {"sees_special": 1.0, "shouts": 1.0, "format": 1.0, "length": 11.0}
    rewards = [team.sees_special, FunctionReward("team_rewards.shouts", keep_special_tokens=True),
               FormatReward(pattern), team.length]  # fmt: skip
    with RewardScorer(rewards, ONE_WORKER) as scorer:
        scorer.tokenizer = Tokenizer()
        assert dict(scorer.score([response])[0].components) == expected


@pytest.mark.parametrize(
    ("prompt_text", "response", "expected"),
    [
        ("Q<|im_start|>assistant\n<think>\n", "hm</think>\n\\boxed{5}", 1.0),
        ("Q<|im_start|>assistant\n<think>\n", "hm \\boxed{5}", 0.0),
        ("Q<|im_start|>assistant\n", "<think>hm</think>\\boxed{5}", 1.0),
        ("Q<|im_start|>assistant\n", "hm</think>\\boxed{5}", 0.0),
        ("Q<think>\n\n</think>\n\n", "\\boxed{5}", 0.0),
    ],
)
def test_a_response_begins_after_the_tag_that_its_template_opens(prompt_text, response, expected):
    reward = FormatReward(r"<think>.*</think>.*\\boxed\{.*\}.*")
    assert score(reward, rollout(response, prompt_text=prompt_text))[0].reward == expected


def test_the_worker_modules_import_no_torch():
    code = "import sys, dynamo_lightning.rewards.worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
