import io
import json
import math
import struct

import pytest
from rich.console import Console

from dynamo_lightning import report
from dynamo_lightning.runs.commands import follow_ups

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
    text = printed(report.print_summary, SUMMARY)
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
    lines = printed(report.print_summary, SUMMARY, width=40).splitlines()
    state = "--config '/runs/a b/config.yaml' --ckpt_path '/runs/a b/last.ckpt'"
    assert f"resume   python -m dynamo_lightning fit {state}" in lines
    assert f"evaluate python -m dynamo_lightning test {state}" in lines
    assert f"export   python -m dynamo_lightning export {state} --output_dir '/runs/a b/export'" in lines


def test_paths_below_the_working_folder_are_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = follow_ups(f"{tmp_path}/config.yaml", f"{tmp_path}/x.ckpt", f"{tmp_path}/run", "test")["resume"]
    assert command == "python -m dynamo_lightning fit --config config.yaml --ckpt_path x.ckpt"


def test_old_validation_and_missing_one_are_pointed_out():
    assert "validated at iteration 30 of 40" in printed(report.print_summary, SUMMARY | {"validated_at": 30})
    text = printed(report.print_summary, SUMMARY | {"before": None, "after": None, "status": "interrupted by X"})
    assert "40 RL iterations, interrupted by X, no validation" in text


def test_summary_is_valid_json_even_of_numbers_that_json_lacks(tmp_path):
    report.write_summary(tmp_path / "new" / "summary.json", {"final": {"a": math.nan, "b": math.inf, "c": 1.0}})
    text = (tmp_path / "new" / "summary.json").read_text()
    assert json.loads(text) == {"final": {"a": None, "b": None, "c": 1.0}}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["summary.json"]


def test_curves_are_drawn_of_what_there_is(tmp_path):
    path = tmp_path / "curves.png"
    report.draw_curves(path, [], {}, [])
    assert not path.exists()  # nothing to draw
    report.draw_curves(path, [1], {"reward": [0.5], "unknown": [1.0]}, [])
    width = struct.unpack(">I", path.read_bytes()[16:20])[0]
    history = {"reward": [0.1, math.nan] * 30, "entropy": [1.0] * 60, "alloc/n_max": [8.0] * 60}
    report.draw_curves(path, list(range(1, 61)), history, [(0, SUMMARY["before"]), (60, SUMMARY["after"])])
    header = path.read_bytes()
    assert header.startswith(b"\x89PNG") and struct.unpack(">I", header[16:20])[0] == pytest.approx(4 * width, abs=4)


def test_runs_are_compared_side_by_side(tmp_path):
    for name, changes in {"dynamo": {}, "grpo": {"before": None, "final": {}}}.items():
        report.write_summary(tmp_path / name / "summary.json", SUMMARY | changes)
    text = printed(report.compare, [str(tmp_path / "dynamo"), str(tmp_path / "grpo")], width=250)
    rows = {line.split("│")[1].strip().split("/")[-1]: line for line in text.splitlines() if line.startswith("│")}
    cells = {name: [cell.strip() for cell in row.split("│")[2:-1]] for name, row in rows.items()}
    assert cells["dynamo"] == ["40", "0.250 → 0.750 [0.700, 0.800]", "100.0", "0.800"]
    assert cells["grpo"] == ["40", "– → 0.750 [0.700, 0.800]", "100.0", "–"]


def test_folder_without_a_summary_is_refused_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/summary.json does not exist"):
        report.compare([str(tmp_path)])
