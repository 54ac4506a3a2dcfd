"""Run folders as a training leaves them, written without a training."""

import csv
import json
import math

from dynamo_lightning.runs.summary import write_summary

HOSTILE = "</script><script>document.title='broken'</script><b>bold</b> & \u2028 \x07 {{SCRIPT}} \ud800"


def curves(iteration):
    """Metrics of an iteration, counted from 0, that every plot of the page has something of."""
    wave = math.sin(iteration)
    return {
        "reward": 0.3 + 0.01 * iteration + 0.02 * wave,
        "reward_prompt_mean": 0.3 + 0.01 * iteration,
        "entropy": 0.5 - 0.005 * iteration + 0.01 * wave,
        "stability/entropy_spikes": float(iteration >= 20),
        "grad_norm": 0.1 + 0.05 * wave**2,
        "clip_ratio/region_mean": 0.01 + 0.005 * wave,
        "sampling/sampling_logp_difference/mean": 1e-6,
        "sampling/sampling_logp_difference/max": 1e-4,
        "alloc/predicted_variance_ratio": 0.9,
        "alloc/realised_variance_ratio": 0.85 + 0.05 * wave,
        "alloc/measured_variance_ratio": 0.88,
        "alloc/best_variance_ratio": 0.8,
        "alloc/n_max": 12.0,
        "alloc/n_mean": 8.0,
        "alloc/n_min": 4.0,
        "groups/frac_solved": 0.2,
        "groups/frac_mixed": 0.5,
        "groups/frac_hopeless": 0.3,
        "groups/token_frac_solved": 0.1,
        "groups/token_frac_mixed": 0.5,
        "groups/token_frac_hopeless": 0.4,
        "frac_reward_zero_std": 0.5,
        "mod/beta_comp_mean": 1.1,
        "mod/beta_stab_mean": 0.99,
        "mod/frac_damped": 0.01,
        "completions/max_length": 20.0,
        "completions/mean_length": 12.0,
        "completions/min_length": 8.0,
        "completions/clipped_ratio": 0.05,
        "rewards/frac_timeout": 0.01,
        "perf/throughput": 12_000.0,
        "perf/peak_memory": 1.5,
        "timing_s/generate": 0.2,
        "timing_s/update": 0.1,
    }


def rollout(iteration, prompt_id, sample, **changes):
    """A row of `rollouts.jsonl`."""
    reward = float((prompt_id + sample) % 2)
    tokens = ["\\boxed", "{", str(sample), "}", "\n", "<eos>"]
    row = {
        "iteration": iteration,
        "prompt_id": prompt_id,
        "sample_index": sample,
        "source": "algebra" if prompt_id % 2 else "geometry",
        "prompt": f"Problem {prompt_id}?",
        "response": "".join(tokens[:-1]),
        "answer": str(prompt_id),
        "reward": reward,
        "components": {"math": reward},
        "failure": None,
        "response_length": len(tokens),
        "truncated": False,
        "tokens": tokens,
        "token_values": {
            "advantage": [reward - 0.5] * len(tokens),
            "entropy": [0.1 * i for i in range(len(tokens))],
            "beta_comp": [1.0 + 0.1 * i for i in range(len(tokens))],
        },
    }
    return row | changes


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder, num_iterations=40, seed=0, correct=(1, 2, 3, 4), rollouts=None, options="", tripwires=()):
    """A finished run; `correct` of four responses to each validation problem are right after it."""
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        names = [*curves(0), "epoch", "step", "val/toy/pass@1", "val/toy/pass@1_low", "val/toy/pass@1_high"]
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for iteration in range(num_iterations):
            validated = {"val/toy/pass@1": 0.5, "val/toy/pass@1_low": 0.4, "val/toy/pass@1_high": 0.6}
            row = curves(iteration) | {"step": iteration, "epoch": 0}
            writer.writerow(row | (validated if iteration % 10 == 9 else {}))
    prompts = [2**62 + 1, 2, 3]  # the first needs more digits than a JavaScript number has
    write_lines(
        folder / "groups.jsonl",
        (
            {
                "iteration": iteration + 1,
                "prompt_ids": prompts,
                "sizes": [4, 8, 12],
                "successes": [0, 4, 12],
                "tokens": [24, 48, 72],
                "expected": [0.1, 0.5, 0.9],
            }
            for iteration in range(num_iterations)
        ),
    )
    if rollouts is None:
        rollouts = [rollout(i, p, s) for i in (1, 11, 21, 31) for p in prompts[:2] for s in range(4)]
    write_lines(folder / "rollouts.jsonl", rollouts)
    if tripwires:
        write_lines(folder / "tripwires.jsonl", tripwires)
    (folder / "config.yaml").write_text(f"seed_everything: {seed}\nmodel:\n  lr: 0.1\n{options}")
    mean = sum(correct) / 4 / len(correct)
    summary = {
        "status": "finished",
        "iterations": num_iterations,
        "before": {"val/toy/pass@1": 0.25, "val/toy/pass@1_low": 0.2, "val/toy/pass@1_high": 0.3},
        "after": {"val/toy/pass@1": mean},
        "seconds": {"generate": 60.0, "update": 40.0},
        "final": {"alloc/predicted_variance_ratio": 0.9},
        "seed": seed,
        "counts": {"before": None, "after": {"toy": {str(i): [c, 4] for i, c in enumerate(correct)}}},
    }
    write_summary(folder / "summary.json", summary)
    return folder
