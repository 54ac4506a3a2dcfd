"""Processor time of an update of `LogitFilter`: 4,096 prompts of one iteration, half of them new.

    python benchmarks/filter_cost.py
    python benchmarks/filter_cost.py --features length dataset --visited 8192 131072 1000000 10000000

Observing the outcomes and closing the iteration before (drift and population) is measured, by the number of prompts
that were ever visited: it must not grow with it. The least of five is shown, for other programs only add to it. With
`--features` prompts have lengths and one of ten data sets.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_lightning.allocation import LogitFilter, PromptStatistics
from dynamo_lightning.allocation.prompt_features import FEATURES
from dynamo_lightning.allocation.records import FloatArray

BATCH_SIZE, GROUP_SIZE, TOKENS = 4096, 8, 800
DATASETS = np.arange(1, 11) * 6007.0
"""Codes of ten data sets."""


def draw_features(names: list[str], count: int, rng: np.random.Generator) -> FloatArray | None:
    """Log-lengths and codes of data sets, `[num_prompts, num_features]`; `None` without names."""
    columns = {"length": rng.normal(4.5, 0.6, count), "dataset": DATASETS[rng.integers(0, len(DATASETS), count)]}
    return np.stack([columns[name] for name in names], axis=1) if names else None


def measure(num_visited: list[int], features: list[str]) -> list[dict[str, Any]]:
    """Rows of visited prompts, milliseconds of an update and bytes for each visited prompt."""
    rng = np.random.default_rng(0)
    statistics = PromptStatistics(LogitFilter(features=features))
    ids = rng.integers(0, 2**63 - 1, max(num_visited))
    iteration, rows = 0, []
    for visited in sorted(num_visited):
        known, sizes = ids[:visited], np.full(visited, GROUP_SIZE)
        successes = rng.binomial(GROUP_SIZE, 0.4, visited)
        known_features = draw_features(features, visited, rng)
        statistics.observe(known, successes, sizes, iteration, np.full(visited, TOKENS), known_features)
        times = []
        for _ in range(5):
            iteration += 1
            half = BATCH_SIZE // 2
            batch = np.concatenate([rng.choice(known, half, replace=False), rng.integers(0, 2**63 - 1, half)])
            counts = np.full(BATCH_SIZE, GROUP_SIZE)
            successes = rng.binomial(GROUP_SIZE, 0.4, BATCH_SIZE)
            new_features = draw_features(features, BATCH_SIZE, rng)
            start = time.process_time()
            statistics.observe(batch, successes, counts, iteration, np.full(BATCH_SIZE, TOKENS), new_features)
            times.append(time.process_time() - start)
        iteration += 1
        bytes_each = statistics.nbytes / len(statistics)
        rows.append({"visited": visited, "milliseconds": 1000 * min(times), "bytes_per_prompt": bytes_each})
    return rows


def main() -> None:
    """Print the rows; with `--json` write them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="File to write the rows to.")
    parser.add_argument("--visited", type=int, nargs="+", default=[2**13, 2**17, 2**20], help="Prompts ever visited.")
    parser.add_argument("--features", nargs="*", choices=FEATURES, default=[], help="of the prompts")
    arguments = parser.parse_args()
    rows = measure(arguments.visited, arguments.features)
    for row in rows:
        print(f"{row['visited']:>10,} visited {row['milliseconds']:6.1f} ms {row['bytes_per_prompt']:5.1f} bytes each")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
