"""Processor seconds of whole quickstart iterations, of this version relative to another one, in pairs of runs.

    python benchmarks/iterations.py --other ../old/.venv/bin/python --json benchmarks/results/iterations.json

The two Pythons run the same command in turn, so that a busy machine slows both. Each run tells its processor seconds
after every iteration (threads included, reward processes not). The first iterations are left out: they import and
compile. The interval is a bootstrap over pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

PROBE = '''"""Writes the processor seconds at the end of every iteration."""

import time

from lightning import Callback


class Probe(Callback):
    def on_train_batch_end(self, *arguments):
        with open("seconds.txt", "a") as file:
            file.write(f"{time.process_time()}\\n")
'''
NUM_LEFT_OUT = 2


def processor_seconds(python: str, num_iterations: int, seed: int) -> float:
    """Mean processor seconds of an iteration in one run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "probe.py").write_text(PROBE)
        command = [
            python, "-m", "dynamo_lightning", "fit", "--config", "quickstart.yaml", "--seed_everything", str(seed),
            "--trainer.max_epochs", "1", "--trainer.limit_train_batches", str(num_iterations), "--trainer.logger",
            "false", "--trainer.limit_val_batches", "0", "--trainer.callbacks", "[{class_path: probe.Probe}]",
        ]  # fmt: skip
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": name, "PATH": "/usr/bin:/bin", "HOME": name}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        seconds = np.array([float(line) for line in (folder / "seconds.txt").read_text().split()])
    return float((seconds[-1] - seconds[NUM_LEFT_OUT - 1]) / (len(seconds) - NUM_LEFT_OUT))


def compare(pairs: np.ndarray, num_resamples: int = 10_000) -> dict[str, Any]:
    """Ratio of the sums with its 95 % interval.

    Args:
        pairs: Seconds of the other version and of this one, `[num_pairs, 2]`.
        num_resamples: Bootstrap samples of the pairs.
    """
    chosen = np.random.default_rng(0).integers(0, len(pairs), (num_resamples, len(pairs)))
    sums = pairs[chosen].sum(1)
    low, high = np.quantile(sums[:, 1] / sums[:, 0], [0.025, 0.975])
    other, own = pairs.mean(0)
    ratio = float(own / other)
    return {"pairs": len(pairs), "other": float(other), "this": float(own), "ratio": ratio, "low": low, "high": high}


def main() -> None:
    """Print the ratio; with `--json` write it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", required=True, help="Python of the other version's environment.")
    parser.add_argument("--pairs", type=int, default=20, help="Pairs of runs.")
    parser.add_argument("--iterations", type=int, default=12, help="RL iterations of each run.")
    parser.add_argument("--json", type=Path, default=None, help="File to write the result to.")
    arguments = parser.parse_args()
    pairs = []
    for seed in range(arguments.pairs):
        pythons = [arguments.other, sys.executable]
        order = [0, 1] if seed % 2 else [1, 0]
        found = {which: processor_seconds(pythons[which], arguments.iterations, seed) for which in order}
        pairs.append([found[0], found[1]])
        result = compare(np.array(pairs))
        Console().print(
            f"pair {seed + 1}: {found[0]:.3f} and {found[1]:.3f} s; so far ratio {result['ratio']:.3f} "
            f"\\[{result['low']:.3f}, {result['high']:.3f}]"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
