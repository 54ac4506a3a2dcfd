"""Tokens per second: whole RL iterations beside TRL's GRPOTrainer, and packed beside padded training.

    python benchmarks/throughput.py --json benchmarks/results/throughput.json

Iterations: the same random 0.8 M Qwen3, prompts, reward and learning rate; 32 prompts × 8 rollouts of up to 64 tokens,
one optimizer step; in some runs half of the groups get equal rewards, so that their advantages are 0. Tokens are those
of prompts and responses; seconds are those of the whole iteration: generation, rewards, scoring, update. Ours runs
twice: with the loss that TRL has, GRPO's, and with DynaMO's modulation. `--peers PATH` is a folder that TRL is
installed in; it gets the micro-batch size that is fastest for it among those listed.

Packing: forward and backward of the same policy over 256 rollouts of 1 to 512 tokens (most of them short), packed, in
padded batches in random order, and in padded batches sorted by length; the same head and loss. Tokens are real ones.

Each contender is a process of its own and they take turns, so that a busy machine hits them alike; medians over
iterations and rounds, with the smallest and largest round. Where other programs take the cores between, wall seconds
say little: `--clock processor` counts the processor seconds of each contender's process, on one thread.
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
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynamo_lightning.rewards.reward import Reward

NUM_PROMPTS, GROUP_SIZE, MAX_RESPONSE_LENGTH, NUM_WARM_UP, NUM_ITERATIONS = 32, 8, 64, 2, 6
TRL_BATCH_SIZES = (64, 256)
SHARES = (0.0, 0.5)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


# --- what all contenders share ----------------------------------------------------------------------------------------


def reward_of(response: str, answer: str) -> float:
    """A coin that the response tosses; 0 for prompts whose groups are to have equal rewards."""
    return 0.0 if answer == "equal" else float(zlib.crc32(response.encode()) % 2)


class CoinReward(Reward):
    """`reward_of`."""

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """As the base class says."""
        return reward_of(response, answer)


def write_policy(folder: str, max_position_embeddings: int) -> None:
    """A random Qwen3 of 0.8 million parameters with a character tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dynamo_lightning.data.arithmetic import write_architecture

    write_architecture(Path(folder))
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.head_dim, config.num_hidden_layers = 128, 384, 32, 4
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.max_position_embeddings = max_position_embeddings
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def prompts(zero_advantage_share: float) -> list[dict[str, str]]:
    """Rows of the data set."""
    num_equal = round(zero_advantage_share * NUM_PROMPTS)
    kinds = ["equal" if i < num_equal else "mixed" for i in range(NUM_PROMPTS)]
    return [{"prompt": f"What is {i}+{7 * i % 10}?", "answer": kind} for i, kind in enumerate(kinds)]


# --- whole iterations -------------------------------------------------------------------------------------------------


def our_iterations(folder: str, share: float, modulated: bool, now: Callable[[], float]) -> list[float]:
    """Tokens per second of each iteration of `PolicyModule`."""
    import lightning as L

    from dynamo_lightning.allocation import UniformRule
    from dynamo_lightning.data.source import PromptSource
    from dynamo_lightning.datamodule import RolloutDataModule
    from dynamo_lightning.engines.engine import SamplingConfig
    from dynamo_lightning.engines.transformers import TransformersEngine
    from dynamo_lightning.losses.advantages import GRPO
    from dynamo_lightning.losses.modulation import DynamoModulation
    from dynamo_lightning.losses.policy_loss import PolicyLoss
    from dynamo_lightning.module import PolicyModule
    from dynamo_lightning.rewards.scorer import ScoringConfig
    from dynamo_lightning.update.config import UpdateConfig

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_train_batch_start(self, *arguments: Any) -> None:
            self.start = now()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *arguments: Any) -> None:
            self.rates.append(outputs["record"].num_tokens / (now() - self.start))

    path = Path(folder) / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts(share)))
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=NUM_WARM_UP + NUM_ITERATIONS,
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = PolicyModule(
        folder,
        generator=TransformersEngine(batch_size=256),
        sampling=SamplingConfig(max_response_length=MAX_RESPONSE_LENGTH),
        reward=CoinReward(),
        scoring=ScoringConfig(num_workers=1),
        loss=PolicyLoss(advantage=GRPO(), modulation=DynamoModulation() if modulated else None),
        updates=UpdateConfig(max_tokens_per_micro_batch=4096),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6),
    )
    data = RolloutDataModule(
        train=PromptSource(str(path), template="{prompt}"),
        prompts_per_batch=NUM_PROMPTS,
        rollouts_per_prompt=GROUP_SIZE,
        rule=UniformRule(),
    )
    trainer.fit(module, datamodule=data)
    return clock.rates[NUM_WARM_UP:]


