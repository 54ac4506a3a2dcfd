"""Rules of other papers: their formulas by hand, and what they do with a budget."""

import itertools
from math import comb

import numpy as np
import pytest

from dynamo_lightning.allocation import Estimate, GVMRule, PilotCommitRule, ReinforceAdaRule, allocate_rollouts
from dynamo_lightning.errors import UserError

RATES = np.array([0.01, 0.3, 0.5, 0.7, 0.99])
ESTIMATE = Estimate(RATES, RATES * (1 - RATES), np.zeros(5, dtype=bool))
IDS = [1, 2, 3, 4, 5]


def test_pilot_commit_serves_prompts_within_the_thresholds_alike():
    sizes = allocate_rollouts(ESTIMATE, IDS, 40, 2, 20, PilotCommitRule())
    assert sizes.tolist() == [2, 12, 12, 12, 2]


def test_pilot_commit_skips_the_others_where_it_may():
    assert allocate_rollouts(ESTIMATE, IDS, 30, 0, 20, PilotCommitRule()).tolist() == [0, 10, 10, 10, 0]


def test_pilot_commit_goes_on_with_the_others_when_kept_prompts_are_full():
    assert allocate_rollouts(ESTIMATE, IDS, 44, 2, 12, PilotCommitRule()).tolist() == [4, 12, 12, 12, 4]
    assert allocate_rollouts(ESTIMATE, IDS, 20, 2, 12, PilotCommitRule(0.45, 0.54)).tolist() == [4] * 5


def still_sampled(p, n, positives, negatives):
    """By summing over the outcomes that have not ended sampling."""
    return sum(
        comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if k < positives or n - k < negatives
    )  # fmt: skip


@pytest.mark.parametrize(("positives", "negatives"), [(2, 2), (1, 0), (4, 4), (0, 3)])
def test_reinforce_ada_gains_are_the_chance_that_sampling_goes_on(positives, negatives):
    rule = ReinforceAdaRule(positives, negatives)
    previous = np.full(5, 1.0)
    for size in range(1, 20):
        gain = rule.marginal_gain(ESTIMATE, np.full(5, size))
        np.testing.assert_allclose(gain, [still_sampled(p, size, positives, negatives) for p in RATES], atol=1e-12)
        assert (gain <= previous + 1e-12).all()
        previous = gain


def test_reinforce_ada_maximizes_the_rollouts_that_sequential_sampling_would_draw():
    rule = ReinforceAdaRule()

    def expected(sizes):
        return sum(still_sampled(p, n, 2, 2) for p, size in zip(RATES, sizes, strict=True) for n in range(2, size))

    sizes = allocate_rollouts(ESTIMATE, IDS, 24, 2, 10, rule)
    every = (n for n in itertools.product(range(2, 11), repeat=5) if sum(n) == 24)
    assert expected(sizes) == pytest.approx(max(expected(n) for n in every))
    assert sizes[0] > sizes[2] < sizes[4]  # hard and easy prompts wait the longest


def test_gvm_weights_by_hand():
    weights = GVMRule(alpha=0.02, beta=3.0).weights(ESTIMATE)
    np.testing.assert_allclose(weights, 1 / np.sqrt(RATES + 0.02 / RATES**2))


def test_gvm_prefers_hard_prompts_down_to_the_penalty():
    rates = np.array([1e-4, 0.03, 0.3, 0.9])
    estimate = Estimate(rates, rates * (1 - rates), np.zeros(4, dtype=bool))
    sizes = allocate_rollouts(estimate, [1, 2, 3, 4], 60, 2, 40, GVMRule())
    assert sizes.sum() == 60 and sizes[1] == sizes.max() and sizes[0] == sizes.min()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PilotCommitRule(0.6, 0.4), r"lower \+ upper < 1, got 0\.6 and 0\.4"),
        (lambda: ReinforceAdaRule(0, 0), "not both 0, got 0 and 0"),
        (lambda: GVMRule(alpha=-1), r"alpha ≥ 0 and beta ≥ 1, got -1 and 2\.0"),
    ],
)
def test_impossible_options_are_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()
