r"""The chain policy before reinforcement learning, or any policy on the chain task: exact success rates and the gates.

    python benchmarks/chain_policy.py --json benchmarks/results/chain_policy.json
    python benchmarks/chain_policy.py --model_name FOLDER    # a policy that `export` wrote, after a run

One response of each chain is right, so its probability, from one forward pass, is the success rate; nothing is sampled
for the tables. The gates take the policy as shipped: sampled pass@1 on held-out chains (their own responses, by the
generator and reward of real runs) from 20 to 45 %, greedy pass@1 at least 85 %, and the best possible variance ratio of
an allocation over the training chains, `(Σσ)² / (N Σσ²)`, at most 0.7. Intervals: 95 %, bootstrap over chains;
Wilson's for the greedy share.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamo_lightning.allocation.variance import best_variance_ratio
from dynamo_lightning.data.chain import KINDS, Chain, ChainReward, RightResponses, read_right_responses, split_chains
from dynamo_lightning.data.prompts import prompt_id
from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
from dynamo_lightning.rollout.runner import sample_rollouts
from dynamo_lightning.types import Prompt, RolloutRequest

MODEL = "embedded:chain-qwen3"
LENGTH_RANGES = ((5, 8), (9, 12), (13, 16), (17, 20))
MAX_RESPONSE_LENGTH = 52
NUM_BOOTSTRAP = 2000
GATES = {"sampled_pass@1": (0.20, 0.45), "greedy_pass@1": (0.85, 1.0), "best_variance_ratio": (0.0, 0.7)}
"""Lowest and highest value allowed."""


def exact_success_rate(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Chain) -> float:
    """Probability that the policy's response at temperature 1 is the right one, from one forward pass."""
    return read_right_responses(policy, tokenizer, [prompt]).success_rates[0]


def sampled_success_rates(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chains: list[Chain], num_samples: int, seed: int
) -> np.ndarray:
    """Share of right responses among sampled ones, `[num_chains]`."""
    requests = [
        RolloutRequest(
            Prompt(
                prompt_id("chain", chain.prompt, chain.answer),
                chain.prompt,
                chain.prompt,
                tuple(tokenizer(chain.prompt).input_ids),
                chain.answer,
            ),
            sample,
            seed * 10**9 + number * num_samples + sample,
        )
        for number, chain in enumerate(chains)
        for sample in range(num_samples)
    ]
    engine = TransformersEngine(batch_size=256)
    rollouts = sample_rollouts(
        engine, policy, tokenizer, requests, max_response_length=MAX_RESPONSE_LENGTH, temperature=1.0
    )
    reward = ChainReward()
    rewards = [reward(r.prompt.question, r.text, r.prompt.answer) * (not r.truncated) for r in rollouts]
    return np.array(rewards).reshape(len(chains), num_samples).mean(axis=1)


def oracle_ratio(rates: np.ndarray) -> float:
    """Best possible variance ratio of an allocation told the success rates."""
    return best_variance_ratio(rates * (1 - rates))


def with_interval(statistic: Callable[[np.ndarray], float], values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """A statistic of the chains' values and its 95 % percentile interval, bootstrapped over chains."""
    generator = np.random.default_rng(seed)
    draws = [statistic(values[generator.integers(0, len(values), len(values))]) for _ in range(NUM_BOOTSTRAP)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": float(statistic(values)), "low": float(low), "high": float(high)}


def share_with_interval(successes: np.ndarray) -> dict[str, float]:
    """A share and its 95 % Wilson interval: a bootstrap would have no width where all or none succeed."""
    z, n, share = 1.959964, len(successes), float(successes.mean())
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return {"value": share, "low": max(0.0, centre - half_width), "high": min(1.0, centre + half_width)}


def summarise(chains: list[Chain], read: RightResponses, split: str) -> list[dict[str, str | float]]:
    """Exact pass@1 of all chains, of each kind, and of each kind's ranges of lengths."""
    rates, greedy, steps = (np.array(values) for values in (read.success_rates, read.greedy, read.step_accuracies))
    rows: list[dict[str, str | float]] = []
    for kind in ("all", *KINDS):
        for first, last in ((5, 20), *LENGTH_RANGES):
            chosen = np.array([kind in ("all", c.kind) and first <= c.length <= last for c in chains])
            rows.append(
                {
                    "split": split,
                    "kind": kind,
                    "lengths": f"{first}-{last}",
                    "num_chains": int(chosen.sum()),
                    "pass@1": float(rates[chosen].mean()),
                    "greedy_pass@1": float(greedy[chosen].mean()),
                    "step_accuracy": float(steps[chosen].mean()),
                    "best_variance_ratio": oracle_ratio(rates[chosen]),
                }
            )
    return rows


def main() -> None:
    """Print the gates and the tables; with `--json` write them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="File to write the numbers to.")
    parser.add_argument("--model_name", default=MODEL, help="Policy to read.")
    parser.add_argument("--num_samples", type=int, default=8, help="Responses sampled for each held-out chain.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples; the data set's seed is 0.")
    arguments = parser.parse_args()
    began = time.perf_counter()
    policy = load_policy(arguments.model_name, PolicyConfig()).eval()
    tokenizer = load_tokenizer(arguments.model_name)
    train, test = split_chains(seed=0)
    read = {
        "train": read_right_responses(policy, tokenizer, train),
        "test": read_right_responses(policy, tokenizer, test),
    }
    sampled = sampled_success_rates(policy, tokenizer, test, arguments.num_samples, arguments.seed)
    gates = {
        "sampled_pass@1": with_interval(np.mean, sampled),
        "exact_pass@1": with_interval(np.mean, np.array(read["test"].success_rates)),
        "greedy_pass@1": share_with_interval(np.array(read["test"].greedy)),
        "best_variance_ratio": with_interval(oracle_ratio, np.array(read["train"].success_rates)),
    }
    for name, (low, high) in GATES.items():
        gates[name] |= {"allowed_low": low, "allowed_high": high, "passed": low <= gates[name]["value"] <= high}
    rows = summarise(train, read["train"], "train") + summarise(test, read["test"], "test")
    console = Console(width=110)
    table = Table("gate", "value", "95 % interval", "allowed", "passed", title=arguments.model_name)
    for name, gate in gates.items():
        allowed = f"{gate['allowed_low']} to {gate['allowed_high']}" if "passed" in gate else ""
        interval = f"{gate['low']:.3f} to {gate['high']:.3f}"
        table.add_row(name, f"{gate['value']:.3f}", interval, allowed, str(gate.get("passed", "")))
    console.print(table)
    table = Table(*rows[0], title="Exact success rates")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    result = {
        "model_name": arguments.model_name,
        "seed": arguments.seed,
        "num_samples": arguments.num_samples,
        "num_parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "seconds": round(time.perf_counter() - began, 1),
        "gates": gates,
        "rates": rows,
    }
    console.print({key: result[key] for key in ("seed", "num_samples", "num_parameters", "hardware", "seconds")})
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
