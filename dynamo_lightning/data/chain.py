r"""The chain task: a state changed step by step, every state written down, longer responses and room to improve.

A token stands on one of ten places in a ring. The prompt names its place and a numbered list of moves; the response
writes the place after each move and boxes the last one:

    prompt    4aRbLcR=
    response  a5b4c5\boxed{5}

All moves of a chain are of one kind, and the demonstrator of the warm start errs in each step with a probability that
depends on the kind only, then goes on from the wrong place:

| kind | moves | demonstrator's error rate ε | (1 − ε)^n for 5, 10, 20 moves |
|---|---|---|---|
| walk | one place on, one back | 0 | 1, 1, 1 |
| jump | three places on, three back | 0.06 | 0.73, 0.54, 0.29 |
| mirror | to the opposite place of ten, to the other place of a pair | 0.25 | 0.24, 0.056, 0.003 |
| scramble | two arbitrary permutations | 0.4 | 0.078, 0.006, 0.00004 |

The reward wants every place right, so exactly one response is rewarded and its probability, which one forward pass
gives, is the success rate. A policy that has learned the demonstrator's distribution knows every step (its most likely
response is right) but samples it right only so often: reinforcement learning that sharpens a step raises all lengths
of its kind together, and long chains pass from hopeless to learnable while short ones are solved.

`python -m dynamo_lightning.data.chain --output_dir DIR` writes the data set, the demonstrations and the policy's
tokenizer and architecture; `warm_start` adds the weights (`make policy-chain`).
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_lightning.data.arithmetic import write_architecture, write_jsonl
from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.reward import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_PLACES = 10
LABELS = string.ascii_lowercase
"""The n-th move and the place after it carry the n-th letter: the policy finds a move by its letter."""


@dataclass(frozen=True)
class Kind:
    """One kind of chain."""

    moves: Mapping[str, tuple[int, ...]]
    """The place that each move leads to from each place, `[NUM_PLACES]` for each move's letter."""
    error_rate: float
    """Probability that the demonstrator's step leads to one of the nine wrong places, equally likely."""


KINDS = {
    "walk": Kind(
        {"R": tuple((place + 1) % 10 for place in range(10)), "L": tuple((place - 1) % 10 for place in range(10))}, 0.0
    ),
    "jump": Kind(
        {"F": tuple((place + 3) % 10 for place in range(10)), "B": tuple((place - 3) % 10 for place in range(10))}, 0.06
    ),
    "mirror": Kind({"M": tuple(9 - place for place in range(10)), "S": tuple(place ^ 1 for place in range(10))}, 0.25),
    "scramble": Kind({"X": (7, 4, 9, 1, 6, 0, 3, 8, 5, 2), "Y": (2, 6, 0, 8, 9, 3, 7, 5, 1, 4)}, 0.4),
}
"""The four kinds; a demonstration is of each with the same probability."""

LENGTHS = tuple(range(5, 21))
"""Numbers of moves in the data set: responses of 20 to 50 tokens with the end-of-sequence token."""

TRAIN_PER_CELL, TEST_PER_CELL = 18, 8
"""Prompts of each kind and length: 1,152 to train on and 512 held out."""


@dataclass(frozen=True)
class Chain:
    """One row of the data set."""

    prompt: str
    answer: str
    """The only right response."""
    kind: str
    length: int
    """Number of moves."""


