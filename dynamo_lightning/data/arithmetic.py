r"""The embedded task: arithmetic in words and digits, answered in `\boxed{}`, hard enough to show what RLVR does.

Three kinds of problem give the embedded policy three kinds of prompt, as a real training set has them:

| kind | problems | share of wrong demonstrations | success rate after the warm start |
|---|---|---|---|
| sum | 0+0 … 7+7 | none | near 1: nothing left to learn |
| difference, product | one digit each | 55 %: some answer of the same kind | about 0.4: known, but unsure |
| long product | three digits each | none, but of other problems | near 0: too hard to learn from |

Reinforcement learning can sharpen the middle kind only, and rollouts spent on the other two buy no gradient: that is
what the allocation has to find out. `python -m dynamo_lightning.data.arithmetic --output_dir DIR` writes the data set,
the demonstrations and the embedded policy's tokenizer and architecture; `warm_start` adds the weights.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PHRASINGS = {
    "sum": ("{a}+{b}=", "What is {a}+{b}?", "{a} plus {b} is", "Add {a} and {b}."),
    "difference": ("{a}-{b}=", "What is {a}-{b}?", "{a} minus {b} is", "From {a} take {b}."),
    "product": ("{a}*{b}=", "What is {a}*{b}?", "{a} times {b} is", "Multiply {a} by {b}."),
}
"""Four ways to ask each question."""

DEMONSTRATION_NOISE = {"sum": 0.0, "difference": 0.55, "product": 0.55, "long_product": 0.0}
"""Share of demonstrations whose answer is swapped for another answer of the same kind."""

DEMONSTRATION_WEIGHT = {"sum": 4.0, "difference": 1.0, "product": 1.0, "long_product": 1.0}
"""How often a problem is demonstrated, relative to others: often enough that sums are truly solved."""

NUM_LONG_PRODUCTS = 560
NUM_TEST = 516


@dataclass(frozen=True)
class Problem:
    """One row of the data set."""

    prompt: str
    answer: str
    kind: str


def all_problems(seed: int) -> list[Problem]:
    """Every problem of the task in a random order: 256 sums, 400 differences, 400 products, 560 long products."""
    operations = {"sum": lambda a, b: a + b, "difference": lambda a, b: a - b, "product": lambda a, b: a * b}
    problems = [
        Problem(phrasing.format(a=a, b=b), str(operation(a, b)), kind)
        for kind, operation in operations.items()
        for phrasing in PHRASINGS[kind]
        for a in range(8 if kind == "sum" else 10)
        for b in range(8 if kind == "sum" else 10)
    ]
    generator = random.Random(f"arithmetic {seed}")
    long_products: dict[str, Problem] = {}
    while len(long_products) < NUM_LONG_PRODUCTS:
        problem = long_product(generator)
        long_products[problem.prompt] = problem
    problems.extend(long_products.values())
    generator.shuffle(problems)
    return problems


def long_product(generator: random.Random) -> Problem:
    """A random product of two three-digit numbers."""
    a, b = generator.randrange(100, 1000), generator.randrange(100, 1000)
    return Problem(generator.choice(PHRASINGS["product"]).format(a=a, b=b), str(a * b), "long_product")


def split_problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and problems held out from reinforcement learning: 1,100 and 516, none in both."""
    problems = all_problems(seed)
    return problems[NUM_TEST:], problems[:NUM_TEST]


