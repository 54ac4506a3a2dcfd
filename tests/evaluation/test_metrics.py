from collections import Counter
from itertools import combinations

import pytest
import torch

from dynamo_lightning.evaluation.metrics import PassAtK, majority_at_k, pass_at_k


def tensors(*lists):
    return [torch.tensor(values) for values in lists]


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for k in range(1, n + 1):
        for c in range(n + 1):
            subsets = list(combinations([True] * c + [False] * (n - c), k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(*tensors([n], [c]), k).item() == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_exact_for_many_samples():
    # 1 − C(1000 − 1, 512)/C(1000, 512) = 512/1000
    assert pass_at_k(*tensors([1000], [1]), 512).item() == pytest.approx(0.512, abs=1e-12)


def test_pass_at_k_is_unbiased():
    torch.manual_seed(0)
    correct = torch.binomial(torch.full((20_000,), 8.0), torch.tensor(0.2)).long()
    mean = pass_at_k(torch.full_like(correct, 8), correct, 4).mean().item()
    assert mean == pytest.approx(1 - 0.8**4, abs=0.006)


def test_impossible_counts_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="at least 8 samples of each problem, one has 4"):
        pass_at_k(*tensors([8, 4], [1, 1]), 8)
    with pytest.raises(ValueError, match="5 correct of 4"):
        pass_at_k(*tensors([4, 4], [4, 5]), 1)
    with pytest.raises(ValueError, match="got 0"):
        pass_at_k(*tensors([4], [1]), 0)
    with pytest.raises(ValueError, match="no problems"):
        PassAtK(1).compute()


def test_metric_is_the_mean_over_problems_of_all_updates():
    metric = PassAtK(k=2)
    metric.update(*tensors([1, 0], [4, 4]))
    metric.update(*tensors([3], [3]))
    assert metric.compute()["mean"].item() == pytest.approx((0.5 + 0 + 1) / 3)


def test_interval_depends_neither_on_order_nor_on_how_problems_are_split():
    correct, samples = tensors(list(range(9)), [8] * 9)
    whole, parts = PassAtK(k=2), PassAtK(k=2)
    whole.update(correct, samples)
    for index in (7, 0, 3, 1, 8, 2, 6, 5, 4):
        parts.update(correct[index : index + 1], samples[index : index + 1])
    assert whole.compute() == parts.compute()
    assert whole.compute()["low"] < whole.compute()["mean"] < whole.compute()["high"]


def test_interval_of_equal_problems_is_no_point():
    """Three problems of the same success rate say little about others."""
    metric = PassAtK(k=1)
    metric.update(*tensors([2, 2, 2], [4, 4, 4]))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found["low"] < 0.2 < found["mean"] == 0.5 < 0.8 < found["high"]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    hits, runs, truth = 0, 200, 0.3  # problems' success rates are uniform on (0, 0.6)
    for _ in range(runs):
        rates = 0.6 * torch.rand(60, generator=generator)
        correct = torch.binomial(torch.full((60,), 4.0), rates, generator=generator).long()
        metric = PassAtK(k=1, confidence=0.9)
        metric.update(correct, torch.full_like(correct, 4))
        interval = metric.compute()
        hits += bool(interval["low"] <= truth <= interval["high"])
    assert 0.83 <= hits / runs <= 0.96  # 0.9 ± 3 standard errors


def majority_by_enumeration(answers, k):
    """The share of subsets in which the right answer "r" has most votes; ties count for their share, None is silent."""
    won = 0.0
    subsets = list(combinations(answers, k))
    for subset in subsets:
        votes = Counter(answer for answer in subset if answer is not None)
        most = [answer for answer, count in votes.items() if count == max(votes.values())]
        won += ("r" in most) / len(most) if most else 0.0
    return won / len(subsets)


@pytest.mark.parametrize(
    "answers",
    ["r", "a", "rab", "rra", "rrab_", "aabbrr", "rrrabc__", "aaabbrr_", "aabbccrr", "____r", "rrrraaaab"],
)
def test_majority_at_k_is_the_share_of_subsets_in_which_the_right_answer_wins(answers):
    answers = [None if answer == "_" else answer for answer in answers]
    counts = Counter(answers)
    num_correct, num_silent = counts.pop("r", 0), counts.pop(None, 0)
    for k in range(1, len(answers) + 1):
        expected = majority_by_enumeration(answers, k)
        assert majority_at_k(num_correct, list(counts.values()), num_silent, k) == pytest.approx(expected, abs=1e-12)


def test_majority_of_one_is_pass_at_one_and_of_none_is_an_error():
    assert majority_at_k(3, [2, 1], 2, 1) == pytest.approx(3 / 8)
    for k in (0, 9):
        with pytest.raises(
            ValueError, match=rf"maj@{k} needs at least .* samples of each problem and k ≥ 1, one has 8"
        ):
            majority_at_k(3, [2, 1], 2, k)


def test_majority_at_k_is_unbiased():
    """Voters answer right with 0.4, one wrong answer with 0.35, another with 0.15, nothing with 0.1."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.4, 0.35, 0.15, 0.1])

    def draw(runs, n):
        return torch.multinomial(shares, runs * n, replacement=True, generator=generator).reshape(runs, n)

    def estimates(n):
        for row in draw(4000, n).tolist():
            counts = Counter(row)
            yield majority_at_k(counts[0], [counts[1], counts[2]], counts[3], 5)

    fresh = sum(
        majority_by_enumeration(["rab"[i] if i < 3 else None for i in row], 5) for row in draw(20000, 5).tolist()
    )
    from_twelve = list(estimates(12))
    assert sum(from_twelve) / len(from_twelve) == pytest.approx(fresh / 20000, abs=0.012)


@pytest.mark.parametrize("k", [4, 32])
def test_pass_at_k_agrees_with_fresh_attempts(k):
    """The estimate from 40 samples against drawing k fresh samples again and again."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.rand(20, generator=generator) ** 4
    fresh = (torch.rand(4000, 20, k, generator=generator) < rates[None, :, None]).any(-1).double().mean()
    correct = torch.binomial(torch.full((2000, 20), 40.0), rates.expand(2000, 20), generator=generator).long().flatten()
    estimated = pass_at_k(torch.full_like(correct, 40), correct, k).mean()
    assert estimated.item() == pytest.approx(fresh.item(), abs=0.005)
