"""No command damages a run: what it wrote survives every other command, a resume and a fork."""

import csv
import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from dynamo_lightning.cli import main

RUN = Path("runs/dynamo/version_0")
WORDS = ("resume", "evaluate", "export", "report", "predict")


def run(*args):
    return main(list(args))


@pytest.fixture
def fit(config):
    """Fits two epochs of three iterations, with checkpoints where they are by default; `more` overrides."""
    settings = yaml.safe_load(Path(config).read_text())
    settings["trainer"]["callbacks"] = [
        {"class_path": f"dynamo_lightning.callbacks.{name}", "init_args": arguments}
        for name, arguments in {
            "IterationCheckpoint": {"every_n_iterations": 1, "save_top_k": -1},
            "RolloutTable": {"every_n_iterations": 1},
            "PredictionWriter": {},
            "BenchmarkReport": {},
            "RunReport": {},
        }.items()
    ]
    Path("own.yaml").write_text(yaml.safe_dump(settings))
    return lambda *more: run("fit", "--config", "own.yaml", *more)


def metrics(folder=RUN):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def steps(folder=RUN):
    return [int(row["step"]) for row in metrics(folder)]


def snapshot(folder=RUN):
    """Contents of all files of a run, evaluations and exports aside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.relative_to(folder).parts[0][:6])
    skipped = ("evaluations", "export")
    return {str(p): p.read_bytes() for p in files if not p.relative_to(folder).parts[0].startswith(skipped)}


def printed_commands(text):
    """The commands that a run prints, by their first word."""
    return dict(re.findall(r"^(\w+) +(python -m dynamo_lightning .*)$", text, re.MULTILINE))


def eulerian_walk(words):
    """The words such that each follows each, itself included, once: 26 for five words (Hierholzer's algorithm)."""
    left = {word: list(words) for word in words}
    stack, walk = [words[0]], []
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return walk[::-1]


def test_a_run_survives_26_commands_in_which_each_follows_each(fit, capsys):
    fit()
    before = snapshot()
    commands = printed_commands(capsys.readouterr().out)
    assert commands.keys() == {"resume", "evaluate", "export"}
    commands["report"] = f"python -m dynamo_lightning report {RUN}"
    commands["predict"] = commands["resume"].replace(" fit ", " predict ")
    walk = eulerian_walk(WORDS)
    assert len(walk) == 26 and len(set(itertools.pairwise(walk))) == 25
    for number, word in enumerate(walk):
        arguments = shlex.split(commands[word])
        assert arguments[:3] == ["python", "-m", "dynamo_lightning"]
        try:
            run(*arguments[3:])
        except BaseException as error:
            raise AssertionError(f"command {number}, {word}, after {walk[number - 1]}: {commands[word]}") from error
        if word == "resume":
            output = capsys.readouterr().out
            assert "runs/dynamo/version_0 is finished: 6 RL iterations, trainer.max_epochs=2" in output
            commands |= printed_commands(output)
    assert steps() == list(range(6))
    after = snapshot()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert all("tfevents" in name for name in changed), changed
    assert len(list((RUN / "evaluations").iterdir())) == walk.count("evaluate") + walk.count("predict")
    assert sorted(path.name for path in Path("runs/dynamo").iterdir()) == ["version_0"]


def test_a_resume_appends_rows_and_leaves_the_config_alone(fit):
    fit()
    config, early = (RUN / "config.yaml").read_bytes(), metrics()
    state = ("--config", str(RUN / "config.yaml"), "--ckpt_path", str(RUN / "checkpoints/last.ckpt"))
    run("fit", *state, "--trainer.max_epochs=3")
    assert (RUN / "config.yaml").read_bytes() == config
    assert yaml.safe_load((RUN / "config.resume-1.yaml").read_text())["trainer"]["max_epochs"] == 3
    run("fit", *state, "--trainer.max_epochs=4")
    run("fit", *state, "--trainer.max_epochs=4")  # finished: nothing more
    assert sorted(path.name for path in RUN.glob("config*")) == [
        "config.resume-1.yaml", "config.resume-2.yaml", "config.yaml",
    ]  # fmt: skip
    assert steps() == list(range(12))
    assert [row["reward"] for row in metrics()[:6]] == [row["reward"] for row in early]
    summary = json.loads((RUN / "summary.json").read_text())
    assert (summary["status"], summary["iterations"]) == ("finished", 12)
    assert "config.resume-2.yaml" in summary["commands"]["resume"]
    iterations = [json.loads(line)["iteration"] for line in (RUN / "rollouts.jsonl").read_text().splitlines()]
    assert sorted(set(iterations)) == list(range(1, 13)) and iterations == sorted(iterations)


def test_a_resume_from_an_earlier_checkpoint_sets_later_rows_aside(fit):
    fit()
    run("fit", "--config", "own.yaml", "--ckpt_path", str(RUN / "checkpoints/iteration=000004.ckpt"))
    assert steps() == list(range(6))
    with (RUN / "metrics.superseded-1.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5"]
    state = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    assert state["RolloutDataModule"]["stream"]["iteration"] == 6


def test_a_fork_makes_a_new_folder_and_leaves_the_run_alone(fit):
    fit("--trainer.max_epochs=1")
    before = snapshot()
    state = ("--config", str(RUN / "config.yaml"), "--ckpt_path", str(RUN / "checkpoints/last.ckpt"))
    cli = run("fit", *state, "--name=b", "--trainer.max_epochs=2")
    fork = Path("runs/b/version_0")
    assert cli.trainer.log_dir == str(fork)
    assert steps(fork) == [3, 4, 5]
    assert yaml.safe_load((fork / "config.yaml").read_text())["name"] == "b"
    assert {path.name for path in (fork / "checkpoints").iterdir()} >= {"iteration=000006.ckpt", "last.ckpt"}
    assert snapshot() == before


def test_without_loggers_a_users_own_files_stay(fit):
    for name in ("config.yaml", "summary.json", "metrics.csv", "rollouts.jsonl", "hparams.yaml"):
        Path(name).write_text("mine")
    names = {path.name for path in Path().iterdir()}
    fit("--trainer.logger=false", "--trainer.max_epochs=1")
    run("test", "--config", "own.yaml", "--trainer.logger=false")
    run("predict", "--config", "own.yaml", "--trainer.logger=false")
    for name in ("config.yaml", "summary.json", "metrics.csv", "rollouts.jsonl", "hparams.yaml"):
        assert Path(name).read_text() == "mine"
    assert {path.name for path in Path().iterdir()} - names <= {"runs", "__pycache__"}
    assert {"config.yaml", "summary.json", "checkpoints"} <= {path.name for path in RUN.iterdir()}
    assert (Path("runs/dynamo/evaluations/0") / "results.json").exists()
    assert (Path("runs/dynamo/evaluations/1") / "predictions.jsonl").exists()


def test_checkpoints_of_another_run_are_not_written_over(config):
    run("fit", "--config", config, "--trainer.max_epochs=1")
    with pytest.raises(SystemExit, match=r"dirpath=checkpoints holds the checkpoints of the run runs/dynamo/version_0"):
        run("fit", "--config", config)
    assert not Path("runs/dynamo/version_1").exists()
    run("fit", "--config", config, "--ckpt_path=checkpoints/last.ckpt")
    assert steps() == list(range(6))


def test_a_moved_run_is_resumed_and_evaluated_where_it_lies(fit):
    fit("--trainer.max_epochs=1")
    Path("elsewhere").mkdir()
    moved = Path("elsewhere/my_run")
    shutil.move(RUN, moved)
    shutil.rmtree("runs")
    state = ("--config", str(moved / "config.yaml"), "--ckpt_path", str(moved / "checkpoints/last.ckpt"))
    run("fit", *state, "--trainer.max_epochs=2")
    run("validate", *state)
    assert steps(moved) == list(range(6))
    assert [path.name for path in (moved / "evaluations").iterdir()] == ["0"]
    assert not Path("runs").exists()


def test_a_run_that_cannot_start_leaves_no_folder(fit):
    with pytest.raises(SystemExit, match=r"missing\.jsonl"):
        fit("--data.train.path=missing.jsonl")
    with pytest.raises(SystemExit, match="BetaPosteriorr"):
        fit("--data.estimator=BetaPosteriorr")
    assert not list(Path("runs/dynamo").iterdir()) if Path("runs/dynamo").exists() else True


def test_an_unwritable_log_folder_is_one_line(fit):
    Path("runs").write_text("a file")
    with pytest.raises(SystemExit, match=r"^error: trainer\.logger: the log folder runs/dynamo cannot be written"):
        fit()


def test_checkpointing_can_be_switched_off(fit, capsys):
    fit("--trainer.enable_checkpointing=false", "--trainer.max_epochs=1")
    assert not (RUN / "checkpoints").exists()
    assert printed_commands(capsys.readouterr().out) == {}
    assert json.loads((RUN / "summary.json").read_text())["status"] == "finished"


def test_without_test_data_the_printed_evaluation_takes_the_validation_data(fit, capsys):
    fit("--data.test=null", "--trainer.max_epochs=1")
    command = printed_commands(capsys.readouterr().out)["evaluate"]
    assert command.startswith("python -m dynamo_lightning validate ")
    assert "val/sums/pass@1" in run(*shlex.split(command)[3:]).trainer.callback_metrics


def test_an_evaluation_needs_no_statistics_of_the_training(fit):
    fit("--trainer.max_epochs=1")
    for subcommand in ("test", "validate", "predict"):
        state = ("--config", str(RUN / "config.yaml"), "--ckpt_path", str(RUN / "checkpoints/last.ckpt"))
        run(subcommand, *state, "--data.estimator=ArcsineKalman")
