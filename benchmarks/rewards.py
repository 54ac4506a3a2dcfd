"""How fast, how right and how safe verification is.

    python benchmarks/rewards.py --json benchmarks/results/rewards.json
    git show 00ae3cc:dynamo_lightning/rewards/math.py > /tmp/math_0_1.py
    python benchmarks/rewards.py --baseline /tmp/math_0_1.py

The second form compares the throughput of `MathReward` with that of another version of its file, in one process and in
turns, and does nothing else; version 0.1 needs math-verify.

Three tables. **Throughput**: responses of 2,000 characters, none the same, to problems with 16 responses each, half of
them right, scored by `MathReward` in the pool with its usual limits; by how the final answer is given. **Hostile**: the
tests' generator of a thousand hostile responses, with what became of each kind, the longest time that one item took by
the clock of its worker, and the memory of the largest worker. **Answers** (if the benchmark files are there, see
`--benchmark_files`): gold answers that verify against themselves, and gold answers of other rows of the same benchmark,
of another value, that are accepted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_lightning.rewards import MathReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.types import Prompt, Rollout, Score

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "rewards"))

NUM_CHARACTERS, NUM_PROBLEMS, GROUP_SIZE, NUM_WORKERS = 2000, 125, 16, 2
FORMULAS = (
    "$x_i$", r"$\frac{1}{2}n(n+1)$", "$x = 3$", "12 + 5 = 17", r"\[ a^2 + b^2 = c^2 \]", r"\(y\)", r"$2\sqrt{3}$",
)  # fmt: skip
WORDS = tuple(
    "we have that the sum of is equal to hence and so then by the lemma which gives at most 40 therefore it".split()
)
ENDINGS = {
    "boxed": r"Therefore the answer is $\boxed{ANSWER}$.",
    "final answer": "The final answer is $ANSWER$.",
    "no answer": "and so on",
}


class TimedMathReward(MathReward):
    """Gives the time that it took, too."""

    name = "math"

    def components(self, prompt: str, response: str, answer: str, **columns: Any) -> dict[str, float]:
        """The reward and the seconds it took, by the clock and of the processor."""
        start, processor_start = time.perf_counter(), time.process_time()
        parts = super().components(prompt, response, answer, **columns)
        processor_seconds = time.process_time() - processor_start
        return {**parts, "seconds": time.perf_counter() - start, "processor_seconds": processor_seconds}


def make_rollout(response: str, answer: str) -> Rollout:
    """A rollout of which only the texts matter."""
    return Rollout(Prompt(0, "", "", (1,), answer), 0, np.array([1]), np.array([0.0]), response)


def make_answers(generator: random.Random) -> list[str]:
    """Answers of all kinds."""
    kinds = (
        lambda: str(generator.randint(1, 2000)),
        lambda: rf"\frac{{{generator.randint(1, 99)}}}{{{generator.randint(2, 99)}}}",
        lambda: rf"{generator.randint(2, 99)}\sqrt{{{generator.randint(2, 99)}}}",
        lambda: f"x^2 + {generator.randint(2, 99)}x - {generator.randint(2, 99)}",
        lambda: rf"[{generator.randint(1, 9)}, {generator.randint(10, 99)})",
    )
    return [kinds[index % len(kinds)]() for index in range(NUM_PROBLEMS)]


def make_responses(ending: str, seed: int) -> list[Rollout]:
    """As many responses as a batch of 125 problems has."""
    generator = random.Random(seed)
    answers = make_answers(generator)
    rollouts = []
    for answer in answers:
        for index in range(GROUP_SIZE):
            given = answer if index % 2 else generator.choice(answers)
            end = " " + ending.replace("ANSWER", given)
            text = " ".join(generator.choices(WORDS + 3 * FORMULAS, k=NUM_CHARACTERS // 3))[
                -NUM_CHARACTERS + len(end) :
            ]
            rollouts.append(make_rollout(text + end, answer))
    return rollouts


def measure_throughput() -> dict[str, dict[str, float]]:
    """Responses per second by ending, workers being warm: by the clock, and by the processor time of the rewards.

    The second is what the workers would do on cores of their own.
    """
    rates = {}
    with RewardScorer(TimedMathReward(), ScoringConfig(num_workers=NUM_WORKERS)) as scorer:
        scorer.score([make_rollout(r"\boxed{1}", "1")] * 64)
        for number, (name, ending) in enumerate(ENDINGS.items()):
            rollouts = make_responses(ending, seed=number)
            start = time.perf_counter()
            scores = scorer.score(rollouts)
            seconds = time.perf_counter() - start
            assert all(score.failure is None for score in scores)
            processor_seconds = sum(score.components["processor_seconds"] for score in scores) / NUM_WORKERS
            rates[name] = {"clock": len(rollouts) / seconds, "processor": len(rollouts) / processor_seconds}
    return rates


def compare_with(path: Path, repetitions: int = 3) -> dict[str, dict[str, float]]:
    """Verdicts per second of processor time, of this version and of the one in a file, best of some repetitions."""
    spec = importlib.util.spec_from_file_location("baseline_math", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["baseline_math"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    versions = {"baseline": module.MathReward(), "this": MathReward()}
    rates: dict[str, dict[str, float]] = {}
    for number, (name, ending) in enumerate(ENDINGS.items()):
        rollouts = make_responses(ending, seed=number)
        rates[name] = dict.fromkeys(versions, 0.0)
        for _ in range(repetitions):
            for version, reward in versions.items():
                reward.free_memory()
                reward.warm_up()
                start = time.process_time()
                for rollout in rollouts:
                    reward("", rollout.text, rollout.prompt.answer)
                rate = len(rollouts) / (time.process_time() - start)
                rates[name][version] = max(rates[name][version], rate)
    return rates


def measure_hostile() -> dict[str, Any]:
    """What became of a thousand hostile responses."""
    from hostile_responses import hostile_responses

    hostile = list(hostile_responses(1000))
    config = ScoringConfig(num_workers=NUM_WORKERS)
    start = time.perf_counter()
    with RewardScorer(TimedMathReward(), config) as scorer:
        scores = scorer.score([make_rollout(response, answer) for _, response, answer in hostile])
    seconds = time.perf_counter() - start
    by_kind: dict[str, Counter[str]] = {}
    for (kind, _, _), score in zip(hostile, scores, strict=True):
        by_kind.setdefault(kind, Counter())[outcome_of(score)] += 1
    return {
        "by_kind": by_kind,
        "seconds": seconds,
        "time_limit": config.time_limit,
        "longest_item": max(score.components.get("seconds", 0.0) for score in scores),
        "largest_worker_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
    }


def outcome_of(score: Score) -> str:
    """What became of one response."""
    return score.failure or ("right" if score.components["math"] else "wrong")


def measure_answers(folder: Path) -> dict[str, Any]:
    """Gold answers against themselves and against each other."""
    from test_benchmark_answers import REWARD, false_accepts, gold_answers, in_responses

    results = {}
    for name, answers in gold_answers(folder).items():
        rejected = [a for a in answers if any(REWARD("", text, a) != 1.0 for text in in_responses(a))]
        accepted, num_tried = false_accepts(answers, 20)
        results[name] = {"rows": len(answers), "rejected": rejected, "tried": num_tried, "accepted": accepted}
    return results


def main() -> None:
    """Measure, print, and write the records as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the records to")
    parser.add_argument("--benchmark_files", type=Path, default=ROOT.parent / "shared" / "data" / "benchmarks")
    parser.add_argument(
        "--baseline", type=Path, help="another version of rewards/math.py to compare the throughput with"
    )
    options = parser.parse_args()
    if options.baseline is not None:
        for name, rate in compare_with(options.baseline).items():
            print(f"  {name:14}{rate['this']:8.0f} per second, baseline {rate['baseline']:.0f}: ", end="")
            print(f"{rate['this'] / rate['baseline']:.2f} times")
        return
    results: dict[str, Any] = {"throughput": measure_throughput()}
    print(f"responses of {NUM_CHARACTERS} characters, {NUM_WORKERS} workers")
    for name, rate in results["throughput"].items():
        print(f"  {name:14}{rate['clock']:8.0f} per second, {rate['processor']:.0f} by processor time")
    hostile = results["hostile"] = measure_hostile()
    print(f"1,000 hostile responses in {hostile['seconds']:.0f} s")
    print(f"  longest item that ended {hostile['longest_item']:.2f} s of {hostile['time_limit']:.0f} s")
    print(f"  largest worker {hostile['largest_worker_gib']:.2f} GiB")
    for kind, counts in hostile["by_kind"].items():
        print(f"  {kind:20}" + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    if (options.benchmark_files / "math500.jsonl").is_file():
        results["answers"] = measure_answers(options.benchmark_files)
        for name, entry in results["answers"].items():
            print(
                f"  {name:14}{entry['rows']:6} rows, {len(entry['rejected'])} rejected; "
                f"{len(entry['accepted'])} of {entry['tried']} wrong answers accepted"
            )
            for accepted in entry["accepted"]:
                print(f"      row {accepted[0]}: {accepted[2]!r} for {accepted[1]!r}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
