"""Every shipped config parses."""

from pathlib import Path

import pytest
import yaml

from dynamo_lightning.cli import DynamoCLI, find_config, main, shipped_configs


def parse(monkeypatch, args):
    """The configuration of a command line, without running it."""
    monkeypatch.setattr(DynamoCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(DynamoCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = main(args)
    return cli.config[args[0]]


OVERLAYS = sorted(path.name for path in (shipped_configs() / "overlays").glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "overlay"),
    [
        *[(name, None) for name in ("quickstart.yaml", "qwen.yaml")],
        *[("qwen.yaml", overlay) for overlay in OVERLAYS],
        *[pytest.param("quickstart.yaml", overlay, marks=pytest.mark.slow) for overlay in OVERLAYS],
    ],
)
def test_every_config_parses_with_every_overlay(monkeypatch, tmp_path, name, overlay):
    monkeypatch.chdir(tmp_path)
    if overlay == "wandb.yaml":
        pytest.importorskip("wandb", reason="W&B is optional")
    overlays = ["--config", f"overlays/{overlay}"] if overlay else []
    config = parse(monkeypatch, ["fit", "--config", name, *overlays])
    assert config.data.tokenizer_name == config.model.model_name


@pytest.mark.parametrize("overlay", ["benchmark_files", "template_qwen3_no_thinking", "template_llama3"])
def test_the_benchmarks_parse_with_their_overlays(monkeypatch, tmp_path, overlay):
    monkeypatch.chdir(tmp_path)
    config = parse(monkeypatch, ["test", "--config=benchmarks.yaml", f"--config=overlays/{overlay}.yaml"])
    assert len(config.data.test) == 7
    assert max(config.model.pass_at_k) == 32 <= config.data.eval_rollouts_per_prompt


def header(path):
    """The comment at the top of a file, in one line."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.lstrip("# ") for line in lines[:end])


def test_every_header_says_what_the_allocation_does_in_the_first_epoch():
    configs = sorted(shipped_configs().glob("*.yaml"))
    overlays = [
        path
        for path in sorted((shipped_configs() / "overlays").glob("*.yaml"))
        if {"train", "rule", "estimator", "pilot"} & ((yaml.safe_load(path.read_text()).get("data") or {}).keys())
    ]
    assert {path.stem for path in overlays} >= {"grpo", "paper_code", "data_gsm8k"}
    for path in configs + overlays:
        text = header(path)
        assert "first epoch" in text and "alloca" in text.lower(), path.name


def test_qwen_trains_past_its_first_epoch(monkeypatch, tmp_path):
    """The authors' 2,000 optimizer steps: 125 RL iterations, 3.7 epochs over 17,398 prompts."""
    monkeypatch.chdir(tmp_path)
    config = parse(monkeypatch, ["fit", "--config=qwen.yaml"])
    iterations = config.trainer.max_steps / config.model.updates.num_mini_batches
    assert iterations == 125
    epochs = iterations * config.data.prompts_per_batch / 17_398
    assert 3.6 < epochs < 3.7 < config.trainer.max_epochs


def test_every_config_is_in_the_table():
    table = (shipped_configs() / "README.md").read_text()
    for path in shipped_configs().rglob("*.yaml"):
        assert f"`{path.relative_to(shipped_configs()).as_posix()}`" in table


def test_the_grpo_overlay_switches_both_prongs_off(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = parse(monkeypatch, ["fit", "--config", "quickstart.yaml", "--config", "overlays/grpo.yaml"])
    assert config.data.rule.class_path.endswith("UniformRule")
    assert config.model.loss.modulation is None
    assert config.model.loss.advantage.class_path.endswith("GRPO")


def test_qwen_trains_on_what_its_data_overlay_says(monkeypatch, tmp_path):
    """The lines stand in both files: the overlay leads back from other data sets."""
    monkeypatch.chdir(tmp_path)
    alone = parse(monkeypatch, ["fit", "--config=qwen.yaml"]).data
    elsewhere = ["--config=overlays/data_math.yaml", "--data.template=plain", "--config=overlays/data_dapo_math.yaml"]
    back = parse(monkeypatch, ["fit", "--config=qwen.yaml", *elsewhere]).data
    assert (back.train, back.template) == (alone.train, alone.template)


def test_qwen_has_the_papers_settings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = parse(monkeypatch, ["fit", "--config", "qwen.yaml"])
    assert (config.data.prompts_per_batch, config.data.rollouts_per_prompt) == (512, 16)
    assert (config.data.min_rollouts, config.data.max_rollouts) == (8, 24)
    surrogate = config.model.loss.surrogate.init_args
    assert (surrogate.clip_low, surrogate.clip_high, surrogate.dual_clip) == (0.2, 0.2, 10)
    assert config.data.prompts_per_batch // config.model.updates.num_mini_batches == 32
    assert (config.optimizer.init_args.lr, config.optimizer.init_args.weight_decay) == (1e-6, 0.1)


def test_a_file_here_wins_over_the_shipped_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Path(find_config("qwen.yaml")) == shipped_configs() / "qwen.yaml"
    assert Path(find_config("configs/qwen.yaml")) == shipped_configs() / "qwen.yaml"
    (tmp_path / "qwen.yaml").touch()
    assert find_config("qwen.yaml") == "qwen.yaml"
    assert find_config("no_such.yaml") == "no_such.yaml"