def trl_iterations(folder: str, share: float, batch_size: int, now: Callable[[], float]) -> list[float]:
    """Tokens per second of each iteration of TRL's `GRPOTrainer`."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.tokens: list[float] = []

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            self.times.append(now())
            self.tokens.append(float(trainer.state.num_input_tokens_seen))

    def coin(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [reward_of(*pair) for pair in zip(completions, answer, strict=True)]

    clock = Clock()
    arguments = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10**6,
        max_steps=NUM_WARM_UP + NUM_ITERATIONS,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=NUM_PROMPTS * GROUP_SIZE // batch_size,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_RESPONSE_LENGTH,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=1e-6,
    )
    trainer = GRPOTrainer(
        folder, coin, args=arguments, train_dataset=Dataset.from_list(prompts(share)), callbacks=[clock]
    )
    trainer.train()
    rates = [
        (tokens - before) / (end - start)
        for before, tokens, start, end in zip(
            clock.tokens, clock.tokens[1:], clock.times, clock.times[1:], strict=False
        )
    ]
    return rates[NUM_WARM_UP - 1 :]


# --- packing ----------------------------------------------------------------------------------------------------------


def training_passes(folder: str, layout: str, now: Callable[[], float]) -> list[float]:
    """Tokens per second of forward and backward passes over skewed lengths."""
    from dynamo_lightning.losses.token_statistics import TokenStatistics, chunked_loss
    from dynamo_lightning.policy.forward import head_inputs
    from dynamo_lightning.policy.loading import PolicyConfig, load_policy
    from dynamo_lightning.policy.packing import make_micro_batch, pack
    from dynamo_lightning.types import Prompt, Rollout

    policy = load_policy(folder, PolicyConfig())
    generator = torch.Generator().manual_seed(0)
    lengths = (512 * torch.rand(256, generator=generator) ** 3).ceil().long().clamp(1, 512).tolist()
    prompt = Prompt(0, "", "", (5,), "")
    rollouts = [
        Rollout(
            prompt, i, torch.randint(3, 60, (length,), generator=generator).numpy(), np.zeros(length, np.float32), ""
        )
        for i, length in enumerate(lengths)
    ]
    order = torch.randperm(len(rollouts), generator=generator).tolist()
    if layout == "padded, sorted by length":
        order.sort(key=lambda i: lengths[i])
    per_batch = 8

    def token_loss(statistics: TokenStatistics, tokens: slice) -> torch.Tensor:
        return -statistics.logprobs.sum()

    def packed() -> None:
        for row in pack([length + 1 for length in lengths], 1024):
            micro_batch = make_micro_batch(rollouts, row, policy.device)
            hidden, head = head_inputs(policy, micro_batch)
            chunked_loss(hidden, targets=micro_batch.targets, token_loss=token_loss, **head).backward()

    def padded() -> None:
        for start in range(0, len(order), per_batch):
            rows = [(*prompt.token_ids, *rollouts[i].token_ids) for i in order[start : start + per_batch]]
            longest = max(map(len, rows))
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for number, tokens in enumerate(rows):
                ids[number, : len(tokens)] = torch.tensor(tokens)
                mask[number, : len(tokens)] = 1
            hidden = policy.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            chosen = mask[:, 1:].bool()
            chunked_loss(
                hidden[:, :-1][chosen], targets=ids[:, 1:][chosen], token_loss=token_loss, temperature=1.0, **head
            ).backward()

    head = {"head_weight": policy.lm_head.weight}
    run: Callable[[], None] = packed if layout == "packed" else padded
    rates = []
    for _ in range(NUM_WARM_UP + NUM_ITERATIONS):
        policy.zero_grad()
        start = now()
        run()
        rates.append(sum(lengths) / (now() - start))
    return rates[NUM_WARM_UP:]


# --- contenders in turn -----------------------------------------------------------------------------------------------


def contenders(now: Callable[[], float]) -> dict[tuple[str, float | None], Callable[[str], list[float]]]:
    """By name and share of groups of advantage 0; seconds are those of the clock."""
    found: dict[tuple[str, float | None], Callable[[str], list[float]]] = {}
    for share in SHARES:
        for name, modulated in (("iteration", False), ("iteration, modulated", True)):
            found[name, share] = partial(our_iterations, share=share, modulated=modulated, now=now)
        for size in TRL_BATCH_SIZES:
            found[f"iteration, TRL, micro-batch {size}", share] = partial(
                trl_iterations, share=share, batch_size=size, now=now
            )
    for layout in ("packed", "padded, random order", "padded, sorted by length"):
        found[layout, None] = partial(training_passes, layout=layout, now=now)
    return found


def in_a_process(number: int, peers: str | None, clock: str) -> list[float] | str:
    """Rates of one contender in a fresh interpreter; the last line of its error if it does not run."""
    path = os.pathsep.join(part for part in (str(Path.cwd()), peers, os.environ.get("PYTHONPATH")) if part)
    threads = {"OMP_NUM_THREADS": "1"} if clock == "processor" else {}
    done = subprocess.run(
        [sys.executable, __file__, "--one", str(number), "--clock", clock],
        env=os.environ | {"PYTHONPATH": path} | threads,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def against_trl(rounds: dict[tuple[str, float | None], list[float]]) -> Iterator[str]:
    """Lines that compare ours with the faster of TRL's settings within each round."""
    for (name, share), rates in rounds.items():
        peers = [rounds.get((f"iteration, TRL, micro-batch {size}", share), []) for size in TRL_BATCH_SIZES]
        peers = [peer for peer in peers if len(peer) == len(rates)]
        if name.startswith("iteration") and "TRL" not in name and peers:
            ratios = [own / max(fastest) for own, *fastest in zip(rates, *peers, strict=True)]
            yield (
                f"{name}, advantage 0 in {share:.0%}: {statistics.median(ratios):.2f} × TRL's faster setting of the "
                f"same round (rounds {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
            )


