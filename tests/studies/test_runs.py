"""Designs parse into real options; finished runs are not run again."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("studies", reason="needs a checkout, and `python -m pytest` from its root")

from dynamo_lightning.errors import RunError, UserError
from studies.design import load_study
from studies.one_run import arguments, execute, result_of
from studies.run import main, repeat, run_study, waiting_runs

ROOT = Path(__file__).parents[2]
DESIGN = ROOT / "studies/noise_limited.py"
STUDY = load_study(DESIGN)
FIRST = next(STUDY.runs())
DESIGNS = {
    name: load_study(ROOT / f"studies/{name}.py")
    for name in ("noise_limited", "several_epochs", "chain", "large_batch", "stress")
}
ARMS = [(name, arm.name) for name, study in DESIGNS.items() for arm in study.arms]


@pytest.fixture(scope="module")
def parser():
    from dynamo_lightning.cli import DynamoCLI, DynamoTrainer
    from dynamo_lightning.datamodule import RolloutDataModule
    from dynamo_lightning.module import PolicyModule

    class Parsed(DynamoCLI):
        def before_instantiate_classes(self):
            pass

        def instantiate_classes(self):
            pass

        def _run_subcommand(self, subcommand):
            pass

        def _set_seed(self):
            pass

    return Parsed(
        chosen="fit", model_class=PolicyModule, datamodule_class=RolloutDataModule, trainer_class=DynamoTrainer,
        auto_configure_optimizers=False, args=["fit"], parser_kwargs={"prog": "python -m dynamo_lightning"},
    )  # fmt: skip


def test_every_design_file_is_tested():
    found = {path.stem for path in (ROOT / "studies").glob("*.py") if "STUDY = Study(" in path.read_text()}
    assert found == set(DESIGNS)


@pytest.mark.parametrize(("name", "arm"), ARMS, ids=[f"{name}-{arm}" for name, arm in ARMS])
def test_the_options_of_every_arm_parse(name, arm, parser, tmp_path):
    study = DESIGNS[name]
    run = next(run for run in study.runs() if run.arm.name == arm)
    shared = tmp_path / "shared.json"
    shared.write_text(json.dumps(study.shared))
    parser.parse_arguments(parser.parser, arguments(study, run, str(shared)))
    config = parser.config["fit"]
    assert config.optimizer.init_args.lr == run.learning_rate
    assert config.seed_everything == run.seed
    shape = study.shared["data"]
    budget = shape["prompts_per_batch"] * shape["rollouts_per_prompt"]
    assert config.data.prompts_per_batch * config.data.rollouts_per_prompt == budget  # every arm has the same


def test_arms_differ_only_in_what_they_are_named_for():
    options = {arm.name: set(arm.options) for arm in STUDY.arms}
    assert all(options[a] != options[b] for a in options for b in options if a != b)
    assert options["equal_2x8"] < options["pilot_2x8"]
    assert options["history"] < options["history_rule"]


def test_an_unfinished_study_is_balanced():
    runs = list(STUDY.runs())
    arms, rates = len(STUDY.arms), len(STUDY.learning_rates)
    assert len(runs) == arms * rates * len(STUDY.seeds) == len({run.name for run in runs})
    assert {run.seed for run in runs[: arms * rates]} == {0}
    assert {run.arm.name for run in runs[:arms]} == {arm.name for arm in STUDY.arms}


def test_finished_runs_are_not_run_again(tmp_path):
    (tmp_path / f"{FIRST.name}.json").write_text("{}")
    (tmp_path / "weighted_1e-04_0.json.partial").write_text("{")  # killed while it was written
    waiting = [run.name for run in waiting_runs(STUDY, tmp_path, only="_1e-04_0$")]
    assert FIRST.name not in waiting
    assert "weighted_1e-04_0" in waiting
    assert len(waiting) == len(STUDY.arms) - 1


def test_nothing_is_run_where_all_runs_are_finished(tmp_path, capsys):
    for run in STUDY.runs():
        (tmp_path / f"{run.name}.json").write_text("{}")
    assert run_study(STUDY, tmp_path, only="", workers=1) == 0
    assert "0 runs to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--workers=0"], "--workers=0 must be at least 1"), (["--only=("], r"--only=\( is no regular expression")],
)
def test_a_mistaken_option_is_one_line(options, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main([str(DESIGN), *options])


HEADER = "alloc/budget,completions/mean_length,timing_s/generate,timing_s/update,val/arithmetic/pass@1\n"


def test_a_curve_counts_all_tokens_and_seconds_until_each_evaluation(tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(HEADER + "16,10,0.5,0.25,\n16,12.5,0.5,0.25,0.4\n16,10,0.5,,\n16,10,0.5,0.5,0.5\n")
    result = result_of(STUDY, FIRST, metrics)
    assert result["curve"] == {
        "iteration": [2, 4], "tokens": [360, 680], "train_seconds": [1.5, 3.0], "value": [0.4, 0.5],
    }  # fmt: skip
    assert (result["iterations"], result["tokens"]) == (4, 680)


def test_discarded_rollouts_of_dynamic_sampling_are_charged(tmp_path):
    metrics = tmp_path / "metrics.csv"
    header = HEADER.replace("\n", ",dynamic_sampling/frac_kept\n")
    metrics.write_text(header + "16,10,0.5,0.25,,0.5\n16,10,0.5,0.25,0.5,1\n")
    assert result_of(STUDY, FIRST, metrics)["tokens"] == 320 + 160


def test_last_values_of_the_wanted_metrics_are_kept_and_none_may_be_missing(tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(HEADER.replace("\n", ",stability/x\n") + "16,10,0.5,0.25,,1\n16,10,0.5,0.25,0.5,2\n16,10,,,,\n")
    study = dataclasses.replace(STUDY, target=None, limit=3, final_metrics=("stability/x",))
    assert result_of(study, FIRST, metrics)["final"] == {"stability/x": 2.0}
    with pytest.raises(RunError, match="logged no stability/y"):
        result_of(dataclasses.replace(study, final_metrics=("stability/y",)), FIRST, metrics)


def test_a_run_that_stopped_before_target_and_limit_is_no_result(tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(HEADER + "16,10,0.5,0.25,0.4\n")
    with pytest.raises(RunError, match="after 1 iterations, before the target and before 275"):
        result_of(STUDY, FIRST, metrics)


def test_shipped_results_are_of_the_shipped_design():
    from studies.comparison import read_results

    for name, study in DESIGNS.items():
        for result in read_results(study, ROOT / f"studies/{name}/results").values():
            assert result["iterations"] <= study.limit
            reached = study.target is not None and max(result["curve"]["value"]) >= study.target
            assert reached or result["iterations"] == study.limit


def short_study(name):
    """One arm of the shipped study for two iterations, with a target that it has reached before."""
    shared = copy.deepcopy(STUDY.shared)
    shared["trainer"] |= {"limit_train_batches": 2, "val_check_interval": 1}
    return dataclasses.replace(STUDY, name=name, shared=shared, arms=STUDY.arms[:1], target=0.0, limit=2)


def test_a_run_is_trained_by_the_command_line_and_leaves_its_curve(tmp_path, capfd):
    study = short_study("short")
    run = next(study.runs())
    print("before")
    seconds = execute(study, run, tmp_path)
    print("after")
    result = json.loads((tmp_path / f"{run.name}.json").read_text())
    assert result["arm"] == "equal" and result["curve"]["iteration"][0] == 1 and result["tokens"] >= 16
    assert seconds >= result["curve"]["train_seconds"][0] > 0
    assert capfd.readouterr().out == "before\nafter\n", "what the run prints goes to its log"
    assert repeat(study, tmp_path, run.name)
    (tmp_path / f"{run.name}.json").write_text(json.dumps(result | {"curve": result["curve"] | {"tokens": [1]}}))
    assert not repeat(study, tmp_path, run.name)


def test_only_a_finished_run_is_run_again(tmp_path):
    with pytest.raises(UserError, match="--again=equal_1e-04_0 is no finished run of noise_limited"):
        repeat(STUDY, tmp_path, "equal_1e-04_0")


def test_a_worker_ends_with_its_study():
    worker = "from studies.run import end_with, os, time; end_with(os.getppid()); print(1, flush=True); time.sleep(60)"
    study = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    parent = subprocess.Popen([sys.executable, "-c", study], cwd=ROOT, stdout=subprocess.PIPE)
    parent.stdout.readline()  # the worker is there, and its standard output is the parent's
    parent.kill()
    assert parent.wait(timeout=10) != 0
    assert parent.stdout.read() == b"", "the pipe closes when the worker has ended too, long before its 60 seconds"
