import math

import pytest
import torch

from dynamo_lightning.evaluation.intervals import (
    interval_of_average,
    mean_interval,
    share_interval,
    student_t_quantile,
)
from dynamo_lightning.evaluation.metrics import pass_at_k


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452), (499, 1.9647)],
)
def test_student_quantiles_agree_with_a_printed_table(degrees, expected):
    assert student_t_quantile(0.975, degrees) == pytest.approx(expected, rel=2e-3)
    assert student_t_quantile(0.025, degrees) == pytest.approx(-expected, rel=2e-3)


def test_share_interval_by_hand():
    """Ten problems, four with 1: m(1 − m) is both the sample's and the largest variance, n = 10 · 17 / (10 + 8)."""
    trials, t = 0.24 * 10 / ((10 * 0.24 + 8 * 0.24) / 17), 2.2622
    centre, half = 0.4 + t**2 / (2 * trials), t * math.sqrt(0.24 / trials + t**2 / (4 * trials**2))
    expected = [(centre - half) / (1 + t**2 / trials), (centre + half) / (1 + t**2 / trials)]
    assert list(share_interval(torch.tensor([1.0] * 4 + [0.0] * 6))) == pytest.approx(expected, abs=1e-4)


def test_nothing_solved_is_wilson_with_the_number_of_problems():
    low, high = share_interval(torch.zeros(30))
    assert (low, high) == pytest.approx((0.0, 2.0452**2 / (30 + 2.0452**2)), abs=1e-4)
    assert share_interval(torch.ones(30)) == pytest.approx((1 - high, 1.0))


def test_many_problems_give_the_normal_interval():
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = 1.96 * float(values.std()) / 5000**0.5
    assert share_interval(values) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=2e-5)


def test_mean_interval_by_hand():
    low, high = mean_interval(torch.tensor([10.0, 12.0, 14.0, 16.0]))
    half = 3.1824 * (20 / 3) ** 0.5 / 2
    assert (low, high) == pytest.approx((13 - half, 13 + half), rel=1e-3)
    assert mean_interval(torch.tensor([3.0])) == (3.0, 3.0)


def test_interval_of_an_average_by_hand():
    assert interval_of_average([(0.5, 0.2, 0.6), (0.1, 0.06, 0.4)]) == pytest.approx(
        (0.3 - math.hypot(0.3, 0.04) / 2, 0.3 + math.hypot(0.1, 0.3) / 2)
    )


@pytest.mark.parametrize("shape", [(0.05, 0.8), (0.1, 1.0), (0.2, 2.0), (0.3, 1.0)])
@pytest.mark.parametrize("num_problems", [10, 20, 30])
@pytest.mark.parametrize(("num_samples", "k"), [(4, 1), (32, 1), (8, 4), (32, 8)])
def test_intervals_of_few_hard_problems_cover_the_truth(shape, num_problems, num_samples, k):
    """Success rates drawn from Beta distributions with means from 6 to 23 %; 1,500 benchmarks each."""
    runs, generator = 1500, torch.Generator().manual_seed(num_problems)

    def draw(*size):
        # A Beta variable from two gamma variables, Marsaglia's rule for shapes below 1 is in torch.
        first, second = (torch._standard_gamma(torch.full(size, a), generator=generator) for a in shape)
        return first / (first + second).clamp(min=1e-30)

    truth = float((1 - (1 - draw(400_000).double()) ** k).mean())
    correct = torch.binomial(torch.full((runs, num_problems), float(num_samples)), draw(runs, num_problems), generator)
    values = pass_at_k(torch.full((runs * num_problems,), num_samples), correct.flatten().long(), k)
    ends = [share_interval(row) for row in values.reshape(runs, num_problems)]
    covered = sum(low <= truth <= high for low, high in ends) / runs
    assert covered >= 0.93
    # Not by being as wide as the scale.
    assert sum(high - low for low, high in ends) / runs < 0.56
