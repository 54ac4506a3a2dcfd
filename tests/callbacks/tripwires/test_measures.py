"""Each tripwire goes off at hand-made inputs, and not at those beside them."""

import math

import pytest

from dynamo_lightning.callbacks.tripwires import TRIPWIRES
from dynamo_lightning.callbacks.tripwires.observation import History, Observation, Validation

BY_NAME = {tripwire.name: tripwire for tripwire in TRIPWIRES}


def history(count=1, validations=(), first=None, **values):
    """Iterations with these fields: a list gives one value for each, anything else is the same in all."""
    columns = {name: value if isinstance(value, list) else [value] * count for name, value in values.items()}
    count = max([count, *(len(column) for column in columns.values())])
    observations = [Observation(i + 1, **{name: column[i] for name, column in columns.items()}) for i in range(count)]
    return History(observations[:3] if first is None else first, observations[-30:], validations)


def goes_off(name, given):
    """The words if the tripwire goes off, else an empty text; `None` if there is nothing to judge."""
    measured = BY_NAME[name].measure(given)
    if measured is None:
        return None
    return measured.message if BY_NAME[name].is_beyond(measured.value) else ""


def test_all_groups_solved_over_ten_iterations():
    assert goes_off("all_solved", history(9, frac_solved=1.0)) is None
    assert "100% of the groups" in goes_off("all_solved", history(10, frac_solved=1.0))
    assert goes_off("all_solved", history(frac_solved=[1.0] * 9 + [0.4])) == ""
    assert "data.train" in goes_off("all_solved", history(frac_solved=[1.0] * 9 + [0.6]))  # 0.96 on average
    assert goes_off("all_solved", history(10, frac_solved=math.nan)) is None  # the loss learns from equal rewards


def test_all_groups_hopeless_over_ten_iterations():
    words = goes_off("all_hopeless", history(10, frac_hopeless=0.97))
    for option in ("data.train", "data.template", "model.sampling.max_response_length", "model.reward"):
        assert option in words
    assert goes_off("all_hopeless", history(10, frac_hopeless=0.9)) == ""


def test_solved_and_hopeless_groups_without_any_between_are_said_once():
    assert "60% of the groups were all correct and 40% all" in goes_off(
        "no_signal", history(10, frac_solved=0.6, frac_hopeless=0.4)
    )
    assert goes_off("no_signal", history(10, frac_solved=0.6, frac_hopeless=0.35)) == ""
    assert goes_off("no_signal", history(10, frac_solved=0.0, frac_hopeless=1.0)) == ""  # all_hopeless says it


def test_failed_rewards_from_one_in_a_hundred_on():
    assert goes_off("reward_failures", history(frac_failed=[0.0] * 4 + [0.04])) == ""
    words = goes_off("reward_failures", history(frac_failed=[0.0] * 4 + [0.06]))
    assert words.startswith("1.2% of the rewards") and "model.scoring.time_limit" in words


def test_rewards_that_follow_length_within_groups():
    # Per iteration 40 rollouts; r = 19 / √(20 · 20) = 0.95, then 0.5.
    assert "r = 0.95 over 120" in goes_off(
        "reward_follows_length", history(3, length_products=(40.0, 19.0, 20.0, 20.0))
    )
    assert goes_off("reward_follows_length", history(3, length_products=(40.0, 10.0, 20.0, 20.0))) == ""
    assert goes_off("reward_follows_length", history(3, length_products=(40.0, -19.0, 20.0, 20.0))) == ""
    assert goes_off("reward_follows_length", history(3, length_products=(30.0, 19.0, 20.0, 20.0))) is None  # too few
    assert goes_off("reward_follows_length", history(3, length_products=(40.0, 0.0, 20.0, 0.0))) == ""  # one length


def test_a_named_reward_that_falls_while_the_total_rises():
    noise = [0.001 * (-1) ** i for i in range(30)]
    rising = [0.2 + 0.01 * i + e for i, e in enumerate(noise)]
    falling = [{"math": 0.5 - 0.01 * i + e, "style": 0.02 * i} for i, e in enumerate(noise)]
    words = goes_off("rewards_disagree", history(reward=rising, components=falling))
    assert "rose by 0.200" in words and "rewards/math/mean fell by 0.200" in words
    both_rise = [{"math": value, "style": value} for value in rising]
    assert goes_off("rewards_disagree", history(reward=rising, components=both_rise)) == ""
    assert goes_off("rewards_disagree", history(reward=rising[::-1], components=falling)) == ""
    assert goes_off("rewards_disagree", history(reward=rising, components=[{"math": v} for v in rising])) is None
    assert goes_off("rewards_disagree", history(reward=rising[:20], components=falling[:20])) is None


