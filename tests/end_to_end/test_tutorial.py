"""The tutorial, docs/first_run.md and docs/own_data.md: its commands run one after the other in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("first_run.md", "own_data.md")


def steps():
    """What a reader does, in order: (name, content) of a file to save, or ("", command)."""
    found = []
    for page in PAGES:
        text = (DOCS / page).read_text()
        for match in re.finditer(r"(?:[Ss]ave this as `([\w.]+)`[^`]*\n)?```\w*\n(.*?)```", text, re.DOTALL):
            name, body = match.groups()
            if name:
                found.append((name, body))
                continue
            lines = body.replace("\\\n", " ").splitlines()
            found += [("", line.strip()) for line in lines if line.startswith("python -m dynamo_lightning ")]
    return found


def test_the_tutorial_saves_files_before_it_uses_them():
    saved = set()
    for name, content in steps():
        if name:
            saved.add(name)
        else:
            assert set(re.findall(r"--config (mine\.yaml)|path: (problems\.jsonl)", content)) <= {
                ("mine.yaml", "") if "mine.yaml" in saved else None,
                ("", "problems.jsonl") if "problems.jsonl" in saved else None,
            }
    assert saved == {"problems.jsonl", "mine.yaml"}
    assert len([command for name, command in steps() if not name]) >= 5


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run_one_after_the_other(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, content in steps():
        if name:
            (tmp_path / name).write_text(content)
            continue
        command = content.replace("python", sys.executable, 1)
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == 0, f"{content}\n{(done.stdout + done.stderr)[-3000:]}"
    assert (tmp_path / "runs/first-grpo/version_0/summary.json").exists()
    assert list(tmp_path.glob("runs/mine/evaluations/*/predictions.jsonl")) or list(tmp_path.rglob("predictions.jsonl"))
    metrics = (tmp_path / "runs/mine/version_0/metrics.csv").read_text().splitlines()
    assert len(metrics) == 1 + 2 * 2  # two epochs of two batches of three prompts
