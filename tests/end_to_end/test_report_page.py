"""What a real training writes for its page."""

import csv
import json
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from dynamo_lightning.cli import main


@pytest.fixture
def run(config):
    settings = yaml.safe_load(Path(config).read_text())
    settings["trainer"]["callbacks"] += [
        {
            "class_path": "dynamo_lightning.callbacks.RolloutTable",
            "init_args": {"every_n_iterations": 1, "num_prompts": 4, "max_token_values": 4},
        },
        {"class_path": "dynamo_lightning.callbacks.GroupTable"},
    ]
    settings["trainer"] |= {"limit_val_batches": 0, "max_epochs": 1}
    Path(config).write_text(yaml.safe_dump(settings))
    main(["fit", "--config", config, "--name", "page"])
    return Path("runs/page/version_0")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_training_writes_what_its_page_shows(run, capsys):
    metrics = list(csv.DictReader((run / "metrics.csv").open()))
    groups = rows(run / "groups.jsonl")
    assert [row["iteration"] for row in groups] == [int(row["step"]) + 1 for row in metrics]
    for row, logged in zip(groups, metrics, strict=True):
        assert sum(row["sizes"]) == 16
        equal = sum(s in (0, size) for s, size in zip(row["successes"], row["sizes"], strict=True)) / len(row["sizes"])
        assert float(logged["frac_reward_zero_std"]) == pytest.approx(equal)
        assert float(logged["groups/frac_mixed"]) == pytest.approx(1 - equal)

    by_group = defaultdict(list)
    for row in rows(run / "rollouts.jsonl"):
        by_group[row["iteration"], row["prompt_id"]].append(row)
    sizes = {(row["iteration"], p): n for row in groups for p, n in zip(row["prompt_ids"], row["sizes"], strict=True)}
    assert {key: len(group) for key, group in by_group.items()} == sizes  # whole groups
    for group in by_group.values():
        total = sum(row["reward"] for row in group)
        for row in group:
            values = row["token_values"]
            assert len(row["tokens"]) == len(values["advantage"]) == min(4, row["response_length"])
            # DynaMO's advantage: leave-one-out, times both factors.
            raw = row["reward"] - (total - row["reward"]) / (len(group) - 1)
            factors = zip(values["beta_comp"], values["beta_stab"], strict=True)
            assert values["advantage"] == pytest.approx([raw * a * b for a, b in factors], abs=2e-3)
            assert all(value >= 0 for value in values["entropy"])

    pytest.importorskip("plotly", reason="needs the extra `report`")
    main(["report", str(run), "--output", "page.html"])
    assert capsys.readouterr().out.endswith("wrote    page.html\n")
    assert "Training reward (over prompts)" in Path("page.html").read_text()
