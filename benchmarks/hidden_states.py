"""What the policy's hidden states tell of unseen prompts: first epochs over the embedded tasks, simulated.

    python benchmarks/hidden_states.py

The success rate of every training prompt is read off the embedded policy: the probability of the one response that the
data have. The policy stands still. An epoch visits every prompt once, in batches of 32, with 8 rollouts on average and
sizes from 2 to 24 by the rule `rloo`; outcomes are drawn. `LogitFilter` allocates without features, with `length`, and
with `hidden_state`: scores learned online from the hidden states at the prompts' last tokens (`HiddenScores`), each
made before any outcome of its own prompt.

Printed are the variance Σ p(1 − p)/(n − 1) relative to equal groups over the first epoch's quarters, the mean over
replications (order and outcomes) ± half of the 95 % interval, and the seconds of one forward pass over all prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drifting_pools import T_QUANTILES
from numpy.typing import NDArray

from dynamo_lightning.allocation import LogitFilter, PromptStatistics, RLOORule, allocate_rollouts
from dynamo_lightning.allocation.hidden_scores import HiddenScores
from dynamo_lightning.data.collate import IGNORED, collate
from dynamo_lightning.policy.embedded import local_path
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer

Array = NDArray[np.float64]

BATCH, MEAN_SIZE, BOUNDS = 32, 8, (2, 24)
REPLICATIONS = 10
FEATURES: dict[str, list[str]] = {"none": [], "length": ["length"], "hidden_state": ["hidden_state"], "oracle": []}


class Task:
    """An embedded task's prompts as the policy sees them."""

    def __init__(self, name: str) -> None:
        folder = f"embedded:{name}-qwen3"
        policy, tokenizer = load_policy(folder, PolicyConfig()).eval(), load_tokenizer(folder, PolicyConfig())
        rows = [json.loads(line) for line in Path(local_path(f"embedded:{name}/train.jsonl")).open()]
        prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
        answers = [row["answer"] if name == "chain" else rf"\boxed{{{row['answer']}}}" for row in rows]
        responses = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
        pairs = [(p, [*r, tokenizer.eos_token_id]) for p, r in zip(prompts, responses, strict=True)]
        self.log_lengths = np.log([len(prompt) for prompt in prompts])
        rates, states, self.seconds = [], [], 0.0
        for begin in range(0, len(pairs), 128):
            batch = collate(pairs[begin : begin + 128], int(tokenizer.pad_token_id))
            labels = batch.pop("labels")[:, 1:]
            is_response = labels != IGNORED
            with torch.no_grad():
                logits = policy(**batch, use_cache=False).logits[:, :-1].double()
                start = time.process_time()
                hidden = policy.base_model(
                    **{key: value[:, : int(is_response.int().argmax(1).max()) + 1] for key, value in batch.items()},
                    use_cache=False,
                ).last_hidden_state
                self.seconds += time.process_time() - start
            logprobs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            rates.append(logprobs.masked_fill(~is_response, 0.0).sum(1).exp())
            states.append(hidden[torch.arange(len(hidden)), is_response.int().argmax(1)].double())
        self.rates, self.states = torch.cat(rates).numpy(), torch.cat(states).numpy()


def first_epoch(task: Task, feature: str, seed: int) -> list[float]:
    """Return the ratio of each quarter of the first epoch."""
    rng = np.random.default_rng([seed, 14])
    order = rng.permutation(len(task.rates))[: len(task.rates) // BATCH * BATCH]
    store, scores = PromptStatistics(LogitFilter(features=FEATURES[feature])), HiddenScores()
    parts = []
    for iteration, begin in enumerate(range(0, len(order), BATCH)):
        ids = order[begin : begin + BATCH]
        values: Array | None = None
        if feature == "hidden_state":
            values = scores.score(ids.tolist(), task.states[ids], iteration)[:, None]
        elif feature == "length":
            values = task.log_lengths[ids][:, None]
        p = task.rates[ids]
        variances = p * (1 - p)
        estimate: Any = variances if feature == "oracle" else store.estimate(ids, iteration, values)
        sizes = allocate_rollouts(estimate, ids, MEAN_SIZE * BATCH, *BOUNDS, RLOORule())
        successes = rng.binomial(sizes, p)
        scores.observe(ids.tolist(), successes, sizes, iteration)
        store.observe(ids, successes, sizes, iteration, features=values)
        parts.append(((variances / (sizes - 1)).sum(), (variances / (MEAN_SIZE - 1)).sum()))
    quarters = np.array_split(np.array(parts), 4)
    return [float(quarter[:, 0].sum() / quarter[:, 1].sum()) for quarter in quarters]


def measure(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a record for each task, feature and quarter."""
    records = []
    for name in names:
        task = Task(name)
        print(f"{name}: {len(task.rates)} prompts, hidden states in {task.seconds:.2f} s of processor time", flush=True)
        for feature in FEATURES:
            found = list(zip(*(first_epoch(task, feature, seed) for seed in range(REPLICATIONS)), strict=True))
            line = f"  {feature:12}"
            for quarter, values in enumerate(found):
                mean = statistics.fmean(values)
                margin = T_QUANTILES[REPLICATIONS] * statistics.stdev(values) / math.sqrt(REPLICATIONS)
                records.append({"task": name, "feature": feature, "quarter": quarter, "ratio": mean, "margin": margin})
                line += f"  {mean:.3f} ± {margin:.3f}"
            print(line, flush=True)
    return records


def main() -> None:
    """Measure, print, and write the records as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["arithmetic", "chain"], choices=["arithmetic", "chain"])
    parser.add_argument("--json", type=Path, help="file to write the records to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = measure(arguments.tasks)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
