import io
import json
import math
import struct

import pytest
from rich.console import Console

from dynamo_lightning.runs.commands import follow_ups
from dynamo_lightning.runs.comparison import compare
from dynamo_lightning.runs.curves import draw_curves
from dynamo_lightning.runs.report import report
from dynamo_lightning.runs.summary import write_summary
from dynamo_lightning.runs.table import print_summary

SUMMARY = {
    "status": "finished",
    "iterations": 40,
    "before": {"val/toy/pass@1": 0.25, "val/toy/pass@1_low": 0.2, "val/toy/pass@1_high": 0.3},
    "after": {"val/toy/pass@1": 0.75, "val/toy/pass@1_low": 0.7, "val/toy/pass@1_high": 0.8},
    "validated_at": 40,
    "seconds": {"generate": 60.0, "update": 40.0},
    "final": {"reward": 0.5, "alloc/predicted_variance_ratio": 0.8},
    "commands": follow_ups("/runs/a b/config.yaml", "/runs/a b/last.ckpt", "/runs/a b/export", "test"),
}


def printed(function, *arguments, width=120):
    console = Console(file=io.StringIO(), width=width)
    function(*arguments, console=console)
    return console.file.getvalue()


def test_table_tells_before_and_after_with_their_intervals():
    text = printed(print_summary, SUMMARY)
    row = next(line for line in text.splitlines() if "toy/pass@1" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "toy/pass@1",
        "0.250 [0.200, 0.300]",
        "0.750 [0.700, 0.800]",
        "+0.500",
    ]
    assert "generate 60.0 (60%), update 40.0 (40%)" in text
    assert "validated at" not in text


def test_commands_are_printed_on_one_line_each_however_narrow_the_terminal():
    lines = printed(print_summary, SUMMARY, width=40).splitlines()
    state = "--config '/runs/a b/config.yaml' --ckpt_path '/runs/a b/last.ckpt'"
    assert f"resume   python -m dynamo_lightning fit {state}" in lines
    assert f"evaluate python -m dynamo_lightning test {state}" in lines
    assert f"export   python -m dynamo_lightning export {state} --output_dir '/runs/a b/export'" in lines


def test_paths_below_the_working_folder_are_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = follow_ups(f"{tmp_path}/config.yaml", f"{tmp_path}/x.ckpt", f"{tmp_path}/run", "test")["resume"]
    assert command == "python -m dynamo_lightning fit --config config.yaml --ckpt_path x.ckpt"


def test_old_validation_and_missing_one_are_pointed_out():
    assert "validated at iteration 30 of 40" in printed(print_summary, SUMMARY | {"validated_at": 30})
    text = printed(print_summary, SUMMARY | {"before": None, "after": None, "status": "interrupted by X"})
    assert "40 RL iterations, interrupted by X, no validation" in text


def test_summary_is_valid_json_even_of_numbers_that_json_lacks(tmp_path):
    write_summary(tmp_path / "new" / "summary.json", {"final": {"a": math.nan, "b": math.inf, "c": 1.0}})
    text = (tmp_path / "new" / "summary.json").read_text()
    assert json.loads(text) == {"final": {"a": None, "b": None, "c": 1.0}}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["summary.json"]


def test_curves_are_drawn_of_what_there_is(tmp_path):
    path = tmp_path / "curves.png"
    draw_curves(path, [], {}, [])
    assert not path.exists()  # nothing to draw
    draw_curves(path, [1], {"reward": [0.5], "unknown": [1.0]}, [])
    width = struct.unpack(">I", path.read_bytes()[16:20])[0]
    history = {"reward": [0.1, math.nan] * 30, "entropy": [1.0] * 60, "alloc/n_max": [8.0] * 60}
    draw_curves(path, list(range(1, 61)), history, [(0, SUMMARY["before"]), (60, SUMMARY["after"])])
    header = path.read_bytes()
    assert header.startswith(b"\x89PNG") and struct.unpack(">I", header[16:20])[0] == pytest.approx(4 * width, abs=4)


def test_runs_are_compared_side_by_side(tmp_path, monkeypatch):
    for name, changes in {"dynamo": {}, "grpo": {"before": None, "final": {}}}.items():
        write_summary(tmp_path / name / "summary.json", SUMMARY | changes)
    monkeypatch.chdir(tmp_path)
    lines = [line.split() for line in printed(compare, ["dynamo", "grpo"], width=80).splitlines()]
    assert ["A", "dynamo", "–", "40", "100.0", "0.800"] in lines
    assert ["B", "grpo", "–", "40", "100.0", "–"] in lines
    assert ["toy/pass@1", "A", "0.250", "0.750", "[0.700,", "0.800]"] in lines
    assert ["B", "–", "0.750", "[0.700,", "0.800]"] in lines
    assert "no paired comparison" in printed(compare, ["dynamo", "grpo"], width=80)


