"""Tiny policies that tests build themselves: nothing is downloaded."""

import json
import os
from pathlib import Path

import pytest
import torch

from dynamo_lightning.types import GroupPlan, Prompt, PromptBatch, Rollout

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> str:
    """Folder of a random Qwen3 policy of a few thousand parameters with the embedded character tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dynamo_lightning.data.arithmetic import write_architecture

    folder = tmp_path_factory.mktemp("tiny-policy")
    write_architecture(folder)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 64, 2
    config.layer_types = config.layer_types[:2]
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 16
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompt_file(tmp_path) -> str:
    """Twelve sums as JSON lines."""
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(3) for b in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def make_prompt():
    """Makes a prompt of the given tokens."""

    def make(prompt_id: int, token_ids: tuple[int, ...] = (5, 6, 7), answer: str = "1") -> Prompt:
        return Prompt(prompt_id, f"question {prompt_id}", f"text {prompt_id}", token_ids, answer, source="made_up")

    return make


@pytest.fixture(scope="session")
def make_batch():
    """Makes a batch with the given allocation, nothing being known of its prompts."""

    def make(prompts: list[Prompt], group_sizes: list[int], iteration: int = 0) -> PromptBatch:
        plans = [GroupPlan(prompt, size) for prompt, size in zip(prompts, group_sizes, strict=True)]
        return PromptBatch(iteration, plans)

    return make


@pytest.fixture(scope="session")
def make_rollout():
    """Makes a rollout with made-up log-probabilities."""

    def make(prompt: Prompt, sample_index: int, token_ids: tuple[int, ...], text: str = "") -> Rollout:
        return Rollout(prompt, sample_index, token_ids, (-1.0,) * len(token_ids), text)

    return make


@pytest.fixture
def shipped_configs() -> Path:
    """Folder of the configs that ship with the package."""
    from dynamo_lightning.cli import shipped_configs

    return shipped_configs()


@pytest.fixture(scope="session")
def benchmark_files() -> Path:
    """Folder with the seven benchmarks as files; what needs it is skipped where there is none."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "benchmarks"
    folder = Path(os.environ.get("BENCHMARK_FILES", beside))
    if not (folder / "math500.jsonl").is_file():
        pytest.skip(f"no benchmark files in {folder}: set BENCHMARK_FILES to a folder that has them")
    return folder