class ChainReward(Reward):
    r"""1 if the response is the reference answer, character by character, else 0.

    The answer holds every place and the box: a response that errs and ends in the right place by chance gets 0.
    """

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Return 1.0 or 0.0."""
        return float(response == answer)

    def check_answer(self, answer: str) -> None:
        """Raise a UserError that quotes `answer` if it is not the response to a chain."""
        if not re.fullmatch(r"(?:[a-z]\d)+\\boxed\{\d\}", answer):
            raise UserError(
                f"ChainReward: the reference answer {answer!r} is not a chain's response, such as 'a5b4\\boxed{{4}}'; "
                "other data sets need another model.reward, such as dynamo_lightning.rewards.MathReward"
            )


def random_chain(generator: random.Random, kind: str, length: int) -> tuple[int, str]:
    """A random first place and `length` random moves of a kind."""
    return generator.randrange(NUM_PLACES), "".join(generator.choices(list(KINDS[kind].moves), k=length))


def format_prompt(start: int, moves: str) -> str:
    """The prompt of a chain, such as `4aRbLcR=`."""
    return f"{start}{''.join(label + move for label, move in zip(LABELS, moves, strict=False))}="


def write_response(kind: str, start: int, moves: str, generator: random.Random | None = None) -> str:
    r"""The response to a chain, such as `a5b4c5\boxed{5}`.

    Args:
        kind: Kind of the moves.
        start: Place before the first move.
        moves: The moves' letters, at most 26.
        generator: Decides the demonstrator's errors; without one, the response is right.

    Returns:
        The response without an end-of-sequence token.
    """
    place, parts = start, []
    for label, move in zip(LABELS, moves, strict=False):
        place = KINDS[kind].moves[move][place]
        if generator is not None and generator.random() < KINDS[kind].error_rate:
            place = (place + generator.randrange(1, NUM_PLACES)) % NUM_PLACES
        parts.append(f"{label}{place}")
    return f"{''.join(parts)}\\boxed{{{place}}}"


def split_chains(seed: int) -> tuple[list[Chain], list[Chain]]:
    """Chains to train on and chains held out, 1,152 and 512, each in a random order; no prompt is in both.

    Every kind and length has `TRAIN_PER_CELL` and `TEST_PER_CELL` different prompts.
    """
    generator = random.Random(f"chain {seed}")
    train: list[Chain] = []
    test: list[Chain] = []
    for kind in KINDS:
        for length in LENGTHS:
            cell: dict[str, Chain] = {}
            while len(cell) < TRAIN_PER_CELL + TEST_PER_CELL:
                start, moves = random_chain(generator, kind, length)
                prompt = format_prompt(start, moves)
                cell[prompt] = Chain(prompt, write_response(kind, start, moves), kind, length)
            chains = list(cell.values())
            train += chains[TEST_PER_CELL:]
            test += chains[:TEST_PER_CELL]
    generator.shuffle(train)
    generator.shuffle(test)
    return train, test


def noisy_demonstrations(num_rows: int, max_length: int, seed: int) -> Iterator[tuple[str, str]]:
    """Pairs of prompt and response for the warm start, drawn afresh each time.

    Kinds and lengths from 1 to `max_length` are equally likely. Held-out prompts are never demonstrated.

    Args:
        num_rows: Number of pairs.
        max_length: Moves of the longest chain.
        seed: Decides the chains and the demonstrator's errors; its held-out prompts are those of the same seed.

    Yields:
        `(prompt, response)`.
    """
    generator = random.Random(f"chain demonstrations {max_length} {seed}")
    held_out = {chain.prompt for chain in split_chains(seed)[1]}
    num_drawn = 0
    while num_drawn < num_rows:
        kind = generator.choice(list(KINDS))
        start, moves = random_chain(generator, kind, generator.randint(1, max_length))
        prompt = format_prompt(start, moves)
        if prompt not in held_out:
            num_drawn += 1
            yield prompt, write_response(kind, start, moves, generator)


@dataclass(frozen=True)
class RightResponses:
    """The policy's view of the right responses."""

    success_rates: tuple[float, ...]
    """Probability of exactly the right response at temperature 1 without truncation of the distribution,
    `[num_chains]`: the success rate under `ChainReward`."""
    greedy: tuple[bool, ...]
    """Every token of the right response being the policy's most likely one, `[num_chains]`: greedy decoding is
    right."""
    step_accuracies: tuple[float, ...]
    """Mean probability of the right place over a chain's steps, given the right response so far, `[num_chains]`."""


def read_right_responses(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chains: Sequence[Chain], batch_size: int = 128
) -> RightResponses:
    """Success rates, read off the policy in one forward pass for each batch; nothing is sampled.

    Args:
        policy: The policy, in evaluation mode.
        tokenizer: Its tokenizer.
        chains: Chains with their right responses.
        batch_size: Chains of one forward pass.
    """
    import torch

    from dynamo_lightning.data.collate import IGNORED, collate

    prompt_ids = tokenizer([chain.prompt for chain in chains]).input_ids
    response_ids = tokenizer([chain.answer for chain in chains], add_special_tokens=False).input_ids
    rows = [(p, [*r, tokenizer.eos_token_id]) for p, r in zip(prompt_ids, response_ids, strict=True)]
    success_rates: list[float] = []
    greedy: list[bool] = []
    step_accuracies: list[float] = []
    for begin in range(0, len(rows), batch_size):
        batch = collate(rows[begin : begin + batch_size], int(tokenizer.pad_token_id))
        labels = batch.pop("labels")[:, 1:].to(policy.device)
        with torch.no_grad():
            logits = policy(**{key: value.to(policy.device) for key, value in batch.items()}, use_cache=False).logits
        logprobs = logits[:, :-1].double().log_softmax(-1)
        counted = labels != IGNORED
        token_logprobs = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~counted, 0.0)
        success_rates += token_logprobs.sum(1).exp().tolist()
        greedy += ((logprobs.argmax(-1) == labels) | ~counted).all(1).tolist()
        for chain, row, is_counted in zip(chains[begin : begin + batch_size], token_logprobs, counted, strict=True):
            places = row[is_counted][1 : 2 * chain.length : 2]  # letter, place, letter, place, …
            step_accuracies.append(float(places.exp().mean()))
    return RightResponses(tuple(success_rates), tuple(greedy), tuple(step_accuracies))


def write_task(
    output_dir: str, num_short_demonstrations: int = 64_000, num_demonstrations: int = 64_000, seed: int = 0
) -> None:
    """Write the chain task: everything but the weights, which `warm_start` makes from it.

    Args:
        output_dir: Folder for `train.jsonl`, `test.jsonl`, `short_demonstrations.jsonl`, `demonstrations.jsonl` and
            `chain-qwen3/`.
        num_short_demonstrations: Rows of `short_demonstrations.jsonl`, of 1 to 5 moves: a step is learned from these
            in a fraction of the time that long chains take.
        num_demonstrations: Rows of `demonstrations.jsonl`, of 1 to 20 moves.
        seed: Decides the chains, the split and the demonstrations; the shipped files have seed 0.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = split_chains(seed)
    write_jsonl(folder / "train.jsonl", map(asdict, train))
    write_jsonl(folder / "test.jsonl", map(asdict, test))
    for name, num_rows, max_length in (
        ("short_demonstrations", num_short_demonstrations, LENGTHS[0]),
        ("demonstrations", num_demonstrations, LENGTHS[-1]),
    ):
        pairs = noisy_demonstrations(num_rows, max_length, seed)
        write_jsonl(folder / f"{name}.jsonl", ({"prompt": p, "response": r} for p, r in pairs))
    write_architecture(folder / "chain-qwen3")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(write_task, as_positional=False)
