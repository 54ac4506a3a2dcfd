"""Tripwires in a run of two processes: each says the same to itself, and the run says it once."""

from pathlib import Path

import pytest
import yaml
from launcher import command_line, finish, run, start
from short_runs import healthy_settings, reward_function, tripwire_rows  # noqa: F401  # a fixture

PATIENCE = 600.0
"""Seconds for a run that takes ten: the machine may be busy."""
HOPELESS = "tripwire all_hopeless (Tripwires.stop_on) ends the run at iteration 10"


@pytest.fixture
def settings():
    """A healthy run of two processes."""
    settings = healthy_settings()
    settings["trainer"].update(devices=2, strategy="ddp")
    return settings


@pytest.fixture
def arguments(settings, tmp_path, monkeypatch):
    """Writes the settings as a config into the folder of the run; gives the command's arguments."""
    monkeypatch.chdir(tmp_path)

    def write():
        Path("config.yaml").write_text(yaml.safe_dump(settings))
        return (["fit", "--config", "config.yaml"],)

    return write


def outputs():
    """What each process printed."""
    return [Path(f"output-{rank}.txt").read_text() for rank in range(2)]


@pytest.mark.slow
def test_a_healthy_run_raises_nothing(arguments, tmp_path):
    run(command_line, arguments(), 2, timeout=PATIENCE)
    assert tripwire_rows(tmp_path) == []
    assert not any("tripwire " in text for text in outputs())


@pytest.mark.slow
def test_old_weights_are_named_once_by_the_first_process(arguments, settings, tmp_path):
    settings["model"]["generator"] = {"class_path": "broken_engines.OldWeightsEngine"}
    settings["model"]["sampling"]["logp_tolerance"] = 1.0
    run(command_line, arguments(), 2, timeout=PATIENCE)
    assert [row["tripwire"] for row in tripwire_rows(tmp_path)].count("old_weights") == 1
    first, second = outputs()
    assert first.count("tripwire old_weights, iteration ") == 1 and "tripwire " not in second


def test_a_reward_that_never_pays_ends_both_processes(arguments, settings, tmp_path, reward_function):  # noqa: F811
    reward_function("return 0.0")
    settings["trainer"]["callbacks"][0]["init_args"]["stop_on"] = ["all_hopeless"]
    codes = finish(start(command_line, arguments(), 2), PATIENCE)
    assert all(codes)
    (row,) = tripwire_rows(tmp_path)
    assert (row["tripwire"], row["iteration"], row["level"]) == ("all_hopeless", 10, "error")
    assert outputs()[0].count(HOPELESS) == 1
