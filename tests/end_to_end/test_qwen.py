"""The config of the complete run, as shipped, on a tiny random policy; only what samples is exchanged."""

import json
import shutil
from pathlib import Path

import pytest
from launcher import command_line, run

WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)
"""A prompt of DAPO-Math-17k."""


@pytest.mark.parametrize("num_processes", [1, 2])
def test_qwen_trains_a_tiny_random_model_on_cpu(monkeypatch, tmp_path, tiny_policy, num_processes):
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": WRAPPED.format(f"{a}+{b}")}],
            "reward_model": {"ground_truth": str(a + b)},
        }
        for a in range(3) for b in range(2)
    ]  # fmt: skip
    rows += [{**rows[0], "prompt": [{"role": "user", "content": WRAPPED.format("9+9")}]}, rows[0]]
    rows += [{**rows[1], "prompt": rows[-2]["prompt"]}]  # one prompt twice with another answer, one row repeated
    Path("train.json").write_text(json.dumps(rows))
    Path("val.jsonl").write_text("".join(json.dumps({"problem": f"{a}+4", "answer": a + 4}) + "\n" for a in range(3)))
    longer = Path(shutil.copytree(tiny_policy, "policy"))  # the template alone is longer than the tiny policy takes
    architecture = json.loads((longer / "config.json").read_text()) | {"max_position_embeddings": 512}
    (longer / "config.json").write_text(json.dumps(architecture))
    options = [
        "fit",
        "--config=qwen.yaml",
        "--trainer.accelerator=cpu",
        f"--trainer.devices={num_processes}",
        "--trainer.max_epochs=1",
        "--trainer.val_check_interval=2",
        "--model.model_name=./policy",
        "--model.policy.init=random",
        "--model.generator=dynamo_lightning.engines.transformers.TransformersEngine",
        "--model.sampling.max_response_length=8",
        "--model.scoring.num_workers=1",
        "--data.train.path=train.json",
        "--data.val=[{path: val.jsonl, name: math500, prompt_column: problem}]",
        "--data.prompts_per_batch=3",
    ]
    run(command_line, (options,), num_processes)
    summary = json.loads(Path("runs/qwen/version_0/summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["iterations"] == 2
    assert {"val/math500/pass@1", "val/math500/pass@8"} <= summary["after"].keys()
    assert Path(summary["checkpoint"], ".metadata").is_file(), "in shards"
