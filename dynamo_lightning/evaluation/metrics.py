"""Metrics over several sampled responses per problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dynamo_lightning.errors import UserError
from dynamo_lightning.evaluation.intervals import share_interval


def pass_at_k(num_samples: Tensor, num_correct: Tensor, k: int) -> Tensor:
    """Unbiased estimate of the probability that at least one of `k` fresh samples is right.

        pass@k = 1 − C(n − c, k) / C(n, k) = 1 − Π_{j=0}^{k−1} (n − c − j) / (n − j)

    over `n` samples of which `c` are right (Chen et al., arXiv 2107.03374, eq. 1). The product neither overflows nor
    cancels; a factor below zero means fewer than `k` wrong samples, for which the estimate is 1.

    Args:
        num_samples: `n` of each problem, `[num_problems]`, integers.
        num_correct: `c` of each problem, `[num_problems]`, integers, 0 ≤ c ≤ n.
        k: Number of attempts, at least 1.

    Returns:
        The estimate for each problem, `[num_problems]`, float64 in [0, 1].

    Raises:
        UserError: If `k` < 1, if a problem has fewer than `k` samples, or if `c` is not within 0 … n.
    """
    if k < 1:
        raise UserError(f"pass@k needs k of at least 1, got {k}")
    if num_samples.shape != num_correct.shape:
        raise UserError(
            f"num_samples and num_correct differ in shape: {list(num_samples.shape)}, {list(num_correct.shape)}"
        )
    if num_samples.numel() and int(num_samples.min()) < k:
        raise UserError(f"pass@{k} needs at least {k} samples of each problem, one has {int(num_samples.min())}")
    wrong = num_samples - num_correct
    if bool((wrong < 0).any()) or bool((num_correct < 0).any()):
        worst = int(torch.where((wrong < 0) | (num_correct < 0))[0][0])
        raise UserError(f"{int(num_correct[worst])} correct of {int(num_samples[worst])} samples is impossible")
    attempts = torch.arange(k, dtype=torch.float64, device=num_samples.device)
    still_wrong = (wrong[:, None] - attempts).clamp(min=0) / (num_samples[:, None] - attempts)
    return 1 - still_wrong.prod(dim=1)


def majority_at_k(num_correct: int, num_wrong: Sequence[int], num_silent: int, k: int) -> float:
    """Probability that the right answer wins a majority vote of `k` of the samples, drawn without replacement.

        maj@k = Σ_{x ≥ 1} Σ_t C(c, x) · W(x, t, k − x) / ((1 + t) · C(n, k))

    `W(x, t, m)` is the number of ways to draw `m` of the other samples so that no wrong answer has more than `x` of
    them and `t` have exactly `x`: a tie is decided by lot. Exact, as integers; the mean over all `k` of `n` subsets.

    Args:
        num_correct: `c`, samples with the right answer, whatever its spelling.
        num_wrong: Samples of each different wrong answer, `[num_answers]`.
        num_silent: Samples without an answer: they are drawn like the others but do not vote.
        k: Number of votes, at least 1.

    Raises:
        UserError: If `k` < 1 or there are fewer than `k` samples.
    """
    num_samples = num_correct + sum(num_wrong) + num_silent
    if not 1 <= k <= num_samples:
        raise UserError(f"maj@{k} needs at least {max(k, 1)} samples of each problem and k ≥ 1, one has {num_samples}")
    return _majority(num_correct, tuple(sorted(num_wrong)), num_silent, k)


@lru_cache(maxsize=4096)
def _majority(num_correct: int, num_wrong: tuple[int, ...], num_silent: int, k: int) -> float:
    """As `majority_at_k`; most problems of a benchmark have the same few counts."""
    won = 0.0
    for votes in range(1, min(num_correct, k) + 1):
        # ways[ties][drawn] to draw among the answers so far, and of these the ones that tie with `votes`
        ways = {0: [math.comb(num_silent, drawn) for drawn in range(k - votes + 1)]}
        for size in num_wrong:
            longer: dict[int, list[int]] = {}
            for ties, counts in ways.items():
                for taken in range(min(votes, size, k - votes) + 1):
                    new = longer.setdefault(ties + (taken == votes), [0] * (k - votes + 1))
                    factor = math.comb(size, taken)
                    for drawn, count in enumerate(counts[: k - votes + 1 - taken]):
                        new[drawn + taken] += factor * count
            ways = longer
        shares = sum(counts[k - votes] / (1 + ties) for ties, counts in ways.items())
        won += math.comb(num_correct, votes) * shares
    return won / math.comb(num_correct + sum(num_wrong) + num_silent, k)


class PassAtK(Metric):
    """Mean pass@k over problems, with a confidence interval.

    The interval, that of `share_interval`, tells how far the mean would move if the benchmark's problems were drawn
    anew. It does not vanish with more samples per problem.

    Args:
        k: Number of attempts, at least 1.
        confidence: Probability mass between `low` and `high`, in (0, 1).
        **kwargs: See `torchmetrics.Metric`.

    Example:
        >>> metric = PassAtK(k=1)
        >>> metric.update(num_correct=torch.tensor([1, 4]), num_samples=torch.tensor([4, 4]))
        >>> round(metric.compute()["mean"].item(), 3)
        0.625
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    num_correct: list[Tensor]
    num_samples: list[Tensor]

    def __init__(self, k: int, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise UserError(f"pass@k needs k of at least 1, got {k}")
        if not 0 < confidence < 1:
            raise UserError(f"confidence must lie between 0 and 1, got {confidence}")
        self.k = k
        self.confidence = confidence
        self.add_state("num_correct", default=[], dist_reduce_fx="cat")
        self.add_state("num_samples", default=[], dist_reduce_fx="cat")

    def update(self, num_correct: Tensor, num_samples: Tensor) -> None:
        """Adds problems.

        Args:
            num_correct: Right samples of each problem, `[num_problems]`, integers.
            num_samples: Samples of each problem, `[num_problems]`, integers, at least `k`.

        Raises:
            UserError: If the numbers are impossible, see `pass_at_k`.
        """
        pass_at_k(num_samples, num_correct, self.k)  # fail at the problem, not at the end of the epoch
        self.num_correct.append(num_correct)
        self.num_samples.append(num_samples)

    def compute(self) -> dict[str, Tensor]:
        """Returns `mean`, `low` and `high`, scalars in [0, 1].

        Raises:
            UserError: If no problem was added.
        """
        num_samples = dim_zero_cat(self.num_samples) if len(self.num_samples) else torch.empty(0)
        if not num_samples.numel():
            raise UserError(f"pass@{self.k} has seen no problems")
        values = pass_at_k(num_samples.cpu(), dim_zero_cat(self.num_correct).cpu(), self.k)
        low, high = share_interval(values, self.confidence)
        numbers = {"mean": float(values.mean()), "low": low, "high": high}
        return {name: torch.tensor(number, dtype=torch.float32, device=self.device) for name, number in numbers.items()}