def test_a_training_reward_that_falls_by_two_fifths():
    noise = [0.01 * (-1) ** i for i in range(30)]
    falls = [0.5 + e for e in noise[:10]] + [0.25 + e for e in noise[:10]]
    assert "from 0.500 to 0.250 within 20" in goes_off("reward_falls", history(reward=falls))
    assert goes_off("reward_falls", history(reward=falls[:19])) is None
    assert goes_off("reward_falls", history(reward=falls[::-1])) == ""
    assert (
        goes_off("reward_falls", history(reward=[0.5 + e for e in noise[:10]] + [0.35 + e for e in noise[:10]])) == ""
    )
    rare = [0.0] * 9 + [0.2] + [0.0] * 10  # half of it by chance: one success in ten batches
    assert goes_off("reward_falls", history(reward=rare)) == ""


@pytest.mark.parametrize(
    ("value", "high", "reward", "expected"),
    [(0.30, 0.38, 0.7, True), (0.30, 0.42, 0.7, False), (0.30, 0.38, 0.5, False), (0.60, 0.68, 0.7, False)],
)
def test_held_out_success_that_falls_while_the_training_reward_rises(value, high, reward, expected):
    first = Validation(10, 0.5, {"val/toy/pass@1": (0.5, 0.4, 0.6)})
    second = Validation(20, reward, {"val/toy/pass@1": (value, 0.2, high)})
    words = goes_off("held_out_falls", history(validations=[first, second]))
    assert bool(words) == expected
    if expected:
        assert "val/toy/pass@1 fell from 0.500 (after 10 iterations) to 0.300" in words


def test_the_validation_before_training_is_compared_with_the_first_training_rewards():
    before = Validation(0, math.nan, {"val/toy/pass@1": (0.5, 0.45, 0.55)})
    after = Validation(5, 0.9, {"val/toy/pass@1": (0.2, 0.15, 0.25)})
    assert goes_off("held_out_falls", history(5, reward=0.2, validations=[before, after]))
    assert goes_off("held_out_falls", history(5, reward=0.9, validations=[before, after])) == ""
    assert goes_off("held_out_falls", history(5, reward=0.9, validations=[before])) is None


def test_entropy_below_a_tenth_of_that_at_first():
    start = [0.5, 0.5, 0.5]
    assert "from 0.5 nats in the first iterations to 0.04" in goes_off(
        "entropy_collapse", history(entropy=[*start, 0.04, 0.04, 0.04])
    )
    assert goes_off("entropy_collapse", history(entropy=[*start, 0.06, 0.06, 0.06])) == ""
    assert goes_off("entropy_collapse", history(entropy=[*start, 0.06, 0.04, 0.06])) == ""  # one low value
    assert (
        goes_off("entropy_collapse", history(entropy=[1e-4] * 3 + [1e-6] * 3)) is None
    )  # deterministic from the start


def test_entropy_that_falls_because_prompts_are_solved_is_success():
    entropy = [0.5] * 3 + [0.04] * 10
    assert goes_off("entropy_collapse", history(entropy=entropy, frac_solved=[0.1] * 13))
    assert goes_off("entropy_collapse", history(entropy=entropy, frac_solved=[0.1] * 3 + [0.4] * 10)) == ""


def test_entropy_three_times_that_at_first():
    assert goes_off("entropy_explosion", history(entropy=[0.2] * 3 + [0.7] * 3))
    assert goes_off("entropy_explosion", history(entropy=[0.2] * 3 + [0.55] * 3)) == ""
    assert goes_off("entropy_explosion", history(entropy=[0.02] * 3 + [0.2] * 3)) == ""  # 0.18 nats are no noise


def test_a_gradient_norm_ten_times_its_median():
    assert goes_off("gradient_norm", history(gradient_norm=[1.0] * 9 + [50.0])) is None  # nine before it
    assert "20 times the median of the last 10" in goes_off("gradient_norm", history(gradient_norm=[1.0] * 10 + [20.0]))
    assert goes_off("gradient_norm", history(gradient_norm=[1.0, 9.0] * 5 + [20.0])) == ""  # the median is 5
    assert goes_off("gradient_norm", history(gradient_norm=[1.0] * 10 + [math.nan])) is None  # no step


