"""Cost of the default callbacks as a share of iteration time, by Lightning's profiler.

    python benchmarks/callbacks.py --json benchmarks/results/callbacks.json

Two runs of the quickstart with its default callbacks and without validation: with its own policy (340,000 parameters),
and with a random Qwen3 of 10 million. Seconds of each callback's hooks of an iteration relative to those of the whole
iteration, both in the same run, so that a busy machine slows both. The first two iterations are left out: they import
and compile. The first run's mean includes what happens every 10, 20 or 50 iterations (rollouts, checkpoints, pictures);
the second has 6 iterations.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch.profilers import SimpleProfiler
from rich.console import Console
from rich.table import Table

from dynamo_lightning.cli import main as command
from dynamo_lightning.policy.embedded import local_path

NUM_LEFT_OUT = 2
HOOK = re.compile(r"\[Callback\](\w+).*\.on_train_batch_(?:start|end)")
LARGER = {
    "hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 40,
}  # fmt: skip
REWARD = """import zlib


def even(prompt, response, answer):
    return float(zlib.crc32(response.encode()) % 2)
"""


def shares(durations: dict[str, list[float]]) -> dict[str, float]:
    """Share of iteration time by callback, the most expensive first, and `all` of them.

    Args:
        durations: Seconds of each call, by the profiler's name of what was called.
    """
    seconds: dict[str, float] = {}
    for name, calls in durations.items():
        if match := HOOK.match(name):
            seconds[match[1]] = seconds.get(match[1], 0.0) + sum(calls[NUM_LEFT_OUT:])
    iterations = sum(durations["run_training_batch"][NUM_LEFT_OUT:]) + sum(seconds.values())
    found = {name: value / iterations for name, value in sorted(seconds.items(), key=lambda item: -item[1])}
    return {"all": sum(found.values()), **found}


def larger_policy() -> list[str]:
    """Makes a random policy and a reward of its responses' checksum in the current folder: options of `fit` for both.

    A random policy's answers are all wrong; with a reward of 0 for all of them it would never be updated.
    """
    shutil.copytree(local_path("embedded:arithmetic-qwen3"), "larger", ignore=shutil.ignore_patterns("*.safetensors"))
    path = Path("larger/config.json")
    config = json.loads(path.read_text())
    del config["layer_types"]  # as many as layers
    path.write_text(json.dumps(config | LARGER))
    Path("even_reward.py").write_text(REWARD)
    sys.path.insert(0, os.getcwd())
    os.environ["PYTHONPATH"] = os.getcwd()
    return [
        "--model.model_name=larger", "--model.policy.init=random",
        "--model.reward=dynamo_lightning.rewards.FunctionReward", "--model.reward.function=even_reward.even",
    ]  # fmt: skip


def measured(name: str, epochs: int, iterations: int | None) -> dict[str, Any]:
    """Run in an empty folder.

    Args:
        name: Of the policy, `embedded` or `larger`.
        epochs: Passes over the problems.
        iterations: Iterations of each, all of them if none.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        limit = [f"--trainer.limit_train_batches={iterations}"] if iterations else []
        cli = command([
            "fit", "--config=quickstart.yaml", *(larger_policy() if name == "larger" else []),
            f"--trainer.max_epochs={epochs}", *limit, "--trainer.limit_val_batches=0",
            "--trainer.enable_progress_bar=false", "--trainer.profiler=lightning.pytorch.profilers.SimpleProfiler",
        ])  # fmt: skip
        os.chdir("/")
    assert cli is not None
    profiler, policy = cli.trainer.profiler, cli.model.policy
    assert isinstance(profiler, SimpleProfiler)
    durations = profiler.recorded_durations
    found = shares(durations)
    calls = durations["run_training_batch"][NUM_LEFT_OUT:]
    return {
        "policy": name,
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "iterations": len(calls),
        "iteration_seconds": sum(calls) / len(calls) / (1 - found["all"]),
        "shares": found,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", nargs="+", default=["embedded", "larger"], choices=["embedded", "larger"])
    parser.add_argument("--epochs", type=int, default=3, help="Passes of 35 iterations with the embedded policy.")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    target = args.json.resolve() if args.json else None
    sizes = {"embedded": (args.epochs, None), "larger": (1, 8)}
    rows = [measured(name, *sizes[name]) for name in args.policies]
    for row in rows:
        milliseconds = 1000 * row["iteration_seconds"]
        title = f"{row['parameters']:,} parameters, {row['iterations']} iterations of {milliseconds:.0f} ms"
        table = Table("callback", "share", "ms", title=title)
        for name, share in row["shares"].items():
            table.add_row(name, f"{share:.2%}", f"{share * milliseconds:.2f}")
        Console().print(table)
    if target is not None:
        target.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
