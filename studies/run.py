"""Run the runs of a study that have no result file yet: `python -m studies.run studies/noise_limited.py`.

Each finished run is a file in `studies/<name>/results/`. A run that is killed leaves none and is run again.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads: workers share the cores

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from dynamo_lightning.errors import RunError, UserError
from studies.design import Run, Study, load_study, results_folder
from studies.one_run import execute


def waiting_runs(study: Study, results: Path, only: str = "") -> list[Run]:
    """Runs without a result file whose names match a regular expression, in their order.

    Raises:
        UserError: If `only` is no regular expression.
    """
    try:
        re.compile(only)
    except re.error as error:
        raise UserError(f"--only={only} is no regular expression: {error}") from None
    return [run for run in study.runs() if re.search(only, run.name) and not (results / f"{run.name}.json").exists()]


def end_with(parent: int) -> None:
    """End this worker within a second after its parent, however that ends: a killed study leaves no run behind.

    Args:
        parent: Process id of the study.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_study(study: Study, results: Path, only: str, workers: int, minutes: float | None = None) -> int:
    """Run what is waiting; no run is begun after so many minutes.

    Returns:
        The number of runs that finished.

    Raises:
        UserError: If there is no worker, or `only` is no regular expression.
    """
    if workers < 1:
        raise UserError(f"--workers={workers} must be at least 1")
    waiting = waiting_runs(study, results, only)
    total, began, done = len(waiting), time.monotonic(), 0
    print(f"{study.name}: {total} runs to do, results in {results}", flush=True)
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with, initargs=(os.getpid(),)) as pool:
        running: dict[Future[float], Run] = {}
        while waiting or running:
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                waiting.clear()
            while waiting and len(running) < workers:
                run = waiting.pop(0)
                running[pool.submit(execute, study, run, results)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                run, seconds = running.pop(future), future.result()
                done += 1
                left = (time.monotonic() - began) / done * (total - done) / 60
                print(f"{run.name}: {seconds:.0f} s; {done} of {total}, {left:.0f} min left", flush=True)
    return done


def repeat(study: Study, results: Path, name: str) -> bool:
    """Run a finished run again, into a folder of its own, and compare the two curves.

    Args:
        study: The design.
        results: Folder of its result files.
        name: Name of the run, such as `grpo_1e-04_2`.

    Returns:
        True if tokens and values of all evaluations are the same, to the last digit that is kept.

    Raises:
        UserError: If there is no such run, or it is not finished.
    """
    run = next((run for run in study.runs() if run.name == name), None)
    if run is None or not (results / f"{name}.json").is_file():
        raise UserError(f"--again={name} is no finished run of {study.name}: give the name of a file in {results}")
    with tempfile.TemporaryDirectory(prefix="again-") as folder:
        execute(study, run, Path(folder))
        curves = [json.loads((place / f"{name}.json").read_text())["curve"] for place in (results, Path(folder))]
    same = all(curves[0][column] == curves[1][column] for column in ("iteration", "tokens", "value"))
    print(f"{name}: {'the same curve again' if same else f'other curves: {curves[0]} and now {curves[1]}'}")
    return same


def main(args: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m studies.run", description=__doc__)
    parser.add_argument("design", type=Path, help="file of the study, such as studies/noise_limited.py")
    parser.add_argument("--only", default="", help="regular expression; runs whose names match it, such as _1e-04_0$")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, one core each")
    parser.add_argument("--minutes", type=float, default=None, help="begin no run after so many minutes")
    parser.add_argument("--again", default=None, metavar="NAME", help="run a finished run again and compare the curves")
    options = parser.parse_args(args)
    try:
        study, results = load_study(options.design), results_folder(options.design)
        if options.again is not None:
            sys.exit(0 if repeat(study, results, options.again) else 1)
        run_study(study, results, options.only, options.workers, options.minutes)
    except (UserError, RunError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
