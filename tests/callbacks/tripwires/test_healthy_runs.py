"""Shipped configs that run on a CPU raise nothing."""

import json

import pytest

from dynamo_lightning.cli import main

FAST = ("--data.prompts_per_batch=8", "--trainer.limit_val_batches=0")
OVERLAYS = [
    "cispo", "clip_cov", "clip_higher", "dapo", "dr_grpo", "dual_clip", "entropy_advantages", "entropy_budget",
    "entropy_loss", "fork_tokens", "gspo", "kl_cov", "lora", "optimal_baseline", "paper_code", "steer", "w_reinforce",
]  # fmt: skip
SET_UPS = [
    ("quickstart",), ("chain",), ("quickstart", "overlays/grpo"), ("chain", "overlays/grpo"),
    *(("quickstart", *(("overlays/grpo",) if name == "dapo" else ()), f"overlays/{name}") for name in OVERLAYS),
]  # fmt: skip


def run(tmp_path, monkeypatch, configs, *arguments):
    """Text of the run's `tripwires.jsonl`, empty without one."""
    monkeypatch.chdir(tmp_path)
    main([
        "fit", *(f"--config={config}.yaml" for config in configs), "--name=healthy", "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=10", "--trainer.logger=false", "--trainer.enable_progress_bar=false", *arguments,
    ])  # fmt: skip
    path = tmp_path / "runs/healthy/version_0/tripwires.jsonl"
    assert path.parent.is_dir()
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("configs", [("quickstart",), ("chain", "overlays/grpo")], ids=" and ".join)
def test_ten_small_iterations_of_a_shipped_config_raise_nothing(configs, tmp_path, monkeypatch):
    assert run(tmp_path, monkeypatch, configs, *FAST) == ""


def complaints(capsys, configs):
    """Lines of `check` on a set-up that are no `ok`, by name."""
    capsys.readouterr()
    main(["check", *(f"--config={config}.yaml" for config in configs), "--json=true"])
    out = capsys.readouterr().out
    results = json.loads(out[out.index("{") :])["checks"]
    assert len(results) > 8
    return {result["name"]: result["message"] for result in results if result["level"] != "ok"}


@pytest.mark.slow
@pytest.mark.parametrize("configs", SET_UPS, ids=" and ".join)
def test_check_and_ten_iterations_of_a_shipped_set_up_raise_nothing(configs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert complaints(capsys, configs) == {}
    validates = configs in SET_UPS[:4]
    assert run(tmp_path, monkeypatch, configs, *(() if validates else FAST[1:])) == ""
