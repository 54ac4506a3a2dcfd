import re
import sys
import threading
import time

import pytest

from dynamo_lightning.callbacks import ProgressLines
from dynamo_lightning.callbacks.progress_lines import format_duration

VALIDATED = dict(limit_val_batches=1.0, val_check_interval=2, num_sanity_val_steps=-1)


@pytest.fixture
def script(make_record):
    return lambda iteration: make_record(iteration, metrics={"reward": iteration / 10, "entropy": 1.5})


def test_without_a_terminal_every_iteration_may_have_its_line(train, script, capsys):
    train([ProgressLines(every_n_seconds=0)], script=script, max_epochs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("iteration", "training"))]
    assert lines[0] == "training begins, 8 steps" or lines[0] == "training begins, 8 iterations"
    assert len(lines) == 9
    pattern = r"iteration 2/8  reward 0\.100  entropy 1\.500  \S+ s/iteration  0 s left"
    assert re.fullmatch(pattern, lines[2]), lines[2]


def test_lines_come_by_time_with_the_first_and_the_last_iteration(train, script, capsys):
    train([ProgressLines(every_n_seconds=1000)], script=script)
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("iteration")]
    assert lines == ["iteration 1/4", "iteration 4/4"]


def test_on_a_terminal_nothing_is_printed(train, script, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train([ProgressLines(every_n_seconds=0)], script=script, **VALIDATED)
    assert "iteration" not in capsys.readouterr().out


def test_validations_say_how_far_they_are(train, script, capsys):
    train([ProgressLines(every_n_seconds=0)], script=script, **VALIDATED)
    text = capsys.readouterr().out
    assert "validation before training: batch 1/2, 0 s, 0 s left" in text
    assert text.count("\nvalidation: batch 2/2") == 2


def test_a_long_iteration_says_for_how_long_it_has_been_running(train, make_record, capsys):
    def script(iteration):
        time.sleep(0.5 if iteration == 1 else 0)
        return make_record(iteration)

    train([ProgressLines(every_n_seconds=0.1)], script=script)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 2: ")]
    assert len(lines) >= 2 and all(re.fullmatch(r"step 2: running for \d+ s", line) for line in lines)


def test_an_exception_ends_the_watch(train):
    def script(iteration):
        raise RuntimeError("broken")

    callback, before = ProgressLines(every_n_seconds=0.1), threading.active_count()
    with pytest.raises(RuntimeError, match="broken"):
        train([callback], script=script)
    assert callback._stop is None
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_optimizer_steps_bound_the_iterations(train, script, capsys):
    train([ProgressLines(every_n_seconds=0)], script=script, max_epochs=-1, max_steps=3)
    assert "iteration 3/3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (95, "2 min"), (3540, "59 min"), (3900, "1 h 05 min")]
)
def test_durations_are_written_briefly(seconds, text):
    assert format_duration(seconds) == text