def main() -> None:
    """Take the measurements, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--peers", help="folder with trl, if it is not installed")
    parser.add_argument("--share", type=float, help="only iterations in which this share of groups has advantage 0")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds that count")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    entries = contenders(CLOCKS[options.clock])
    if options.one is not None:
        with tempfile.TemporaryDirectory() as folder:
            write_policy(folder, max_position_embeddings=1024)
            print(json.dumps(list(entries.values())[options.one](folder)))
        return
    rounds: dict[tuple[str, float | None], list[float]] = {
        key: [] for key in entries if options.share is None or key[1] == options.share
    }
    failures: dict[tuple[str, float | None], str] = {}
    for _ in range(options.rounds):
        for number, key in enumerate(entries):
            if key not in rounds or key in failures:
                continue
            rates = in_a_process(number, options.peers, options.clock)
            print(key, rates, file=sys.stderr, flush=True)
            if isinstance(rates, str):
                failures[key] = rates
            else:
                rounds[key].append(statistics.median(rates))
    if options.peers:
        sys.path.append(options.peers)
    versions = []
    for package in ("torch", "transformers", "trl"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    threads = 1 if options.clock == "processor" else torch.get_num_threads()
    print(f"{', '.join(versions)}; {threads} threads; {options.clock} seconds; medians of {options.rounds} rounds\n")
    print(f"{'':34}{'advantage 0':>12}{'tokens/s':>10}{'rounds':>18}{'ours is':>9}")
    for key, rates in rounds.items():
        name, share = key
        if key in failures:
            print(f"{name:34}does not run here: {failures[key]}")
            continue
        ours = statistics.median(rounds["packed" if share is None else "iteration", share])
        print(
            f"{name:34}{'' if share is None else f'{share:.0%}':>12}{statistics.median(rates):10.0f}"
            f"{f'{min(rates):.0f} – {max(rates):.0f}':>18}{ours / statistics.median(rates):8.2f}×"
        )
    for line in against_trl(rounds):
        print(line)
    if options.json:
        rows = [
            {
                "name": name,
                "zero_advantage_share": share,
                "clock": options.clock,
                "tokens_per_second": statistics.median(rates),
                "rounds": rates,
            }
            for (name, share), rates in rounds.items()
            if rates
        ]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
