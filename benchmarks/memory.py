"""How much memory a config needs in each phase of an RL iteration, before anything is downloaded or trained.

    python benchmarks/memory.py --json benchmarks/results/memory.json
    python benchmarks/memory.py --config qwen.yaml --data.prompts_per_batch 64 --trainer.devices 1

Runs a few iterations of `fit` with the given config (the quickstart's by default) and options, but random weights of
the policy's architecture and made-up prompts of the longest length allowed: a random policy hardly ever ends a response
before the length limit, so lengths are the largest, too. Rewards are tossed: every group has a learning signal.
Validation and checkpoints are left out. Peaks are those of the process that needs most: on a GPU of tensors, on a CPU
of resident memory, in which everything that Python imports counts (see `start`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.profilers import Profiler

from dynamo_lightning.distributed import gather_objects, rank

PHASES = ("start", "sync", "generate", "reward", "logprobs", "update")


def toss(prompt: str, response: str, answer: str) -> float:
    """A reward that does not depend on the response."""
    return float(random.random() < 0.5)


class PeakMemory(Profiler):
    """Keeps the largest memory use and the time of each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = {}
        self._started = 0.0

    def start(self, action_name: str) -> None:
        """Forget the peak so far."""
        if action_name in PHASES:
            if not self.peaks:
                self.peaks["start"] = peak_gib()
            reset_peak()
            self._started = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Note the peak since."""
        if action_name in PHASES:
            self.peaks[action_name] = max(self.peaks.get(action_name, 0.0), peak_gib())
            self.seconds.setdefault(action_name, []).append(time.perf_counter() - self._started)


def peak_gib() -> float:
    """Largest use since `reset_peak`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def reset_peak() -> None:
    """Start over from what is in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def write_prompts(path: Path, count: int, model_name: str, max_length: int) -> None:
    """Different prompts of almost the longest length allowed."""
    from dynamo_lightning.policy.loading import load_tokenizer

    tokenizer = load_tokenizer(model_name)
    filler = " + 1" * max_length
    with path.open("w") as file:
        for number in range(count):
            text = f"{number}{filler}"
            ids = tokenizer(text).input_ids[: max_length - 4]
            row = {"prompt": tokenizer.decode(ids, skip_special_tokens=True), "answer": "1"}
            file.write(json.dumps(row) + "\n")


def resolve(options: list[str]) -> dict[str, Any]:
    """The whole config that the options amount to."""
    from dynamo_lightning.cli import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*options, "--print_config"])
    return yaml.safe_load(text.getvalue())


def measure(given: list[str], num_iterations: int) -> dict[str, Any]:
    """Run the iterations; on every process, the largest peaks of all."""
    from dynamo_lightning.cli import main

    config = resolve(["fit", *given])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        num_prompts = config["data"]["prompts_per_batch"] * num_iterations
        write_prompts(path, num_prompts, config["model"]["model_name"], config["data"]["max_prompt_length"])
        source = {
            "path": str(path), "prompt_column": "prompt", "answer_column": "answer", "template": "{prompt}",
            "split": "train", "subset": None, "name": None, "prompt_pattern": None, "answer_pattern": None,
        }  # fmt: skip
        reward = {
            "class_path": "dynamo_lightning.rewards.FunctionReward",
            "init_args": {"function": "memory.toss"},
        }
        cli = main(
            [
                "fit", *given, "--model.policy.init=random", f"--data.train={json.dumps(source)}", "--data.val=[]",
                f"--model.reward={json.dumps(reward)}", "--trainer.max_epochs=1", "--trainer.callbacks=[]",
                f"--trainer.limit_train_batches={num_iterations}", "--trainer.limit_val_batches=0",
                "--trainer.num_sanity_val_steps=0", "--trainer.logger=false", "--trainer.enable_checkpointing=false",
                "--trainer.enable_progress_bar=false", "--trainer.profiler=memory.PeakMemory",
                f"--trainer.default_root_dir={folder}",
            ]
        )  # fmt: skip
    assert cli is not None
    trainer: Any = cli.trainer
    profiler: Any = trainer.profiler
    module: Any = cli.model
    everywhere = gather_objects([profiler.peaks])
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "world_size": cli.trainer.world_size,
        "num_parameters": sum(parameter.numel() for parameter in module.policy.parameters()),
        "phases": {
            phase: {"peak_gib": max(peaks[phase] for peaks in everywhere), "seconds": profiler.seconds.get(phase, [])}
            for phase in profiler.peaks
        },
    }


def main() -> None:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Everything else goes to `python -m dynamo_lightning fit`.",
    )
    parser.add_argument("--json", type=Path, help="file to write the record to")
    parser.add_argument("--iterations", type=int, default=3, help="RL iterations; the first warms up")
    options, given = parser.parse_known_args()
    sys.path.append(str(Path(__file__).parent))  # processes of rewards and of other ranks import this file by its name
    given = given if any(word in ("-c", "--config") for word in given) else ["--config", "quickstart.yaml", *given]
    record = measure(given, options.iterations)
    if rank() != 0:
        return
    where = f"{record['device']}, processes: {record['world_size']}"
    print(f"{' '.join(given)}: {record['num_parameters'] / 1e6:.1f} M parameters, {where}")
    print(f"{'phase':10}{'peak GiB':>10}{'seconds':>10}")
    for phase, entry in record["phases"].items():
        seconds = entry["seconds"][1:] or entry["seconds"]
        shown = f"{statistics.median(seconds):10.2f}" if seconds else ""
        print(f"{phase:10}{entry['peak_gib']:10.2f}{shown}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
