"""One training run of a study, by the command line of the package, and its result file."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from dynamo_lightning.errors import RunError
from dynamo_lightning.files import write_atomically
from studies.design import Run, Study


def arguments(study: Study, run: Run, shared: str) -> list[str]:
    """Arguments of `python -m dynamo_lightning` for a run.

    Args:
        study: Names the run's folder.
        run: One of the study.
        shared: Path of a config file with the study's shared options.
    """
    return ["fit", f"--config={shared}", f"--name={study.name}", *run.options]


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Everything that the process prints goes to a file, also by loggers that remember an earlier standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with path.open("a") as stream, redirect_stdout(stream), redirect_stderr(stream):
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
            yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def execute(study: Study, run: Run, results: Path) -> float:
    """Train, and write the run's result file when all of it is done; a killed run leaves none.

    Returns:
        Seconds that it took, start and evaluations included.
    """
    from dynamo_lightning.cli import main

    results, began = results.absolute(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="study-") as name:
        folder = Path(name)
        shared = folder / "shared.json"  # JSON is YAML
        shared.write_text(json.dumps(study.shared))
        log = folder / "log.txt"
        with chdir(folder), output_to(log):
            main(arguments(study, run, str(shared)))
        found = list(folder.glob("**/metrics.csv"))
        if len(found) != 1:
            raise RunError(f"{run.name}: {len(found)} metrics.csv were written instead of 1\n{log.read_text()[-2000:]}")
        result = result_of(study, run, found[0])
    seconds = time.perf_counter() - began
    write_atomically(results / f"{run.name}.json", json.dumps(result | {"seconds": round(seconds, 2)}) + "\n")
    return seconds


def result_of(study: Study, run: Run, metrics: Path) -> dict[str, Any]:
    """Content of a result file: the run's options, and its curve at every evaluation.

    `tokens` are all that were generated for training until then, pilots and what dynamic sampling discards included
    (discarded responses are taken to be as long as the kept ones); `train_seconds` leave evaluations out.
    """
    curve: dict[str, list[float]] = {"iteration": [], "tokens": [], "train_seconds": [], "value": []}
    final: dict[str, float] = {}
    tokens = seconds = 0.0
    iterations = 0
    for row in csv.DictReader(metrics.read_text().splitlines()):
        if row["completions/mean_length"]:
            iterations += 1
            kept = float(row.get("dynamic_sampling/frac_kept") or 1)
            tokens += float(row["alloc/budget"]) * float(row["completions/mean_length"]) / kept
            seconds += sum(float(value) for name, value in row.items() if name.startswith("timing_s/") and value)
        final |= {name: float(row[name]) for name in study.final_metrics if row.get(name)}
        if row.get(study.metric):
            curve["iteration"].append(iterations)
            curve["tokens"].append(round(tokens))
            curve["train_seconds"].append(round(seconds, 3))
            curve["value"].append(round(float(row[study.metric]), 5))
    reached = study.target is not None and max(curve["value"], default=-math.inf) >= study.target
    if not curve["value"] or not (reached or iterations >= study.limit):
        raise RunError(f"{run.name} ended after {iterations} iterations, before the target and before {study.limit}")
    if missing := [name for name in study.final_metrics if name not in final]:
        raise RunError(f"{run.name} logged no {', '.join(missing)}")
    return {
        "study": study.name,
        "frozen_on": study.frozen_on,
        "arm": run.arm.name,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "options": list(run.options),
        "iterations": iterations,
        "tokens": round(tokens),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "curve": curve,
        **({"final": final} if final else {}),
    }
