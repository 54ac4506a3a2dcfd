"""The shipped tables show what is claimed of the logit filter, and the benchmark still makes them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shipped():
    return json.loads((ROOT / "benchmarks" / "results" / "allocation.json").read_text())


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("benchmark_allocation", ROOT / "benchmarks" / "allocation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drift_cells(shipped):
    """Ratio of each estimator under `rloo`, for each cell."""
    cells = {}
    for row in shipped["drift"]:
        if row["rule"] == "rloo":
            cells.setdefault((row["pool"], row["movement"], row["rise"]), {})[row["estimator"]] = row
    return cells


def test_the_drift_table_is_complete(shipped):
    cells = drift_cells(shipped)
    assert len(cells) == 10
    arms = {
        "beta_posterior_32",
        "beta_posterior_100",
        "arcsine_kalman",
        "paper_bernoulli",
        "logit_filter",
        "oracle",
    }
    assert all(set(rows) == arms for rows in cells.values())
    assert {row["rule"] for row in shipped["drift"]} == {"rloo", "neyman", "proportional", "signal"}
    for row in (*shipped["drift"], *shipped["one_epoch"], *shipped["population"]):
        assert row["low"] <= row["ratio"] <= row["high"]


def test_the_filter_is_never_worse_than_the_best_half_life_by_more_than_a_hundredth(shipped):
    for cell, rows in drift_cells(shipped).items():
        best = min(rows["beta_posterior_32"]["ratio"], rows["beta_posterior_100"]["ratio"])
        assert rows["logit_filter"]["ratio"] <= best + 0.01, cell


def test_the_filter_wins_clearly_where_all_prompts_improve(shipped):
    for (_, _, rise), rows in drift_cells(shipped).items():
        best = min((rows["beta_posterior_32"], rows["beta_posterior_100"]), key=lambda row: row["ratio"])
        if rise > 0:
            assert rows["logit_filter"]["high"] < best["low"] + 0.005
            assert rows["logit_filter"]["ratio"] < best["ratio"] - 0.015


def test_the_filter_follows_the_shape_of_the_pool(shipped):
    rows = {(row["pool"], row["history"], row["estimator"]): row["ratio"] for row in shipped["population"]}
    for history in (16, 48):
        for pool in ("two modes", "three modes"):  # a Beta distribution has no such shape
            assert rows[pool, history, "logit_filter"] < rows[pool, history, "beta_posterior_32"] - 0.02
        for pool in ("N(-1,3)", "Beta(.2,.2)"):  # and where it has, the free shape costs next to nothing
            assert rows[pool, history, "logit_filter"] < rows[pool, history, "beta_posterior_32"] + 0.006


def test_without_a_pilot_a_single_epoch_is_allocated_equally(shipped):
    for row in shipped["one_epoch"]:
        if row["pilot"] == 0 and row["estimator"] != "oracle":
            assert row["ratio"] == 1.0


def test_the_benchmark_makes_such_tables_and_keeps_the_others(benchmark, monkeypatch, capsys, tmp_path):
    pools = benchmark.drifting_pools
    monkeypatch.setattr(pools, "REPLICATIONS", 2)
    monkeypatch.setitem(pools.T_QUANTILES, 8, 2.365)
    monkeypatch.setattr(pools, "POOLS", {name: pools.POOLS[name] for name in ("N(-1,3)", "two modes")})
    monkeypatch.setattr(pools, "CELLS", [("two modes", "all alike", 3.0)])
    train = pools.train
    monkeypatch.setattr(pools, "train", lambda *arguments: train(*arguments, iterations=40))
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"cost": [], "variance": []}))
    monkeypatch.setattr(benchmark, "print_variance", lambda results: None)
    monkeypatch.setattr("sys.argv", ["allocation.py", "--tables", "drift", "population", "--json", str(path)])
    benchmark.main()
    results = json.loads(path.read_text())
    assert set(results) == {"cost", "variance", "drift", "population"}
    assert len(results["drift"]) == 7 and len(results["population"]) == 16
    shown = capsys.readouterr().out
    assert "Table drift" in shown and "Table population" in shown


def test_all_arms_of_a_cell_see_the_same_pool(benchmark):
    first = [
        benchmark.drifting_pools.train(("N(-1,3)", "all alike", 3.0), estimator, "rloo", 0, iterations=36)[0]
        for estimator in ("beta_posterior_32", "logit_filter")
    ]
    assert first == pytest.approx([1.0, 1.0], abs=0.001)  # in the first epoch every prompt is unseen
