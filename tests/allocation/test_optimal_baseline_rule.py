"""The allocation rule of the variance-minimizing baseline: its formula by hand, its sizes against all allocations."""

import itertools

import numpy as np
import pytest

from dynamo_lightning.allocation import (
    Estimate,
    NeymanRule,
    OptimalBaselineRule,
    RLOORule,
    allocate_rollouts,
)
from dynamo_lightning.errors import UserError

RATES = np.array([0.02, 0.3, 0.5, 0.9])
ESTIMATE = Estimate(RATES, RATES * (1 - RATES), np.zeros(4, dtype=bool))
IDS = [1, 2, 3, 4]


def objective(rule, sizes):
    """The variance that the rule's docstring states, from two score norms instead of their ratio."""
    right, wrong = 3.0 * rule.score_ratio, 3.0
    mean = RATES * right + (1 - RATES) * wrong
    a = RATES * (1 - RATES) * right * wrong / mean
    c = RATES * (1 - RATES) * right**2 * wrong**2 / mean**3
    n = np.asarray(sizes, dtype=float)
    return float((a / n).sum() if rule.baseline == "history" else (a / n + c / (n * (n - 1))).sum())


@pytest.mark.parametrize("ratio", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("baseline", ["group", "history"])
def test_no_allocation_within_the_bounds_has_less_variance(baseline, ratio):
    rule = OptimalBaselineRule(baseline, ratio)
    least = 1 if baseline == "history" else 2
    sizes = allocate_rollouts(ESTIMATE, IDS, 24, least, 14, rule)
    every = (n for n in itertools.product(range(least, 15), repeat=4) if sum(n) == 24)
    assert objective(rule, sizes) == pytest.approx(min(objective(rule, n) for n in every), rel=1e-12)


def test_equal_score_norms_give_the_rules_of_leave_one_out_and_of_a_mean():
    for rule, same in ((OptimalBaselineRule("group"), RLOORule()), (OptimalBaselineRule("history"), NeymanRule())):
        ours, theirs = (allocate_rollouts(ESTIMATE, IDS, 40, 2, 30, r).tolist() for r in (rule, same))
        assert ours == theirs


def test_large_scores_of_right_responses_move_rollouts_to_hard_prompts():
    few, many = (allocate_rollouts(ESTIMATE, IDS, 40, 2, 30, OptimalBaselineRule("group", r)) for r in (0.5, 8.0))
    assert many[0] > few[0] and many[3] < few[3]


def test_groups_of_one_need_a_history():
    allocate_rollouts(ESTIMATE, IDS, 8, 1, 14, OptimalBaselineRule("history"))
    with pytest.raises(UserError, match=r"data\.min_rollouts=1 is less than 2, which OptimalBaselineRule needs"):
        allocate_rollouts(ESTIMATE, IDS, 8, 1, 14, OptimalBaselineRule("group"))


def test_bad_ratios_and_missing_success_rates_are_one_line():
    with pytest.raises(UserError, match=r"data\.rule\.score_ratio=0 must be positive"):
        OptimalBaselineRule(score_ratio=0)
    with pytest.raises(UserError, match=r"data\.rule\.score_ratio=2\.0 needs success rates"):
        allocate_rollouts(RATES, IDS, 16, 2, 14, OptimalBaselineRule(score_ratio=2.0))
