"""`test` over benchmarks: numbers, files, and going on after a kill."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dynamo_lightning.cli import main, shipped_configs
from dynamo_lightning.policy.embedded import local_path

REPORT = '--trainer.callbacks+={"class_path": "dynamo_lightning.callbacks.BenchmarkReport"}'
COLUMNS = {"source", "prompt_id", "row", "sample_index", "question", "answer", "response", "final_answer", "reward",
           "components", "failure", "truncated", "response_length"}  # fmt: skip


def evaluate(config, *args):
    """Run `test` with the responses kept."""
    return main(["test", "--config", config, "--model.evaluation.folder=kept", REPORT, *args])


def responses():
    """All kept responses."""
    return [json.loads(line) for path in Path("kept").rglob("*.jsonl") for line in path.read_text().splitlines()]


def test_every_number_is_printed_logged_and_written(config, capsys):
    cli = evaluate(config, "--model.pass_at_k=[1,2]", "--model.evaluation.maj_at_k=[2]")
    names = {"pass@1", "pass@2", "maj@2", "avg@2", "length", "truncated"}
    logged = cli.trainer.callback_metrics
    assert {f"test/sums/{name}{end}" for name in names for end in ("", "_low", "_high")} == set(logged)
    (folder,) = Path("kept").iterdir()
    result = json.loads((folder / "results.json").read_text())
    assert result["settings"]["model_name"] == cli.model.model_name
    assert result["results"]["sums"].keys() == names | {"problems", "samples"}
    assert result["results"]["sums"]["problems"] == 12
    for row in csv.DictReader((folder / "results.csv").open()):
        assert float(row["value"]) == pytest.approx(float(logged[f"test/sums/{row['metric']}"]))
    kept = responses()
    assert len(kept) == 24
    assert all(record.keys() >= COLUMNS for record in kept)
    rewards = [record["reward"] for record in kept]
    assert sum(rewards) / 24 == pytest.approx(float(logged["test/sums/pass@1"]))
    printed = capsys.readouterr().out
    for text in ("sums", "pass@2", "maj@2", "truncated", "results.csv"):
        assert text in printed


def test_a_second_run_samples_only_what_is_missing(config, monkeypatch):
    first = evaluate(config).trainer.callback_metrics
    (path,) = Path("kept").rglob("*.responses.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(
        b"".join(lines[:9]) + b"nonsense\n" + b"".join(lines[10:20]) + lines[20][:40]
    )  # two lost, one torn
    asked = []
    from dynamo_lightning.engines.transformers import TransformersEngine
    from dynamo_lightning.rollout.runner import RolloutRunner

    play = RolloutRunner.play

    def counted(self, sample, tokenizer, requests, *options):
        asked.extend(requests)
        return play(self, sample, tokenizer, requests, *options)

    monkeypatch.setattr(RolloutRunner, "play", counted)
    again = evaluate(config).trainer.callback_metrics
    assert len(asked) == 1 + 4
    assert again == first
    identity = ("prompt_id", "sample_index", "response", "reward")
    kept = [json.loads(line) for line in path.read_bytes().splitlines() if line != b"nonsense"]
    assert sorted([r[name] for name in identity] for r in kept) == sorted(
        [json.loads(line)[name] for name in identity] for line in lines
    )
    asked.clear()
    assert evaluate(config).trainer.callback_metrics == first
    assert asked == []
    evaluate(config, "--data.eval_rollouts_per_prompt=3")
    assert {request.sample_index for request in asked} == {2}
    asked.clear()
    evaluate(config, "--model.eval_temperature=0.5")
    assert len(asked) == 24
    assert len(list(Path("kept").iterdir())) == 2, "a folder for each way to sample"
    asked.clear()
    source = json.dumps([{"path": f"{Path(config).parent}/sums.jsonl", "template": "{prompt} "}])
    evaluate(config, f"--data.test={source}")
    assert len(asked) == 24, "the same problems under another template"
    asked.clear()
    evaluate(config)
    evaluate(config, f"--data.test={source}")
    assert asked == [], "responses under either template are kept"
    monkeypatch.setattr(TransformersEngine, "settings", lambda self: {"top_p": 0.9})
    evaluate(config)
    assert len(asked) == 24, "another way of sampling"
    asked.clear()
    evaluate(config, "--model.environment=conversations.Countdown", "--model.environment.tries=1")
    assert len(asked) == 24, "another environment"
    asked.clear()
    evaluate(config, "--model.policy.dtype=bfloat16")
    assert len(asked) == 24, "another type of the weights"


def test_one_process_goes_on_where_two_were(config, monkeypatch):
    alone = main(["test", "--config", config]).trainer.callback_metrics
    command = [sys.executable, "-m", "dynamo_lightning", "test", "--config", config, "--model.evaluation.folder=kept"]
    two = ["--trainer.strategy=ddp", "--trainer.devices=2", REPORT]
    subprocess.run([*command, *two], check=True, capture_output=True, timeout=300)
    names = sorted(path.name for path in Path("kept").rglob("*.jsonl"))
    assert names == ["sums.responses.jsonl", "sums.responses.rank1.jsonl"]
    assert len(responses()) == 24
    (path,) = Path("kept").rglob("*.rank1.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    again = evaluate(config).trainer.callback_metrics
    assert len(responses()) == 24
    for name, value in alone.items():
        assert float(again[name]) == pytest.approx(float(value)), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.pass_at_k=[4]"], r"model\.pass_at_k=\[4\] needs at least 4 .* data\.eval_rollouts_per_prompt is 2"),
        (["--model.evaluation.maj_at_k=[1,8]"], r"model\.evaluation\.maj_at_k=\[1, 8\] needs at least 8 .* is 2"),
        (["--model.pass_at_k=[0]"], r"model\.pass_at_k=\[0\] .* every k at least 1"),
    ],
)
def test_a_k_that_the_samples_do_not_allow_is_refused(config, arguments, message):
    with pytest.raises(SystemExit, match=message):
        evaluate(config, *arguments)


def test_two_benchmarks_of_one_name_are_refused(config, prompt_file):
    sources = json.dumps([{"path": prompt_file, "template": "{prompt}"}] * 2)
    with pytest.raises(SystemExit, match=r"data\.test: two data sets have one name, \['sums', 'sums'\]"):
        evaluate(config, f"--data.test={sources}")


@pytest.fixture
def seven_benchmarks(benchmark_files, tmp_path, monkeypatch):
    """Command line arguments of the shipped config for the embedded policy, on a CPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmark_files").symlink_to(benchmark_files)
    # The embedded policy takes 128 tokens, which are characters; the longest problem has thousands.
    longer = Path(shutil.copytree(local_path("embedded:arithmetic-qwen3"), "policy"))
    architecture = json.loads((longer / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (longer / "config.json").write_text(json.dumps(architecture))
    return [
        "test", "--config=benchmarks.yaml", "--config=overlays/benchmark_files.yaml", "--trainer.accelerator=cpu",
        "--model.model_name=./policy", "--model.sampling.max_response_length=8",
        "--model.generator.class_path=dynamo_lightning.engines.transformers.TransformersEngine",
        "--model.generator.init_args.batch_size=32", "--data.eval_prompts_per_batch=256",
        "--data.template={prompt}", "--data.max_prompt_length=5000",  # characters are tokens here
        "--data.eval_rollouts_per_prompt=2", "--model.pass_at_k=[1,2]",
        "--model.evaluation.maj_at_k=[2]", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


@pytest.mark.slow
def test_all_seven_benchmarks_go_on_after_being_killed(seven_benchmarks, capsys):
    command = [sys.executable, "-m", "dynamo_lightning", *seven_benchmarks]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    kept = Path("runs/benchmarks")
    deadline = time.monotonic() + 1200
    while sum(len(path.read_bytes().splitlines()) for path in kept.rglob("*.jsonl")) < 1500:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.read_bytes() for path in kept.rglob("*.jsonl")}
    assert 1500 <= sum(len(content.splitlines()) for content in before.values()) < 2 * 2866
    results = []
    for _ in range(2):  # the second time everything is there
        cli = main(seven_benchmarks)
        results.append({name: float(value) for name, value in cli.trainer.callback_metrics.items()})
    assert results[0] == results[1]
    for path in kept.rglob("*.jsonl"):
        if path.name in before:
            assert path.read_bytes().startswith(before[path.name][: before[path.name].rfind(b"\n") + 1])
    (folder,) = kept.iterdir()
    summary = json.loads((folder / "results.json").read_text())["results"]
    assert {name: entry["problems"] for name, entry in summary.items()} == {
        "aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "minerva": 272, "olympiadbench": 675, "gsm8k": 1319,
        "mean": 2866,
    }  # fmt: skip
    records = [json.loads(line) for path in kept.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len({(r["prompt_id"], r["sample_index"]) for r in records}) == len(records) == 2 * 2866


def test_the_local_files_are_the_benchmarks_of_the_config():
    """Both tables name the same seven, in the same order, so that either gives the same metrics."""
    names = []
    for file in ("benchmarks.yaml", "overlays/benchmark_files.yaml"):
        config = yaml.safe_load((shipped_configs() / file).read_text())
        names.append([source["name"] for source in config["data"]["test"]])
    assert names[0] == names[1]
    assert len(names[0]) == 7
    assert os.path.exists(shipped_configs() / "benchmarks.yaml")