def test_values_that_are_not_finite():
    assert "2 of loss, reward, entropy and gradient norm" in goes_off("not_finite", history(num_not_finite=2.0))
    assert goes_off("not_finite", history(num_not_finite=0.0)) == ""


def test_responses_cut_off_at_the_length_limit():
    assert "model.sampling.max_response_length" in goes_off("length_limit", history(10, frac_truncated=0.35))
    assert goes_off("length_limit", history(10, frac_truncated=0.25)) == ""
    assert goes_off("length_limit", history(9, frac_truncated=1.0)) is None


def test_a_difference_of_logprobs_that_grows_from_rounding():
    growing = [1e-6, 1e-4, 2e-4, 3e-4, 4e-4]
    assert "as if pushed weights did not arrive" in goes_off("old_weights", history(logp_difference=growing))
    assert goes_off("old_weights", history(logp_difference=[1e-6] * 3 + [8e-5] * 3)) == ""  # below 5 × rounding
    assert goes_off("old_weights", history(logp_difference=[0.01] * 3 + [0.02] * 3)) == ""  # bfloat16
    assert goes_off("old_weights", history(logp_difference=[0.01] * 3 + [0.06, 0.01, 0.06])) == ""  # one is small
    assert goes_off("old_weights", history(logp_difference=[1e-6] * 3 + [math.nan] * 3)) is None  # older on purpose


def test_an_engine_far_from_the_trainer():
    assert goes_off("engine_mismatch", history(3, logp_difference=0.04))
    assert goes_off("engine_mismatch", history(3, logp_difference=0.02)) == ""
    assert "6.0% of the tokens" in goes_off("ratio_tail", history(3, frac_cut=0.06))
    assert goes_off("ratio_tail", history(3, frac_cut=0.04)) == ""


def test_tokens_of_another_temperature():
    # Three iterations: Σx = 60, √Σx² = 7.7 (7.7 deviations), ΣH = 300: 20 % more than the entropy.
    assert "unlikelier" in goes_off("wrong_distribution", history(3, surprise=(20.0, 20.0, 100.0)))
    assert "likelier" in goes_off("wrong_distribution", history(3, surprise=(-20.0, 20.0, 100.0)))
    assert goes_off("wrong_distribution", history(3, surprise=(20.0, 200.0, 100.0))) == ""  # 2.4 deviations: chance
    assert goes_off("wrong_distribution", history(3, surprise=(20.0, 20.0, 1000.0))) == ""  # 2 %
    assert goes_off("wrong_distribution", history(3, surprise=(0.0, 0.0, 0.0))) is None


def test_identical_responses_beyond_what_probabilities_explain():
    assert "30% of the pairs" in goes_off("duplicates", history(3, identical_pairs=(100.0, 30.0, 5.0)))
    assert goes_off("duplicates", history(3, identical_pairs=(100.0, 60.0, 58.0))) == ""  # short certain answers
    assert goes_off("duplicates", history(3, identical_pairs=(50.0, 50.0, 0.0))) is None  # too few pairs


def test_prompts_that_come_again_or_not_at_all():
    assert "4 prompts of this batch" in goes_off("repeated_prompts", history(num_repeated=4.0))
    assert "8 prompts were skipped" in goes_off("skipped_prompts", history(num_skipped=8.0))
    for name, field in (("repeated_prompts", "num_repeated"), ("skipped_prompts", "num_skipped")):
        assert goes_off(name, history(**{field: 0.0})) == ""
        assert goes_off(name, history()) is None


def test_groups_that_all_have_a_bound_as_their_size():
    assert "80% of the groups had data.min_rollouts and 16%" in goes_off(
        "allocation_at_bounds", history(10, frac_at_min=0.8, frac_at_max=0.16)
    )
    assert goes_off("allocation_at_bounds", history(10, frac_at_min=0.8, frac_at_max=0.1)) == ""
    assert goes_off("allocation_at_bounds", history(10, frac_at_min=math.nan, frac_at_max=math.nan)) is None


@pytest.mark.parametrize("tripwire", TRIPWIRES, ids=lambda tripwire: tripwire.name)
def test_a_run_of_one_iteration_without_numbers_is_no_reason_to_warn(tripwire):
    measured = tripwire.measure(history())
    assert measured is None or not tripwire.is_beyond(measured.value)
