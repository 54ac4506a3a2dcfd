"""The allocation rule for unequal scores of right and wrong responses: against brute force and the exact variance."""

import itertools
import math

import numpy as np
import pytest

from dynamo_lightning.allocation import Estimate, RLOORule, ScoreRatioRule, allocate_rollouts
from dynamo_lightning.errors import UserError
from dynamo_lightning.measure.moments import kernel_moments

RATES = np.array([0.02, 0.3, 0.6, 0.97])
ESTIMATE = Estimate(RATES, RATES * (1 - RATES), np.zeros(4, dtype=bool))
IDS = [1, 2, 3, 4]


@pytest.mark.parametrize("ratio", [0.1, 1.0, 5.0])
def test_no_allocation_within_the_bounds_has_less_variance(ratio):
    right, wrong = 3.0 * ratio, 3.0
    a = RATES * (1 - RATES) * ((1 - RATES) * right + RATES * wrong)

    def objective(sizes):
        return float((a / (np.asarray(sizes) - 1)).sum())

    sizes = allocate_rollouts(ESTIMATE, IDS, 24, 2, 14, ScoreRatioRule(ratio))
    every = (n for n in itertools.product(range(2, 15), repeat=4) if sum(n) == 24)
    assert objective(sizes) == pytest.approx(min(objective(n) for n in every), rel=1e-12)


def test_a_ratio_of_one_is_the_rloo_rule():
    sizes = [allocate_rollouts(ESTIMATE, IDS, 32, 2, 20, rule) for rule in (ScoreRatioRule(1.0), RLOORule())]
    np.testing.assert_array_equal(*sizes)


def test_small_scores_of_right_responses_favor_prompts_that_are_mostly_solved():
    few, equal = (allocate_rollouts(ESTIMATE, IDS, 32, 2, 20, ScoreRatioRule(ratio)) for ratio in (0.1, 1.0))
    assert few[3] > equal[3] and few[0] <= equal[0] and few[1] < equal[1]


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_the_variance_is_that_of_the_u_statistic_with_such_scores(rate):
    # Scores ±√S_r, independent of everything but the reward; ∇J = 0, so that a is n times the variance of large groups.
    ratio, count = 0.1, 10**6
    scores = np.array([[math.sqrt(ratio)], [-math.sqrt(ratio)], [1.0], [-1.0]])
    counts = [count * rate, count * rate, count * (1 - rate), count * (1 - rate)]
    moments = kernel_moments([1, 1, 0, 0], scores, counts=counts)
    expected = rate * (1 - rate) * ((1 - rate) * ratio + rate)
    assert 1000 * moments.variance(1000) == pytest.approx(expected, rel=0.01)


def test_mistakes_name_the_option():
    for ratio in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match=r"data\.rule\.score_ratio=.* must be positive and finite"):
            ScoreRatioRule(ratio)
    with pytest.raises(UserError, match=r"data\.rule\.score_ratio=0\.1 needs success rates"):
        allocate_rollouts(RATES, IDS, 16, 2, 14, ScoreRatioRule())
    with pytest.raises(UserError, match=r"data\.min_rollouts=1 is less than 2, which ScoreRatioRule needs"):
        allocate_rollouts(ESTIMATE, IDS, 16, 1, 14, ScoreRatioRule())
