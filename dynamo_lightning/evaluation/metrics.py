"""Metrics over several sampled responses per problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


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
        ValueError: If `k` < 1, if a problem has fewer than `k` samples, or if `c` is not within 0 … n.
    """
    if k < 1:
        raise ValueError(f"pass@k needs k of at least 1, got {k}")
    if num_samples.shape != num_correct.shape:
        raise ValueError(
            f"num_samples and num_correct differ in shape: {list(num_samples.shape)}, {list(num_correct.shape)}"
        )
    if num_samples.numel() and int(num_samples.min()) < k:
        raise ValueError(f"pass@{k} needs at least {k} samples of each problem, one has {int(num_samples.min())}")
    wrong = num_samples - num_correct
    if bool((wrong < 0).any()) or bool((num_correct < 0).any()):
        worst = int(torch.where((wrong < 0) | (num_correct < 0))[0][0])
        raise ValueError(f"{int(num_correct[worst])} correct of {int(num_samples[worst])} samples is impossible")
    attempts = torch.arange(k, dtype=torch.float64, device=num_samples.device)
    still_wrong = (wrong[:, None] - attempts).clamp(min=0) / (num_samples[:, None] - attempts)
    return 1 - still_wrong.prod(dim=1)


class PassAtK(Metric):
    """Mean pass@k over problems, with a confidence interval.

    The interval is the percentile bootstrap over problems: how far the mean would move if the benchmark's problems were
    drawn anew. It does not vanish with more samples per problem. The generator is seeded and the problems are sorted
    first, so it depends neither on their order nor on the number of processes.

    Args:
        k: Number of attempts, at least 1.
        num_bootstrap: Resamples of the benchmark.
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

    def __init__(self, k: int, num_bootstrap: int = 1000, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"pass@k needs k of at least 1, got {k}")
        if num_bootstrap < 1:
            raise ValueError(f"num_bootstrap must be at least 1, got {num_bootstrap}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
        self.k = k
        self.num_bootstrap = num_bootstrap
        self.confidence = confidence
        self.add_state("num_correct", default=[], dist_reduce_fx="cat")
        self.add_state("num_samples", default=[], dist_reduce_fx="cat")

    def update(self, num_correct: Tensor, num_samples: Tensor) -> None:
        """Adds problems.

        Args:
            num_correct: Right samples of each problem, `[num_problems]`, integers.
            num_samples: Samples of each problem, `[num_problems]`, integers, at least `k`.

        Raises:
            ValueError: If the numbers are impossible, see `pass_at_k`.
        """
        pass_at_k(num_samples, num_correct, self.k)  # fail at the problem, not at the end of the epoch
        self.num_correct.append(num_correct)
        self.num_samples.append(num_samples)

    def compute(self) -> dict[str, Tensor]:
        """Returns `mean`, `low` and `high`, scalars in [0, 1].

        Raises:
            ValueError: If no problem was added.
        """
        num_samples = dim_zero_cat(self.num_samples) if len(self.num_samples) else torch.empty(0)
        if not num_samples.numel():
            raise ValueError(f"pass@{self.k} has seen no problems")
        values = pass_at_k(num_samples.cpu(), dim_zero_cat(self.num_correct).cpu(), self.k).sort().values
        generator = torch.Generator().manual_seed(0)
        # one resample at a time: a matrix of all of them would be gigabytes for a large benchmark
        means = torch.stack(
            [
                values[torch.randint(len(values), (len(values),), generator=generator)].mean()
                for _ in range(self.num_bootstrap)
            ]
        )
        tail = (1 - self.confidence) / 2
        low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype))
        return {
            "mean": values.mean().float().to(self.device),
            "low": low.float().to(self.device),
            "high": high.float().to(self.device),
        }
