"""Cost of the default callbacks as a share of iteration time, by Lightning's profiler.

    python benchmarks/callbacks.py --json benchmarks/results/callbacks.json

A run of the quickstart with its default callbacks; seconds of each callback's hooks of an iteration relative to those
of the whole iteration, both in the same run, so that a busy machine slows both. The first iterations are left out: they
import and compile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from pathlib import Path

from lightning.pytorch.profilers import SimpleProfiler

from dynamo_lightning.cli import main as command

NUM_LEFT_OUT = 2
HOOK = re.compile(r"\[Callback\](\w+).*\.on_train_batch_(?:start|end)")


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


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    target = args.json.resolve() if args.json else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        cli = command([
            "fit", "--config", args.config, "--trainer.max_epochs=1",
            f"--trainer.limit_train_batches={args.iterations}",
            "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
            "--trainer.profiler=lightning.pytorch.profilers.SimpleProfiler",
        ])  # fmt: skip
        os.chdir("/")
    profiler = cli.trainer.profiler if cli is not None else None
    assert isinstance(profiler, SimpleProfiler)
    durations = profiler.recorded_durations
    found = shares(durations)
    calls = durations["run_training_batch"][NUM_LEFT_OUT:]
    seconds = sum(calls) / len(calls) / (1 - found["all"])
    print(f"mean iteration {1000 * seconds:.0f} ms")
    for name, share in found.items():
        print(f"{name:32}{share:8.2%}{1000 * share * seconds:8.2f} ms")
    if target is not None:
        target.write_text(
            json.dumps(
                {"config": args.config, "iterations": args.iterations, "iteration_seconds": seconds, "shares": found},
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