def noisy_demonstrations(num_rows: int, seed: int) -> Iterator[tuple[str, str]]:
    r"""Pairs of prompt and response for the warm start, drawn from all problems by `DEMONSTRATION_WEIGHT`.

    Long products are drawn afresh each time: a few hundred fixed ones would be memorized. The base policy thereby
    knows every right answer it can represent, held-out problems included, as a pretrained model does;
    `DEMONSTRATION_NOISE` decides how sure of it it is. Reinforcement learning must turn knowing into answering, and the
    held-out problems show whether that carries over to prompts it was never rewarded on.

    Args:
        num_rows: Number of pairs.
        seed: Decides the problems, their order and which answers are swapped.

    Yields:
        `(prompt, response)`, the response being `\boxed{answer}`.
    """
    problems = all_problems(seed)
    answers: dict[str, list[str]] = {}
    for problem in problems:
        answers.setdefault(problem.kind, []).append(problem.answer)
    generator = random.Random(f"demonstrations {seed}")
    weights = [DEMONSTRATION_WEIGHT[problem.kind] for problem in problems]
    for _ in range(num_rows):
        problem = generator.choices(problems, weights)[0]
        if problem.kind == "long_product":
            problem = long_product(generator)
        answer = problem.answer
        if generator.random() < DEMONSTRATION_NOISE[problem.kind]:
            answer = generator.choice(answers[problem.kind])
        yield problem.prompt, f"\\boxed{{{answer}}}"


def exact_success_rates(problems: Sequence[Problem], model_name: str) -> list[float]:
    r"""Probability that a response is `\boxed{answer}`, read off the policy at temperature 1, `[num_problems]`."""
    import numpy as np
    import torch

    from dynamo_lightning.policy.forward import response_statistics
    from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
    from dynamo_lightning.policy.packing import make_micro_batch, pack
    from dynamo_lightning.types import Prompt, Rollout

    policy, tokenizer = load_policy(model_name, PolicyConfig()).eval(), load_tokenizer(model_name)
    rollouts = []
    for index, problem in enumerate(problems):
        prompt_ids, response_ids = tokenizer([problem.prompt, f"\\boxed{{{problem.answer}}}"]).input_ids
        prompt = Prompt(index, problem.prompt, problem.prompt, tuple(prompt_ids), problem.answer)
        response = np.array([*response_ids, tokenizer.eos_token_id], dtype=np.int32)
        rollouts.append(Rollout(prompt, 0, response, np.zeros(0, dtype=np.float32), ""))
    lengths = [rollout.response_length for rollout in rollouts]
    logprobs = torch.zeros(sum(lengths))
    for row in pack([len(rollout.prompt.token_ids) + rollout.response_length for rollout in rollouts], max_tokens=1024):
        micro_batch = make_micro_batch(rollouts, row, policy.device)
        with torch.no_grad():
            statistics = response_statistics(policy, micro_batch, temperature=1.0)
        logprobs[micro_batch.token_indices] = statistics.logprobs
    return [float(part.sum().exp()) for part in logprobs.split(lengths)]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_architecture(folder: Path) -> None:
    """Write a character tokenizer and the configuration of a Qwen3 model of 0.34 million parameters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    characters = string.digits + string.ascii_letters + " +-*/=?.,\\{}()"
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=128
    ).save_pretrained(folder)
    Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=vocabulary["<pad>"],
        eos_token_id=vocabulary["<eos>"],
        bos_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)


def write_task(output_dir: str, num_demonstrations: int = 384_000, seed: int = 0) -> None:
    """Write the embedded task: everything but the weights, which `warm_start` makes from it.

    Args:
        output_dir: Folder for `train.jsonl`, `test.jsonl`, `demonstrations.jsonl` and `arithmetic-qwen3/`.
        num_demonstrations: Rows of `demonstrations.jsonl`.
        seed: Decides the long products, the split and the demonstrations; the shipped files have seed 0.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = split_problems(seed)
    write_jsonl(folder / "train.jsonl", map(asdict, train))
    write_jsonl(folder / "test.jsonl", map(asdict, test))
    demonstrations = noisy_demonstrations(num_demonstrations, seed)
    write_jsonl(folder / "demonstrations.jsonl", ({"prompt": p, "response": r} for p, r in demonstrations))
    write_architecture(folder / "arithmetic-qwen3")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(write_task, as_positional=False)
