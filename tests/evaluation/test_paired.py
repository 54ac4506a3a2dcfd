import math
from itertools import product

import pytest
import torch

from dynamo_lightning.evaluation.intervals import share_interval
from dynamo_lightning.evaluation.paired import compare_paired, holm, join, paired_bootstrap, sign_flip_p_value


def brute_force(differences):
    observed = abs(sum(differences))
    flips = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product([1, -1], repeat=len(differences))
    ]
    return sum(abs(flip) >= observed - 1e-9 for flip in flips) / len(flips)


@pytest.mark.parametrize(
    "differences", [[1.0], [0.5, -0.25, 0.5], [0.1] * 6, [0.3, -0.3], [0.25, 0.5, -0.75, 1.0, 0.0]]
)
def test_sign_flip_is_exact_for_few_problems(differences):
    assert sign_flip_p_value(torch.tensor(differences)) == pytest.approx(brute_force(differences))


def test_sign_flip_of_many_problems_is_close_to_the_exact_one():
    values = torch.randn(16, generator=torch.Generator().manual_seed(3)) + 0.35
    assert sign_flip_p_value(values, num_flips=40_000) == pytest.approx(brute_force(values.tolist()), abs=0.01)


def test_no_difference_has_p_value_one():
    assert sign_flip_p_value(torch.zeros(5)) == 1.0
    assert sign_flip_p_value(torch.tensor([0.5] * 200)) == pytest.approx(1 / 10_001)


def test_runs_are_joined_by_problem_and_not_by_position():
    a, b = join([{"x": 1.0, "y": 2.0, "only here": 9.0}], [{"y": 20.0, "x": 10.0}])
    assert (a.tolist(), b.tolist()) == ([[1.0, 2.0]], [[10.0, 20.0]])
    found = compare_paired([{"x": 1.0, "y": 0.0}], [{"y": 1.0, "x": 1.0}])
    assert (found.num_problems, found.difference) == (2, 0.5)
    assert compare_paired([{"x": 1.0}], [{"y": 1.0}]) is None


def test_bootstrap_has_the_variance_of_the_difference():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 400, generator=generator, dtype=torch.float64)
    b = a + 0.1 * torch.randn(1, 400, generator=generator, dtype=torch.float64)
    resampled = paired_bootstrap(a, b, 20_000)
    assert float(resampled.std()) == pytest.approx(float((b - a).std(correction=0)) / 20, rel=0.03)
    assert torch.equal(resampled, paired_bootstrap(a, b, 20_000))


def test_bootstrap_of_several_runs_resamples_them_too():
    """Runs that differ by a constant: the variance of the mean of two draws of two runs is a half of theirs."""
    a, b = torch.zeros(2, 50, dtype=torch.float64), torch.tensor([[0.0], [0.2]], dtype=torch.float64).expand(2, 50)
    resampled = paired_bootstrap(a, b, 20_000)
    assert sorted({round(value, 9) for value in resampled.tolist()}) == [0.0, 0.1, 0.2]
    assert float(resampled.std()) == pytest.approx(0.1 / math.sqrt(2), rel=0.03)


def test_seeds_that_disagree_leave_no_certainty():
    """One of two seeds is far better at every problem: problems alone would call this certain."""
    base = {i: 0.0 for i in range(60)}
    better = {i: 1.0 for i in range(60)}
    alone = compare_paired([base], [better])
    assert alone.p_value < 0.001
    assert compare_paired([base, base], [better, base]).p_value > 0.2


def test_a_paired_test_finds_what_two_intervals_hide():
    """The same 100 problems of very different difficulty, one policy better by 5 points at each."""
    generator = torch.Generator().manual_seed(1)
    found, overlapping = 0, 0
    for _ in range(20):
        rates = torch.rand(100, generator=generator) * 0.9
        a, b = (torch.binomial(torch.full((100,), 32.0), r, generator) / 32 for r in (rates, rates + 0.05))
        (_, high), (low, _) = share_interval(a), share_interval(b)
        overlapping += low < high
        found += compare_paired([dict(enumerate(a.tolist()))], [dict(enumerate(b.tolist()))]).p_value < 0.05
    assert overlapping == 20
    assert found >= 18


def test_no_difference_is_found_about_as_often_as_the_level_says():
    generator = torch.Generator().manual_seed(2)
    hits = 0
    for _ in range(400):
        rates = torch.rand(12, generator=generator)
        a, b = (torch.binomial(torch.full((12,), 4.0), rates, generator) / 4 for _ in range(2))
        hits += sign_flip_p_value(b - a) < 0.05
    assert hits / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []
