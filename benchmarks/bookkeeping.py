"""Share of an iteration's time spent in allocation, in weights of the optimal baseline and in a pilot's bookkeeping.

    python benchmarks/bookkeeping.py --json benchmarks/results/bookkeeping.json

Each arm is a run of the quickstart, 32 prompts × 8 rollouts on the embedded policy, of which the first iterations are
left out. Functions are timed within the run, against the time of its whole iterations, so that a busy machine slows
both. The arms take turns in several rounds; each share is that of all rounds together.

`uniform` (`UniformRule`, `BetaPosterior`) is what any run pays for planning, observing and joining. `filter` puts
`LogitFilter` with the default rule in its place. `baseline` is `overlays/optimal_baseline.yaml`: `weights` is all that
comes after the scoring pass until the advantages are there: score norms, history, leave-one-out, metrics. The pass
itself gives Σπ² with the entropy, for every loss. `pilot` is `data.pilot: 4` with cross baselines: two plans, two
observations, and the join. Its second call of the generator, which costs time whatever the bookkeeping does, is
reported apart: `generate` is the time of all generation in each arm.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L

from dynamo_lightning import module
from dynamo_lightning.allocation.allocator import Allocator
from dynamo_lightning.cli import main as command
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.rollout.collect import RolloutCollector
from dynamo_lightning.update import known

NUM_LEFT_OUT = 3
ARMS = {
    "uniform": ["--data.rule=UniformRule", "--model.loss.advantage=RLOO"],
    "filter": ["--data.estimator=LogitFilter", "--model.loss.advantage=RLOO"],
    "baseline": ["--config=overlays/optimal_baseline.yaml"],
    "pilot": ["--data.pilot=4", "--data.pilot_baseline=cross", "--model.loss.advantage=RLOO"],
}
TIMED: dict[str, list[tuple[Any, str]]] = {
    "plan": [(Allocator, "plan"), (Allocator, "plan_commit")],
    "observe": [(RolloutDataModule, "observe")],
    "join": [(module, "join")],
    "weights": [(known, "with_advantages")],
    "generate": [(RolloutCollector, "sample")],
}
"""Functions by what they are counted as; none of them calls another."""
BOOKKEEPING = ("plan", "observe", "join", "weights")


class Watch(L.Callback):
    """Seconds of each iteration, and of what was timed in it."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.iterations: list[dict[str, float]] = []
        self.last = 0.0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted under this name."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] += time.perf_counter() - start

        return wrapper

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the first iteration; the batch is planned when the loader is asked for it."""
        self.spent.clear()
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End an iteration."""
        now = time.perf_counter()
        self.iterations.append({"iteration": now - self.last, **self.spent})
        self.spent.clear()
        self.last = now


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Time all of `TIMED`, and hand the callback to the next run."""
    originals = [(owner, name, getattr(owner, name)) for functions in TIMED.values() for owner, name in functions]
    for kind, functions in TIMED.items():
        for owner, name in functions:
            setattr(owner, name, watch.timed(kind, getattr(owner, name)))
    start = module.PolicyModule.configure_callbacks
    module.PolicyModule.configure_callbacks = lambda self: [*start(self), watch]  # type: ignore[method-assign, assignment, misc]
    try:
        yield
    finally:
        module.PolicyModule.configure_callbacks = start  # type: ignore[method-assign]
        for owner, name, original in originals:
            setattr(owner, name, original)


def run(arm: str, num_iterations: int) -> list[dict[str, float]]:
    """Seconds of each iteration but the first ones, by what was timed."""
    watch = Watch()
    with watching(watch):
        command([
            "fit", "--config=quickstart.yaml", *ARMS[arm], "--trainer.max_epochs=2",
            f"--trainer.limit_train_batches={num_iterations // 2}", "--trainer.limit_val_batches=0",
            "--trainer.enable_progress_bar=false",
        ])  # fmt: skip
    return watch.iterations[NUM_LEFT_OUT:]


def shares(iterations: list[dict[str, float]]) -> dict[str, float]:
    """Mean milliseconds of an iteration, and the share of its time that each of `TIMED` took."""
    total = sum(found["iteration"] for found in iterations)
    rows = {name: sum(found.get(name, 0.0) for found in iterations) / total for name in TIMED}
    return {
        "iteration_milliseconds": 1000 * total / len(iterations),
        "bookkeeping": sum(rows[name] for name in BOOKKEEPING),
        **rows,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=30, help="of each run, in two epochs")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each arm")
    parser.add_argument("--json", type=Path, help="file to write the shares to")
    options = parser.parse_args()
    target = options.json.resolve() if options.json else None
    iterations: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for _ in range(options.rounds):
            for arm, found in iterations.items():
                found += run(arm, options.iterations)
        os.chdir("/")
    results = {arm: shares(found) for arm, found in iterations.items()}
    columns = ("bookkeeping", *BOOKKEEPING, "generate")
    print(f"{'arm':10}{'iteration':>12}" + "".join(f"{name:>20}" for name in columns))
    for arm, row in results.items():
        mean = row["iteration_milliseconds"]
        cells = [f"{row[name]:.2%} {mean * row[name]:8.2f} ms" for name in columns]
        print(f"{arm:10}{mean:9.0f} ms" + "".join(f"{cell:>20}" for cell in cells))
    if target is not None:
        rounded = {arm: {name: round(value, 6) for name, value in row.items()} for arm, row in results.items()}
        target.write_text(json.dumps({"iterations": options.iterations, "arms": rounded}, indent=2) + "\n")


if __name__ == "__main__":
    main()
