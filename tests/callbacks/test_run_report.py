import json
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from dynamo_lightning.callbacks import IterationCheckpoint, RunReport, VarianceReductionMonitor

VALIDATED = dict(limit_val_batches=1.0, val_check_interval=2, num_sanity_val_steps=-1)


class Kill(Callback):
    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch == self.iteration:
            raise RuntimeError("killed")


class SavesConfig(Callback):
    """As the command line does; without a config there is no command to go on with."""

    def on_fit_start(self, trainer, pl_module):
        Path(trainer.log_dir).mkdir(parents=True, exist_ok=True)
        Path(trainer.log_dir, "config.yaml").write_text("name: toy\n")


@pytest.fixture
def script(make_record):
    def play(iteration):
        return make_record(iteration, metrics={"reward": iteration / 10, "entropy": 1.0})

    return play


def callbacks(*more):
    return [VarianceReductionMonitor(), RunReport(), IterationCheckpoint(every_n_iterations=1, save_top_k=-1), *more]


def summary(run_or_folder):
    folder = getattr(run_or_folder, "folder", run_or_folder)
    return json.loads((Path(folder) / "summary.json").read_text())


def test_report_holds_before_and_after_seconds_and_files(train, script, capsys):
    run = train(callbacks(SavesConfig()), script=script, **VALIDATED)
    report = summary(run)
    # the scripted metric is 0.5 plus the iterations trained
    assert report["before"]["val/toy/pass@1"] == 0.5 and report["before"]["val/toy/pass@1_low"] == pytest.approx(0.4)
    assert report["after"]["val/toy/pass@1"] == 4.5 and report["validated_at"] == report["iterations"] == 4
    phases = {"setup", "generate", "reward", "logprobs", "update", "validation", "checkpoint", "other"}
    assert report["seconds"].keys() == phases
    assert report["seconds"]["generate"] == pytest.approx(4 * 0.4)
    assert report["seconds"]["checkpoint"] > 0 and report["seconds"]["validation"] > 0
    # Means over the last iterations, here all four, and not the last batch alone.
    assert report["final_iterations"] == 4
    assert report["final"] == {
        "reward": pytest.approx(0.15),
        "entropy": 1.0,
        "alloc/predicted_variance_ratio": 1.0,
        "alloc/best_variance_ratio": 1.0,
        "alloc/realised_variance_ratio": 1.0,
    }
    assert Path(report["checkpoint"]).name == "last.ckpt" and Path(report["checkpoint"]).exists()
    assert report["config"] == f"{run.folder}/config.yaml"
    assert (Path(run.folder) / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert report["commands"]["resume"] in text and f"wrote    {run.folder}/curves.png" in text


def test_partial_sanity_check_is_not_taken_for_a_measurement(train, script):
    assert summary(train(callbacks(), script=script, **(VALIDATED | {"num_sanity_val_steps": 1})))["before"] is None


@pytest.mark.parametrize("at", [2, 3])
def test_interrupted_run_is_reported_and_the_resumed_one_covers_all_of_it(train, script, at):
    """At 2 the last checkpoint coincides with a validation, which must be in it."""
    with pytest.raises(RuntimeError, match="killed"):
        train(callbacks(Kill(at)), script=script, **VALIDATED)
    first = summary(train.folder)
    assert first["status"] == "interrupted by RuntimeError"
    assert (first["iterations"], first["validated_at"]) == (at, 2)
    report = RunReport()
    resumed = train(
        [VarianceReductionMonitor(), report, IterationCheckpoint()],
        script=script,
        version=1,
        ckpt_path=f"{train.folder}/checkpoints/last.ckpt",
        **VALIDATED,
    )
    assert resumed.module.seen == list(range(at, 4))
    assert summary(resumed)["before"] == first["before"]
    assert summary(resumed)["seconds"]["generate"] == pytest.approx(4 * 0.4)
    assert report.iterations == [1, 2, 3, 4]
    assert report.history["reward"] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [iteration for iteration, _ in report.validations] == [0, 2, 4]


def test_run_that_fails_to_start_leaves_an_earlier_report_alone(train, script):
    train(callbacks(), script=script, **VALIDATED)
    with pytest.raises(FileNotFoundError):
        train(callbacks(), script=script, ckpt_path="missing.ckpt", **VALIDATED)
    assert summary(train.folder)["iterations"] == 4


def test_curve_has_gaps_where_its_metric_was_missing(train, make_record):
    report = RunReport()
    metrics = [{"reward": 1.0}, {"grad_norm": 2.0}, {"reward": 3.0, "grad_norm": 4.0}]
    train([report], script=lambda i: make_record(i, metrics=metrics[i]), epoch_length=3)
    assert str(report.history) == str({"reward": [1.0, float("nan"), 3.0], "grad_norm": [float("nan"), 2.0, 4.0]})


def test_run_without_validation_or_iterations_still_ends_well(train, script):
    report = summary(train([RunReport()], script=script, limit_train_batches=0))
    assert report["iterations"] == 0 and report["after"] is None


def test_dry_run_leaves_no_files(train, script, tmp_path):
    train(callbacks(), script=script, fast_dev_run=True)
    assert not list(tmp_path.rglob("summary.json"))
