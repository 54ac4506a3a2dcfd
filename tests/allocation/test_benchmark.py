"""The shipped table shows what is claimed of allocation, and the benchmark still makes it."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRIORS = ("U(0,1)", "Beta(.5,.5)", "Beta(.2,.2)", "Beta(.3,1.2)")
ARMS = {
    ("beta_posterior", "rloo"),
    ("arcsine_kalman", "rloo"),
    ("paper_bernoulli", "rloo"),
    ("paper_bernoulli", "proportional"),
    ("true_prior", "rloo"),
    ("random_matched", "rloo"),
    ("oracle", "rloo"),
}


@pytest.fixture(scope="module")
def shipped():
    return json.loads((ROOT / "benchmarks" / "results" / "allocation.json").read_text())


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_allocation", ROOT / "benchmarks" / "allocation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(results, estimator, **wanted):
    rows = [row for row in results["variance"] if row["estimator"] == estimator and row["rule"] == "rloo"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_the_table_is_complete(shipped):
    seen = {
        (r["prior"], tuple(r["bounds"]), r["history"], r["drift"], r["estimator"], r["rule"])
        for r in shipped["variance"]
    }
    assert seen == {
        (prior, bounds, history, drift, *arm)
        for prior in PRIORS
        for bounds in ((8, 24), (4, 32), (2, 64))
        for history in (16, 48)
        for drift in (0, 1)
        for arm in ARMS
    }
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in shipped["variance"])


def test_the_beta_posterior_beats_equal_groups_in_every_cell(shipped):
    assert len(cells(shipped, "beta_posterior")) == 48
    assert all(row["high"] < 1 for row in cells(shipped, "beta_posterior"))


def test_the_beta_posterior_reaches_its_targets(shipped):
    (few,) = cells(shipped, "beta_posterior", prior="Beta(.2,.2)", bounds=[2, 64], history=16, drift=0)
    (many,) = cells(shipped, "beta_posterior", prior="Beta(.2,.2)", bounds=[2, 64], history=48, drift=0)
    assert few["ratio"] <= 0.73 and many["ratio"] <= 0.66


def test_a_better_prior_would_add_next_to_nothing(shipped):
    for fitted, true in zip(cells(shipped, "beta_posterior"), cells(shipped, "true_prior"), strict=True):
        assert abs(fitted["ratio"] - true["ratio"]) < 0.005


def test_sizes_dealt_out_at_random_gain_nothing(shipped):
    assert all(row["low"] > 1 for row in cells(shipped, "random_matched"))


def test_4096_prompts_are_allocated_in_20_milliseconds_at_most(shipped):
    (row,) = [row for row in shipped["cost"] if (row["num_prompts"], row["budget"]) == (4096, 65_536)]
    assert row["milliseconds"] <= 20
    assert row["bytes_per_visited_prompt"] == 48


def test_the_benchmark_makes_such_a_table(benchmark, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "NUM_DRAWS", 2)
    monkeypatch.setattr("sys.argv", ["allocation.py", "--json", str(tmp_path / "new" / "table.json")])
    benchmark.main()
    results = json.loads((tmp_path / "new" / "table.json").read_text())
    assert len(results["variance"]) == 48 * len(ARMS)
    assert set(results) == {"variance", "cost"}
    shown = capsys.readouterr().out
    assert all(f"{prior}, sizes [2, 64]" in shown for prior in PRIORS)
