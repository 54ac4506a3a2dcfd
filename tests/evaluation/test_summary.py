"""From responses to a benchmark's numbers, by hand."""

import csv
import io
import json

import pytest
import torch
from rich.console import Console

from dynamo_lightning.evaluation.summary import MEAN, Sample, summarise
from dynamo_lightning.evaluation.table import print_results, write_results


def make_samples(source, problems):
    """Samples of problems, each a string of answers: `r` is right, `_` gives none and is cut off."""
    return [
        Sample(source, number, index, answer == "r", None if answer == "_" else answer, 10 * (index + 1), answer == "_")
        for number, answers in enumerate(problems)
        for index, answer in enumerate(answers)
    ]


def test_every_number_by_hand():
    results = summarise(make_samples("sums", ["rra_", "aabr"]), pass_ks=[1, 4], maj_ks=[1, 4])
    assert results.keys() == {"sums"}
    result = results["sums"]
    assert (result.num_problems, result.num_samples) == (2, 8)
    values = {name: estimate.value for name, estimate in result.metrics.items()}
    assert values == {
        "pass@1": pytest.approx((2 / 4 + 1 / 4) / 2),
        "pass@4": 1.0,
        "maj@1": pytest.approx((2 / 4 + 1 / 4) / 2),
        "maj@4": pytest.approx((1 + 0) / 2),
        "avg@4": pytest.approx(3 / 8),
        "length": 25.0,
        "truncated": pytest.approx(1 / 8),
    }
    for estimate in result.metrics.values():
        assert estimate.low <= estimate.value <= estimate.high
    # Two problems, one solved: nearly nothing is known.
    assert result.metrics["maj@4"].low < 0.01 and result.metrics["maj@4"].high > 0.99


def test_the_mean_weighs_benchmarks_equally():
    samples = make_samples("easy", ["rr"] * 9) + make_samples("hard", ["aa", "ra", "aa"])
    results = summarise(samples, [1, 2], [2])
    assert list(results) == ["easy", "hard", MEAN]
    assert results[MEAN].metrics["pass@1"].value == pytest.approx((1 + 1 / 6) / 2)
    assert results[MEAN].metrics["maj@2"].value == pytest.approx((1 + 1 / 6) / 2)
    assert results[MEAN].num_problems == 12
    easy, hard, mean = (results[name].metrics["pass@1"] for name in results)
    assert 0.6 < easy.low < easy.high == 1.0
    assert mean.high == pytest.approx(mean.value + (hard.high - hard.value) / 2)
    assert mean.low == pytest.approx(mean.value - ((1 - easy.low) ** 2 + (hard.value - hard.low) ** 2) ** 0.5 / 2)


def test_too_few_samples_name_the_benchmark():
    with pytest.raises(ValueError, match="benchmark sums: pass@3 needs at least 3 samples of each problem, one has 2"):
        summarise(make_samples("sums", ["rrr", "ra"]), [3], [])
    with pytest.raises(ValueError, match="benchmark sums: maj@3 needs at least 3"):
        summarise(make_samples("sums", ["ra"]), [], [3])


def test_problems_with_different_numbers_of_samples():
    results = summarise(make_samples("sums", ["rrr", "ra"]), [2], [])
    assert results["sums"].metrics["avg@n"].value == pytest.approx((1 + 0.5) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["pass@8", "maj@4", MEAN])
def test_intervals_cover_the_truth_about_as_often_as_they_say(metric):
    """Success rates are drawn anew in each of 200 benchmarks of 60 problems; the truth is that of 20,000 problems."""
    generator = torch.Generator().manual_seed(3)

    def benchmark(source, num_problems):
        rates = torch.rand(num_problems, generator=generator) ** 2
        draws = torch.rand(num_problems, 8, generator=generator) < rates[:, None]
        return make_samples(source, ["".join("r" if right else "a" for right in row) for row in draws.tolist()])

    name, sources = ("pass@8", ["a", "b"]) if metric == MEAN else (metric, ["a"])
    row = MEAN if metric == MEAN else "a"
    pass_ks, maj_ks = ([], [4]) if name == "maj@4" else ([8], [])
    truth = summarise(benchmark("a", 20_000), pass_ks, maj_ks)["a"].metrics[name].value
    hits, runs = 0, 200
    for _ in range(runs):
        samples = [sample for source in sources for sample in benchmark(source, 60)]
        estimate = summarise(samples, pass_ks, maj_ks)[row].metrics[name]
        hits += estimate.low <= truth <= estimate.high
    assert 0.90 <= hits / runs <= 0.99  # 0.95 ± 3 standard errors


def test_the_results_are_a_table_and_two_files(tmp_path):
    results = summarise(make_samples("sums", ["rra_"]) + make_samples("terms", ["raaa"]), [1], [])
    paths = write_results(tmp_path, results, {"model_name": "tiny"})
    assert [path.name for path in paths] == ["results.json", "results.csv"]
    saved = json.loads(paths[0].read_text())
    assert saved["settings"] == {"model_name": "tiny"}
    estimate = saved["results"]["sums"]["pass@1"]
    assert estimate["value"] == 0.5 and 0 <= estimate["low"] < 0.05 and 0.95 < estimate["high"] <= 1  # one problem
    rows = list(csv.DictReader(paths[1].open()))
    assert [(row["benchmark"], row["metric"]) for row in rows[:4]] == [
        ("sums", "pass@1"), ("sums", "avg@4"), ("sums", "length"), ("sums", "truncated")
    ]  # fmt: skip
    assert rows[0] | {"value": "0.5", "samples": "4"} == rows[0]
    output = io.StringIO()
    print_results(results, Console(file=output, width=80))
    for text in ("sums", "terms", "mean", "pass@1", "1 problems", "50.0", "length"):
        assert text in output.getvalue()
