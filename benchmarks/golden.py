"""Golden numbers of short runs, each twice, to show that a change of the code changed no number it was not meant to.

    python benchmarks/golden.py --json before.json
    python benchmarks/golden.py --json after.json --compare before.json

Each run is a command of a new user in a temporary folder. Kept are a checksum of the trained weights and, for each
iteration, the metrics that do not measure time. A run that gives the same numbers twice must give them to the last bit
after the change; one that does not (engines batch by arrival) must stay within `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHORT = ["fit", "--config", "quickstart.yaml", "--trainer.limit_train_batches", "8", "--trainer.max_epochs", "2"]
SHORT += ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "1", "--seed_everything", "3"]
TWO = ["--trainer.devices", "2", "--model.policy.dtype", "float32"]
SMALL_ENGINE = ["--model.generator.cache_gib", "0.25", "--model.generator.max_model_len", "128"]
RUNS: dict[str, list[list[str]]] = {
    "dynamo": [SHORT],
    "grpo": [[*SHORT, "--config", "overlays/grpo.yaml"]],
    "pilot": [[*SHORT, "--data.pilot", "2"]],
    "updates": [[*SHORT, "--model.updates.num_epochs", "2", "--model.updates.num_mini_batches", "2"]],
    "ddp": [[*SHORT, *TWO, "--trainer.strategy", "ddp"]],
    "fsdp2": [[*SHORT, *TWO, "--trainer.strategy", "fsdp2"]],
    "colocated": [
        ["pad_heads", "--model_name", "embedded:arithmetic-qwen3", "--output_dir", "padded"],
        [*SHORT, "--config", "overlays/vllm_colocated.yaml", "--model.model_name", "padded", *SMALL_ENGINE],
    ],
    "resumed": [
        [*SHORT[:-6], "--seed_everything", "3", "--trainer.num_sanity_val_steps", "0", "--trainer.max_epochs", "1"],
        [*SHORT, "--ckpt_path", "{last}"],
    ],
}
"""By name the commands of a run, one after the other; `{last}` is the checkpoint of the one before."""
TOLERANCE = 1e-5
TIMES = ("timing_s/", "perf/", "alloc/measure_seconds")


def launch(arguments: list[str], folder: Path) -> None:
    """Run one command, in as many processes as it asks for."""
    number = arguments[arguments.index("--trainer.devices") + 1] if "--trainer.devices" in arguments else "1"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", number] if number != "1" else []
    command = [sys.executable, *torchrun, "-m", "dynamo_lightning", *arguments]
    if arguments[0] == "pad_heads":  # vLLM on a CPU does not take heads as small as the embedded policy's
        command = [sys.executable, "-m", "dynamo_lightning.engines.vllm.pad_heads", *arguments[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def numbers_of(run: Path) -> dict[str, Any]:
    """Checksum of the weights of the last checkpoint, and the metrics of every logged iteration."""
    from dynamo_lightning.checkpoints import read_weights

    weights = read_weights(str(run / "checkpoints" / "last.ckpt"))
    checksum = 0
    for name in sorted(weights):
        checksum = zlib.crc32(weights[name].float().contiguous().numpy().tobytes(), checksum)
    rows = []
    for row in csv.DictReader((run / "metrics.csv").open()):
        rows.append({name: float(value) for name, value in row.items() if value and not name.startswith(TIMES)})
    return {"weights": checksum, "metrics": rows}


def golden(commands: list[list[str]]) -> dict[str, Any]:
    """Numbers of one run in a fresh folder."""
    with tempfile.TemporaryDirectory() as name:
        folder, last = Path(name), ""
        for command in commands:
            launch([argument.format(last=last) for argument in command], folder)
            for newest in sorted(folder.glob("runs/*/version_*"), key=lambda path: path.stat().st_mtime)[-1:]:
                last = str(newest / "checkpoints" / "last.ckpt")
        return numbers_of(newest)


def largest_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Largest difference of a metric that both runs have, relative above 1; infinite if iterations are missing."""
    if len(a["metrics"]) != len(b["metrics"]):
        return float("inf")
    pairs = [(x[k], y[k]) for x, y in zip(a["metrics"], b["metrics"], strict=True) for k in x.keys() & y.keys()]
    return max((abs(x - y) / max(1.0, abs(x)) for x, y in pairs if x == x or y == y), default=0.0)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line for each run, and an empty list of failures if nothing changed."""
    failures = []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        repeats = old[0]["weights"] == old[1]["weights"]
        same = old[0]["weights"] == new[0]["weights"] and largest_difference(old[0], new[0]) == 0
        difference = largest_difference(old[0], new[0])
        spread = max(TOLERANCE, largest_difference(old[0], old[1]))
        fine = same or (not repeats and difference <= spread)
        print(f"{name:10} repeats {repeats!s:5} same bits {same!s:5} difference {difference:.1e} {'' if fine else '←'}")
        if not fine:
            failures.append(name)
    return failures


def main() -> None:
    """Print the checksums; with `--compare`, exit with an error if a number changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="File to write the numbers to.")
    parser.add_argument("--compare", type=Path, default=None, help="Numbers from before the change.")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="Runs to make.")
    arguments = parser.parse_args()
    numbers: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.only:
        numbers[name] = [golden(RUNS[name]) for _ in range(2)]
        print(f"{name:10} weights {[run['weights'] for run in numbers[name]]}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers) + "\n")
    if arguments.compare:
        failures = compare(json.loads(arguments.compare.read_text()), numbers)
        if failures:
            raise SystemExit(f"changed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
