r"""What the embedded policy can do before reinforcement learning: exact success rates of every problem.

    python benchmarks/embedded_policy.py --json benchmarks/results/embedded_policy.json

A response counts as right if it is `\boxed{answer}`; its probability is read off the policy, nothing is sampled.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dynamo_lightning.allocation.variance import best_variance_ratio
from dynamo_lightning.data.arithmetic import exact_success_rates, split_problems

MODEL = "embedded:arithmetic-qwen3"


def summarise(rates: np.ndarray) -> dict[str, float]:
    """Mean success rate, best possible variance ratio of an allocation, shares of hopeless and of solved problems."""
    return {
        "num_problems": len(rates),
        "pass@1": float(rates.mean()),
        "best_variance_ratio": best_variance_ratio(rates * (1 - rates)),
        "share_below_0.005": float((rates <= 0.005).mean()),
        "share_above_0.995": float((rates >= 0.995).mean()),
    }


def main() -> None:
    """Print the table; with `--json` write it too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=None, help="File to write the rows to.")
    arguments = parser.parse_args()
    train, test = split_problems(seed=0)
    rows = []
    for split, problems in (("train", train), ("test", test)):
        rates = np.array(exact_success_rates(problems, MODEL))
        rows.append({"split": split, "kind": "all", **summarise(rates)})
        for kind in ("sum", "difference", "product", "long_product"):
            rows.append({"split": split, "kind": kind, **summarise(rates[[p.kind == kind for p in problems]])})
    table = Table(*rows[0], title="The embedded policy, exact success rates")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
