"""Variance of the gradient as it was used, and the noise scale: against enumeration and simulation."""

import itertools
from dataclasses import astuple

import numpy as np
import pytest
import torch

from dynamo_lightning.losses.advantages import RLOO, weighted_leave_one_out
from dynamo_lightning.measure.used_advantage import VarianceSplit, noise_hint, used_contribution, variance_split

PROBS = np.array([0.4, 0.3, 0.2, 0.1])
RIGHT = np.array([1.0, 0.0, 0.0, 1.0])
SCORES = np.eye(4) - PROBS
SQUARES = (SCORES**2).sum(1)
GRADIENT = (PROBS * RIGHT) @ SCORES


def leave_one_out(rewards, weights):
    return rewards - RLOO()(rewards, torch.zeros(len(rewards), dtype=torch.int64)).double()


def weighted(rewards, weights):
    return weighted_leave_one_out(rewards, weights, torch.zeros(len(rewards), dtype=torch.int64), 1)


def told(rewards, weights):
    return torch.full_like(rewards, 0.4)


def enumerate_groups(size, baseline):
    """Exact variance of the prompt's gradient, and the expectation of its estimate."""
    square = estimate = 0.0
    for group in itertools.product(range(4), repeat=size):
        rows, chance = np.array(group), PROBS[list(group)].prod()
        rewards = torch.from_numpy(RIGHT[rows])
        advantages = (rewards - baseline(rewards, torch.from_numpy(SQUARES[rows]))).numpy()
        gradient, variance = used_contribution(advantages, SCORES[rows])
        square, estimate = square + chance * gradient @ gradient, estimate + chance * variance
    return square - GRADIENT @ GRADIENT, estimate


def test_estimate_is_unbiased_for_a_baseline_that_was_known_before():
    variance, estimate = enumerate_groups(3, told)
    assert estimate == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("size", [3, 5])
def test_leave_one_out_is_underestimated_by_the_stated_amount(size):
    variance, estimate = enumerate_groups(size, leave_one_out)
    assert variance - estimate == pytest.approx(GRADIENT @ GRADIENT / (size - 1) ** 2, rel=1e-5)


def test_the_estimate_of_a_weighted_baseline_is_close_and_never_too_large():
    shares = [estimate / variance for variance, estimate in (enumerate_groups(size, weighted) for size in (4, 6))]
    assert 0.7 < shares[0] < shares[1] < 1 and shares[1] > 0.88


def test_noise_scale_is_the_batch_in_which_noise_and_gradient_are_equally_long():
    """Groups of 8 with a known mean and covariance: tr Σ per group 6, ‖∇J‖² 4 + 1, so 8 · 6/5 rollouts."""
    rng = np.random.default_rng(0)
    gradients = np.array([2.0, 1.0, 0.0]) + rng.normal(size=(400, 25, 3)) * np.sqrt([1.0, 2.0, 3.0])
    splits = [variance_split([(g, 0.0, 0.0, 0.0, False) for g in batch], 8.0) for batch in gradients]
    assert VarianceSplit.pooled(splits).noise_scale() == pytest.approx(8 * 6 / 5, rel=0.03)
    assert np.mean([split.signal for split in splits]) == pytest.approx(5.0, rel=0.02)
    assert np.mean([split.noise for split in splits]) == pytest.approx(48.0, rel=0.02)


def test_without_a_gradient_the_signal_is_zero_on_average_and_no_scale_is_claimed():
    gradients = np.random.default_rng(1).normal(size=(2000, 10, 2))
    splits = [variance_split([(g, 0.0, 0.0, 0.0, False) for g in batch], 4.0) for batch in gradients]
    assert abs(np.mean([split.signal for split in splits])) < 0.01
    assert VarianceSplit(noise=3.0, signal=-0.1).noise_scale() is None


def test_split_by_hand():
    zero = np.zeros(2)
    split = variance_split([(zero, 1.0, 2.0, 4.0, False), (zero, 0.5, 3.0, 5.0, True)], 8.0)
    assert astuple(split) == (1.5, 2.0, 4.0, 3.0, 5.0, 0.0, 0.0)
    assert split.ratios() == {
        "alloc/total_variance_ratio": 1.5 / 9,
        "alloc/baseline_variance_ratio": 1.5 / 5,
        "alloc/placing_variance_ratio": 0.5,
        "alloc/cold_start_variance_ratio": 0.6,
    }


@pytest.mark.parametrize(("rollouts", "kind"), [(1000, "above"), (400, "near"), (30, "near"), (20, "below")])
def test_a_word_about_the_batch(rollouts, kind):
    found, text = noise_hint(rollouts, 100.0)
    assert found == kind and f"about 100 rollouts, the batch has {rollouts}" in text