def counted(successes, samples=4):
    """Counts of the last validation, and pass@1 of it."""
    counts = {"before": None, "after": {"toy": {str(10**18 + i): [s, samples] for i, s in enumerate(successes)}}}
    value = sum(successes) / samples / len(successes)
    return {"counts": counts, "after": {"val/toy/pass@1": value, "val/toy/pass@4": 0.5}}


def test_runs_are_compared_problem_by_problem(tmp_path, monkeypatch):
    """Ten problems, five better by a quarter and five equal: 2 of 2⁵ flips are as far."""
    monkeypatch.chdir(tmp_path)
    first = [0, 1, 2, 3, 0, 1, 2, 3, 4, 4]
    write_summary(tmp_path / "a" / "summary.json", SUMMARY | counted(first))
    write_summary(tmp_path / "b" / "summary.json", SUMMARY | counted([s + 1 for s in first[:5]] + first[5:]))
    text = printed(compare, ["a", "b"], width=80)
    row = next(line for line in text.splitlines() if "B − A" in line).split()
    assert row[0] == "toy/pass@1" and row[4:6] == ["10", "+0.125"]
    low, high = float(row[6].strip("[,")), float(row[7].strip("]"))
    assert 0.03 <= low <= 0.08 and 0.17 <= high <= 0.22
    # pass@4 is 0 or 1: one problem changed, its p-value is 1; Holm doubles the smaller one.
    assert row[8:] == ["0.0625", "0.1250"]
    assert max(map(len, text.splitlines())) <= 80


def test_versions_with_different_seeds_are_repetitions_of_one_arm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, shift in (("grpo", 0), ("dynamo", 1)):
        for seed in range(3):
            summary = SUMMARY | counted([shift + (i + seed) % 3 for i in range(40)]) | {"seed": seed}
            write_summary(tmp_path / "runs" / name / f"version_{seed}" / "summary.json", summary)
    folders = [f"runs/{name}/version_{seed}" for name in ("grpo", "dynamo") for seed in range(3)]
    text = printed(compare, folders, width=80)
    assert sum(line.startswith(" A  runs/grpo/version_") for line in text.splitlines()) == 3
    row = next(line for line in text.splitlines() if "B − A" in line).split()
    assert row[4:6] == ["40", "+0.250"]
    # The same seed twice is no repetition: every run stands for itself.
    text = printed(compare, [folders[0], folders[0] + "/", folders[3]], width=80)
    assert "B − A" in text
    text = printed(compare, folders[:3], width=80)
    assert "B − A" in text and "C − A" in text


def test_counts_of_a_problem_stand_in_one_line_of_the_summary(tmp_path):
    write_summary(tmp_path / "summary.json", SUMMARY | counted([1, 3]))
    text = (tmp_path / "summary.json").read_text()
    assert '"1000000000000000001": [3, 4]' in text
    assert json.loads(text)["counts"] == counted([1, 3])["counts"]


def test_tables_of_long_names_fit_80_columns():
    name = "val/olympiadbench_en_maths/pass@32"
    ends = {f"{name}_low": 0.2, f"{name}_high": 0.3}
    text = printed(print_summary, SUMMARY | {"before": {name: 0.25, **ends}, "after": {name: 0.3, **ends}}, width=80)
    assert "0.250 [0.200, 0.300]" in text and "0.300 [0.200, 0.300]" in text and "+0.050" in text


def test_folder_without_a_summary_is_refused_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/summary.json does not exist"):
        compare([str(tmp_path)])


def test_a_run_that_has_not_ended_is_refused_with_the_two_ways_to_see_it(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,reward\n0,0.5\n")
    with pytest.raises(ValueError, match=r"summary\.json does not exist: .* report --watch or report --output"):
        compare([str(tmp_path)])


def test_the_page_is_written_though_a_summary_is_torn(tmp_path, capsys):
    pytest.importorskip("plotly", reason="the extra report is not installed")
    (tmp_path / "metrics.csv").write_text("step,reward\n0,0.5\n1,0.75\n")
    (tmp_path / "summary.json").write_text('{"iterations": 4')
    report([str(tmp_path), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").stat().st_size > 1_000_000
    table, written = capsys.readouterr().out.replace("\n", " ").split("wrote")
    assert table.startswith("no table") and "is not complete JSON" in table and "page.html" in written
