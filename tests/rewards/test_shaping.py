import pickle

import pytest
from jsonargparse import ArgumentParser

from dynamo_lightning.rewards import FunctionReward, MathReward, Reward, WeightedReward
from dynamo_lightning.rewards.shaping import FormatReward, LengthPenalty, OverlongShaping

CALL = {"prompt": "2 + 3", "response": r"\boxed{5}", "answer": "5"}


@pytest.mark.parametrize(
    ("length", "punishment"),
    # A limit of 100 and a buffer of 20: nothing up to 80, then 5 % for each token.
    [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (150, -1.0)],
)
def test_punishment_by_hand(length, punishment):
    reward = OverlongShaping(MathReward())
    columns = {"response_length": length, "max_response_length": 100}
    assert reward.components(**CALL, **columns) == {"math": 1.0, "overlong": pytest.approx(punishment)}
    assert reward(**CALL, **columns) == pytest.approx(1.0 + punishment)


def test_dapos_numbers():
    """20,480 tokens of which the last 4,096 are punished."""
    reward = OverlongShaping(MathReward(), buffer_share=4096 / 20480)
    columns = {"max_response_length": 20480}
    assert reward.punishment({"response_length": 16384, **columns}) == 0.0
    assert reward.punishment({"response_length": 16384 + 2048, **columns}) == -0.5


def test_weight_and_limit_of_its_own():
    reward = OverlongShaping(MathReward(), buffer_share=0.5, weight=0.1, max_response_length=10)
    assert reward(**CALL, response_length=10, max_response_length=1000) == pytest.approx(0.9)


def test_a_weighted_reward_can_be_shaped():
    weighted = WeightedReward([MathReward(), FunctionReward("hostile_rewards.half")], [1.0, 2.0])
    columns = {"response_length": 100, "max_response_length": 100}
    reward = OverlongShaping(weighted)
    assert reward.components(**CALL, **columns) == {"math": 1.0, "half": 0.5, "overlong": -1.0}
    assert reward(**CALL, **columns) == pytest.approx(1.0 + 2.0 * 0.5 - 1.0)


def test_the_wrapped_reward_still_checks_answers():
    OverlongShaping(MathReward()).check_answer("5")
    with pytest.raises(ValueError, match="reference answer"):
        OverlongShaping(MathReward()).check_answer(r"\frac{1}{")


def test_missing_lengths_are_an_error_that_names_the_columns():
    with pytest.raises(ValueError, match=r"response_length and max_response_length, got \['level'\]"):
        OverlongShaping(MathReward())(**CALL, level=3)
    with pytest.raises(ValueError, match=r"got \['response_length'\]"):
        OverlongShaping(MathReward())(**CALL, response_length=3)


def test_shaping_twice_is_an_error():
    with pytest.raises(ValueError, match="shaped twice"):
        OverlongShaping(OverlongShaping(MathReward()))(**CALL, response_length=1, max_response_length=2)


@pytest.mark.parametrize("settings", [{"buffer_share": 0.0}, {"weight": -1.0}, {"max_response_length": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="overlong shaping needs"):
        OverlongShaping(MathReward(), **settings)


def test_it_survives_pickling_and_is_chosen_by_class_path():
    reward = pickle.loads(pickle.dumps(OverlongShaping(MathReward())))
    assert reward(**CALL, response_length=90, max_response_length=100) == pytest.approx(0.5)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reward, "reward")
    config = parser.parse_object(
        {
            "reward": {
                "class_path": "dynamo_lightning.rewards.shaping.OverlongShaping",
                "init_args": {"reward": "dynamo_lightning.rewards.MathReward", "buffer_share": 0.5},
            }
        }
    )
    assert parser.instantiate_classes(config).reward.buffer_share == 0.5


@pytest.mark.parametrize(
    ("pattern", "response", "expected"),
    [
        (None, r"so \boxed{5}", 1.0),
        (None, r"so \boxed{5", 0.0),
        (r"<think>.*</think>\s*\\boxed\{.*\}", "<think>\nhm\n</think>\n\\boxed{5}\n", 1.0),
        (r"<think>.*</think>\s*\\boxed\{.*\}", "\\boxed{5}", 0.0),
        (r"<think>.*</think>\s*\\boxed\{.*\}", "<think></think>\\boxed{5} and more", 0.0),
    ],
)
def test_format_reward(pattern, response, expected):
    reward = pickle.loads(pickle.dumps(FormatReward(pattern)))
    assert reward.components("", response, "5") == {"format": expected}


def test_a_format_that_is_no_pattern_is_refused():
    with pytest.raises(ValueError, match=r"pattern='\(' is no regular expression"):
        FormatReward("(")


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (20, 0.0), (40, -0.25), (100, -1.0), (120, -1.0)])
def test_length_penalty_by_hand(length, penalty):
    reward = LengthPenalty(free_length=20)
    assert reward.name == "length_penalty"
    assert reward(**CALL, response_length=length, max_response_length=100) == pytest.approx(penalty)
    weighted = WeightedReward([MathReward(), FormatReward(), reward], [1.0, 0.2, 0.1])
    total = weighted(**CALL, response_length=length, max_response_length=100)
    assert total == pytest.approx(1.2 + 0.1 * penalty)


def test_impossible_lengths_are_refused():
    with pytest.raises(ValueError, match="0 ≤ free_length < max_response_length, got 5 and 5"):
        LengthPenalty(5, 5)
    with pytest.raises(ValueError, match="free_length=50 is not below the limit of 50 tokens"):
        LengthPenalty(50)(**CALL, response_length=1, max_response_length=50)
    with pytest.raises(ValueError, match="LengthPenalty needs the columns response_length and max_response_length"):
        LengthPenalty()(**CALL)
