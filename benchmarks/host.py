r"""Host-side cost of a paper-scale batch, without a policy: exchange between processes, join, micro-batches.

    python benchmarks/host.py --json benchmarks/results/host.json

8,192 rollouts (512 prompts × 16) with responses of 1,000 and of 8,000 tokens on average, in 1 and in 4 processes. Each
row has the seconds of the slowest process, the memory beyond the rollouts themselves (peak resident bytes of any
process) and the largest number of tokens that a process receives, relative to an equal share.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dynamo_lightning.allocation.groups import make_groups
from dynamo_lightning.losses.advantages import RLOO
from dynamo_lightning.policy.packing import MicroBatches
from dynamo_lightning.rollout.exchange import spread_over_ranks
from dynamo_lightning.types import (
    Collected,
    GroupPlan,
    Outcome,
    Prompt,
    PromptBatch,
    Rollout,
    RolloutBatch,
    Score,
)
from dynamo_lightning.update.join import join

NUM_PROMPTS, GROUP_SIZE, PROMPT_LENGTH = 512, 16, 100
MAX_TOKENS_FACTOR = 16
"""Tokens of a micro-batch, in mean response lengths."""


def make_batch(mean_length: int, rank: int, num_processes: int) -> tuple[PromptBatch, list[Outcome], list[Rollout]]:
    """The batch with all outcomes, and the rollouts that this process sampled; lengths from a half to 1.5 times."""
    generator = np.random.default_rng(0)
    prompts = [Prompt(i, "q", "q", tuple(range(PROMPT_LENGTH)), "1") for i in range(NUM_PROMPTS)]
    lengths = generator.integers(mean_length // 2, mean_length * 3 // 2, (NUM_PROMPTS, GROUP_SIZE))
    rewards = generator.random((NUM_PROMPTS, GROUP_SIZE)) < 0.5
    outcomes, rollouts = [], []
    for prompt in prompts:
        for index in range(GROUP_SIZE):
            length = int(lengths[prompt.prompt_id, index])
            score = Score(float(rewards[prompt.prompt_id, index]), {})
            outcomes.append(Outcome(prompt.prompt_id, index, score, length, False))
            if (prompt.prompt_id * GROUP_SIZE + index) % num_processes == rank:
                token_ids = generator.integers(0, 150_000, length, dtype=np.int32)
                logprobs = np.full(length, -0.5, dtype=np.float32)
                rollouts.append(Rollout(prompt, index, token_ids, logprobs, "x" * length))
    return PromptBatch(0, [GroupPlan(prompt, GROUP_SIZE) for prompt in prompts]), outcomes, rollouts


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(work: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds, peak of the memory beyond what was held before, and the result."""
    before, peak, is_done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.002):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    is_done.set()
    watcher.join()
    return seconds, max(peak, resident_bytes()) - before, result


def run_process(rank: int, num_processes: int, mean_length: int, port: int, path: str) -> None:
    """What one process measures; the first writes the rows of all."""
    torch.set_num_threads(1)
    if num_processes > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=num_processes)
    batch, outcomes, rollouts = make_batch(mean_length, rank, num_processes)
    rows: list[dict[str, Any]] = []

    def note(phase: str, seconds: float, extra_bytes: int, num_tokens: int) -> None:
        parts: list[Any] = [None] * num_processes
        mine = (seconds, extra_bytes, num_tokens)
        if num_processes > 1:
            dist.all_gather_object(parts, mine)
        else:
            parts = [mine]
        total = sum(part[2] for part in parts)
        rows.append(
            {
                "tokens": total,
                "processes": num_processes,
                "phase": phase,
                "seconds": max(part[0] for part in parts),
                "extra_bytes": max(part[1] for part in parts),
                "largest_share": max(part[2] for part in parts) / (total / num_processes),
            }
        )

    def tokens(chosen: list[Rollout]) -> int:
        return sum(len(rollout.token_ids) for rollout in chosen)

    seconds, extra, own = measured(lambda: spread_over_ranks(rollouts, outcomes, batch.prompts, (4, 1)))
    note("exchange", seconds, extra, tokens(own))

    def group_and_join() -> RolloutBatch:
        groups = make_groups(batch.plans, own, outcomes)
        return join(Collected(batch.iteration, groups, own[0], 0, {}), RLOO())

    seconds, extra, joined = measured(group_and_join)
    note("join", seconds, extra, tokens(own))

    def cut() -> int:
        limit = MAX_TOKENS_FACTOR * mean_length
        indices = range(len(joined.rollouts))
        micro_batches = MicroBatches(joined.rollouts, indices, joined.filler, limit, torch.device("cpu"))
        return sum(micro_batch.targets.numel() for micro_batch, counts in micro_batches if counts)

    seconds, extra, num_cut = measured(cut)
    assert num_cut == tokens(own)
    note("micro_batches", seconds, extra, num_cut)
    if rank == 0:
        Path(path).write_text(json.dumps(rows))
    if num_processes > 1:
        dist.destroy_process_group()


def measure(mean_length: int, num_processes: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of one setting, each process new."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    path = folder / f"{mean_length}-{num_processes}.json"
    arguments = (num_processes, mean_length, port, str(path))
    torch.multiprocessing.spawn(run_process, arguments, nprocs=num_processes)  # type: ignore[attr-defined]
    return json.loads(path.read_text())


def main() -> None:
    """Print the table; with `--json` write it too."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="File to write the rows to.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 8000], help="Mean response lengths, tokens.")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4], help="Numbers of processes.")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for mean_length in arguments.lengths:
            for num_processes in arguments.processes:
                rows += measure(mean_length, num_processes, Path(folder))
    table = Table(*rows[0], title="Host-side cost of 8,192 rollouts")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else f"{value}" for value in row.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
