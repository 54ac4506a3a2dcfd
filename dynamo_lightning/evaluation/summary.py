"""From sampled responses to the numbers of a benchmark, each with a confidence interval over its problems."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dynamo_lightning.errors import UserError
from dynamo_lightning.evaluation.intervals import interval_of_average, mean_interval, share_interval
from dynamo_lightning.evaluation.metrics import majority_at_k, pass_at_k

MEAN = "mean"
"""Name of the row that averages the benchmarks, each with the same weight."""


@dataclass(frozen=True)
class Sample:
    """The part of one scored response that summaries need."""

    source: str
    """Name of the benchmark."""
    prompt_id: int
    sample_index: int
    correct: bool
    vote: str | None
    """Its final answer in one spelling; None if it gives none."""
    response_length: int
    """Tokens."""
    truncated: bool

    @property
    def key(self) -> tuple[int, int]:
        """`(prompt_id, sample_index)`."""
        return self.prompt_id, self.sample_index


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BenchmarkResult:
    """The numbers of one benchmark, or of their mean."""

    num_problems: int
    num_samples: int
    """Responses, of all problems."""
    metrics: Mapping[str, Estimate]
    """By name: `pass@k`, `maj@k`, `avg@n`, `length` (tokens), `truncated` (share)."""


def summarise(samples: Iterable[Sample], pass_ks: Sequence[int], maj_ks: Sequence[int]) -> dict[str, BenchmarkResult]:
    """Return the results by benchmark, in the order in which they appear; with several, also their `mean`.

    - pass@k and maj@k are the unbiased estimates from all n samples of a problem. All right answers are one vote, for
      they equal the reference; wrong ones are told apart by their spelling, which favours the right answer a little
      where one wrong answer is spelled in two ways.
    - avg@n is the mean success of the n samples, which is what pass@1 estimates: the two are the same number.
    - Intervals tell how far a number would move if the problems were drawn anew: Wilson's with an effective number of
      problems for shares (`share_interval`), Student's for lengths; that of the mean over benchmarks combines theirs
      (`interval_of_average`).

    Args:
        samples: Scored responses; each problem's, in any order.
        pass_ks: The k of every pass@k.
        maj_ks: The k of every maj@k.

    Raises:
        UserError: If a problem has fewer samples than a k; the message names the benchmark.
    """
    problems: dict[str, dict[int, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        problems[sample.source][sample.prompt_id].append(sample)
    results: dict[str, BenchmarkResult] = {}
    for source, groups in problems.items():
        try:
            values = _problem_values(list(groups.values()), pass_ks, maj_ks)
        except ValueError as error:
            raise UserError(f"benchmark {source}: {error}") from None
        metrics = {name: _estimate(name, value) for name, value in values.items()}
        results[source] = BenchmarkResult(len(groups), sum(map(len, groups.values())), metrics)
    if len(results) > 1:
        results[MEAN] = _mean_result(results)
    return results


def _problem_values(
    groups: Sequence[Sequence[Sample]], pass_ks: Sequence[int], maj_ks: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Every metric of every problem, `[num_problems]` each."""
    num_samples = torch.tensor([len(group) for group in groups])
    num_correct = torch.tensor([sum(sample.correct for sample in group) for group in groups])
    values = {f"pass@{k}": pass_at_k(num_samples, num_correct, k) for k in pass_ks}
    values |= {f"maj@{k}": torch.tensor([_majority_of(group, k) for group in groups]) for k in maj_ks}
    sizes = {len(group) for group in groups}
    values[f"avg@{sizes.pop()}" if len(sizes) == 1 else "avg@n"] = num_correct / num_samples

    def mean(field: Callable[[Sample], float]) -> torch.Tensor:
        return torch.tensor([sum(map(field, group)) / len(group) for group in groups], dtype=torch.float64)

    values["length"] = mean(lambda sample: sample.response_length)
    values["truncated"] = mean(lambda sample: sample.truncated)
    return values


def _majority_of(group: Sequence[Sample], k: int) -> float:
    """maj@k of one problem."""
    num_correct = sum(sample.correct for sample in group)
    wrong = Counter(sample.vote for sample in group if not sample.correct)
    num_silent = wrong.pop(None, 0)
    return majority_at_k(num_correct, list(wrong.values()), num_silent, k)


def _estimate(name: str, values: torch.Tensor) -> Estimate:
    low, high = mean_interval(values) if name == "length" else share_interval(values)
    return Estimate(float(values.double().mean()), low, high)


def _mean_result(results: Mapping[str, BenchmarkResult]) -> BenchmarkResult:
    """The mean over benchmarks of what they all have."""
    shared = set.intersection(*(set(result.metrics) for result in results.values()))
    metrics = {}
    for name in (name for name in next(iter(results.values())).metrics if name in shared):
        estimates = [result.metrics[name] for result in results.values()]
        low, high = interval_of_average([(each.value, each.low, each.high) for each in estimates])
        metrics[name] = Estimate(sum(each.value for each in estimates) / len(estimates), low, high)
    num_problems = sum(result.num_problems for result in results.values())
    return BenchmarkResult(num_problems, sum(result.num_samples for result in results.values()), metrics)


def as_plain(results: Mapping[str, BenchmarkResult]) -> dict[str, Any]:
    """The results as nested dictionaries of numbers, for JSON."""
    return {
        source: {
            "problems": result.num_problems,
            "samples": result.num_samples,
            **{name: vars(estimate) for name, estimate in result.metrics.items()},
        }
        for source, result in results.items()
    }
