import io
import os

import pytest
from rich.console import Console
from run_folders import write_run

from dynamo_lightning.cli import main
from dynamo_lightning.runs.live import sparkline, watch


def shown(folder, **options):
    console = Console(file=io.StringIO(), width=80, **options)
    watch(str(folder), every_n_seconds=0, console=console)
    return console.file.getvalue()


def test_a_sparkline_goes_from_the_smallest_to_the_largest_value():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁ █"
    assert sparkline([0.0, 2.0, 4.0, 6.0], width=2) == "▁█"
    assert sparkline([5.0, 5.0]) == "▄▄" and sparkline([]) == sparkline([float("nan")]) == ""


def test_a_run_fits_80_columns_with_its_validations_and_warnings(tmp_path):
    tripwires = [{"iteration": 9, "tripwire": "x", "level": "error", "message": "word " * 40}]
    text = shown(write_run(tmp_path / "run", tripwires=tripwires))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "40 RL iterations, finished" in " ".join(text.split()) and "error, iteration 9: word" in text
    assert "…" not in text
    row = next(line for line in text.splitlines() if "toy/pass@1" in line)
    assert "0.5" in row and "[0.400, 0.600]" in row


def test_a_run_that_goes_on_is_read_again_until_its_summary_is_there(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    summary = folder / "summary.json"
    aside = summary.rename(tmp_path / "summary.json")
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            os.rename(aside, summary)
            os.utime(summary)

    monkeypatch.setattr("time.sleep", sleep)
    text = shown(folder, force_terminal=True)
    assert len(looks) == 2 and "going on, or killed" in text and "finished" in text


def test_watching_several_runs_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: report --watch shows one run in the terminal, got 2 runs and --out"):
        main(["report", "a", "b", "--watch", "--output", "x.html"])
