import pickle

import pytest
from jsonargparse import ArgumentParser

from dynamo_lightning.rewards import FunctionReward, MathReward, Reward, WeightedReward

CALL = {"prompt": "2 + 3", "response": r"\boxed{5}", "answer": "5"}


class HTTPJudgeReward(Reward):
    def __call__(self, prompt, response, answer, **columns):
        return 1.0


class Strictness(Reward):
    def __call__(self, prompt, response, answer, **columns):
        return 2.0


@pytest.mark.parametrize(
    ("reward", "name"),
    [(MathReward(), "math"), (HTTPJudgeReward(), "http_judge"), (Strictness(), "strictness")],
)
def test_name_is_the_class_in_snake_case_without_reward(reward, name):
    assert reward.name == name
    assert reward.components(**CALL) == {name: reward(**CALL)}
    assert reward.total({name: 0.25}) == 0.25


def test_function_reward_is_found_by_its_path_and_named_after_it():
    reward = FunctionReward("hostile_rewards.half")
    assert reward(**CALL) == 0.5
    assert reward.name == "half"
    assert reward.components(**CALL) == {"half": 0.5}


def test_function_reward_takes_the_function_itself():
    assert FunctionReward(lambda prompt, response, answer: len(response))(**CALL) == len(r"\boxed{5}")


def test_function_gets_only_the_columns_it_accepts():
    columns = {"difficulty": 0.25, "level": 3}
    assert FunctionReward("hostile_rewards.half")(**CALL, **columns) == 0.5
    assert FunctionReward("hostile_rewards.difficulty")(**CALL, **columns) == 0.25
    assert FunctionReward("hostile_rewards.all_columns")(**CALL, **columns) == 3.25


@pytest.mark.parametrize(
    "path", ["no_such_package.reward", "hostile_rewards.no_such_function", "half", "", "hostile rewards.half"]
)
def test_path_that_cannot_be_imported_is_an_error_that_names_it(path):
    with pytest.raises(ValueError, match="cannot be imported") as error:
        FunctionReward(path)
    assert repr(path) in str(error.value)


def test_path_of_something_else_than_a_function_is_an_error():
    with pytest.raises(ValueError, match=r"'hostile_rewards.not_a_function' is a int, it cannot be called"):
        FunctionReward("hostile_rewards.not_a_function")


def test_function_without_the_three_arguments_is_an_error():
    with pytest.raises(ValueError, match=r"must accept \(prompt, response, answer\).*got \(prompt, response\)"):
        FunctionReward("hostile_rewards.no_answer")


def test_weighted_sum_and_its_parts_by_hand():
    reward = WeightedReward([MathReward(), FunctionReward("hostile_rewards.half")], [2.0, -0.5])
    components = reward.components(**CALL)
    assert components == {"math": 1.0, "half": 0.5}
    assert reward.total(components) == reward(**CALL) == 2.0 * 1.0 - 0.5 * 0.5


def test_weights_must_match_rewards_in_number():
    with pytest.raises(ValueError, match="got 1 rewards and 2 weights"):
        WeightedReward([MathReward()], [1.0, 0.5])
    with pytest.raises(ValueError, match="got 0 rewards and 0 weights"):
        WeightedReward([], [])


def test_rewards_of_one_name_are_an_error():
    with pytest.raises(ValueError, match=r"different names.*\['math', 'math'\]"):
        WeightedReward([MathReward(), MathReward(require_boxed=True)], [1.0, 1.0])


def test_weighted_reward_checks_answers_with_every_reward():
    reward = WeightedReward([FunctionReward("hostile_rewards.half"), MathReward()], [1.0, 1.0])
    reward.check_answer("5")
    with pytest.raises(ValueError, match="reference answer"):
        reward.check_answer(r"\frac{1}{")


def test_rewards_survive_pickling():
    parts = [MathReward(require_boxed=True), FunctionReward("hostile_rewards.half"), HTTPJudgeReward()]
    for reward in [*parts, WeightedReward(parts, [1.0, 0.5, 0.25])]:
        copy = pickle.loads(pickle.dumps(reward))
        assert copy.name == reward.name
        assert copy.components(**CALL) == reward.components(**CALL)
        assert copy(**CALL) == reward(**CALL)


def test_rewards_are_chosen_by_class_path():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reward, "reward")
    function = {
        "class_path": "dynamo_lightning.rewards.FunctionReward",
        "init_args": {"function": "hostile_rewards.half"},
    }
    maths = {"class_path": "dynamo_lightning.rewards.MathReward", "init_args": {"require_boxed": True}}
    weighted = {
        "class_path": "dynamo_lightning.rewards.WeightedReward",
        "init_args": {"rewards": [maths, function], "weights": [1, 0.5]},
    }
    config = parser.parse_object({"reward": weighted})
    reward = parser.instantiate_classes(config).reward
    assert reward.components(**CALL) == {"math": 1.0, "half": 0.5}
    assert parser.parse_string(parser.dump(config)) == config
