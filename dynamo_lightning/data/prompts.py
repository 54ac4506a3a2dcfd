"""From a data set's rows to prompts: columns, templates, token ids, and ids that never depend on a row's position.

Rows that cannot be used stop the run with a message; nothing is skipped silently, but prompts longer than the limit
are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dynamo_lightning.data.problems import Messages, Problem, merge_rows, question_of
from dynamo_lightning.data.rendering import tokenize
from dynamo_lightning.data.rows import read_rows, without_column
from dynamo_lightning.data.source import PromptSource, check_settings
from dynamo_lightning.data.templates import resolve_template
from dynamo_lightning.errors import UserError
from dynamo_lightning.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWARD_ARGUMENTS = ("prompt", "response", "answer", "self")
"""Columns of these names would collide with a reward's own arguments; they are not handed to it a second time."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one source, and what became of its rows."""

    prompts: tuple[Prompt, ...]
    """In the order of the rows, `[num_prompts]`."""
    num_rows: int
    """Rows of the data set."""
    num_merged: int
    """Rows that repeat an earlier row's prompt and answer."""
    num_conflicting: int
    """Rows left out because others answer the same prompt differently."""
    num_too_long: int
    """Prompts left out because they have more tokens than allowed."""
    source: str
    """Name of the source."""
    num_other_part: int = 0
    """Problems left out because they belong to the other part of `held_out`."""
    left_out_columns: tuple[str, ...] = ()
    """Columns that rewards do not get, as they have the names of their arguments."""


def prompt_id(source: str, prompt: str | Messages, answer: str | list[str]) -> int:
    """Return the stable 63-bit id of a problem: a hash of source name, problem (or messages) and answer(s)."""
    key = json.dumps([source, prompt, answer], sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def load_prompts(
    source: PromptSource, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, option: str = "data.train"
) -> PromptSet:
    """Read a data set and return its prompts.

    Args:
        source: What to read, and how.
        tokenizer: The policy's tokenizer.
        max_prompt_length: Prompts with more tokens are left out.
        option: Where `source` stands in the config, for messages.

    Returns:
        Different prompts in the order of their first rows, with counts of merged rows and of prompts left out.

    Raises:
        MissingFileError: If the file or hub data set does not exist.
        UserError: If the settings contradict each other, a row lacks a usable prompt or answer, one prompt has two
            answers, or every prompt is too long.
    """
    source = replace(source, template=resolve_template(source.template, f"{option}.template"))
    check_settings(source, tokenizer, option)
    rows = read_rows(source.path, source.subset, source.split, option, source.prompt_column)
    problems, num_rows, num_conflicting = merge_rows(rows, source, option)
    num_merged = sum(problem.count - 1 for problem in problems)
    num_problems = len(problems)
    problems = part_of(problems, source)
    if not problems:
        raise UserError(
            f"{option}.part={source.part}: none of the {num_problems} problems of {source.path!r} is in this part of "
            f"{option}.held_out={source.held_out:g}"
        )
    num_other_part = num_problems - len(problems)
    problems = problems[: source.max_prompts]
    label, prompts, shortest = source.label, [], math.inf
    left_out: set[str] = set()
    known_tokens: dict[int, int] = {}  # one int object per token id instead of one per token: a third of the memory
    for problem, text, token_ids in tokenize(problems, source, tokenizer, option):
        shortest = min(shortest, len(token_ids))
        if len(token_ids) > max_prompt_length:
            continue
        columns = without_column(without_column(problem.row, source.prompt_column), source.answer_column)
        left_out.update(columns.keys() & REWARD_ARGUMENTS)
        prompts.append(
            Prompt(
                prompt_id=prompt_id(label, problem.prompt, problem.answer),
                question=question_of(problem.prompt),
                text=text,
                token_ids=tuple(map(known_tokens.setdefault, token_ids, token_ids)),
                answer=problem.answers[0],
                source=label,
                columns={key: value for key, value in columns.items() if key not in REWARD_ARGUMENTS},
                count=problem.count,
                row=problem.row_index,
                place=str(problem.place),
                answers=problem.answers if len(problem.answers) > 1 else (),
            )
        )
    if not prompts:
        raise UserError(
            f"{option}.path: all {len(problems)} prompts of {source.path!r} are longer than "
            f"data.max_prompt_length={max_prompt_length} tokens, the shortest has {shortest}"
        )
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts), "two prompts with one 63-bit hash"
    num_too_long = len(problems) - len(prompts)
    columns_left_out = tuple(sorted(left_out))
    return PromptSet(
        tuple(prompts), num_rows, num_merged, num_conflicting, num_too_long, label, num_other_part, columns_left_out
    )


def part_of(problems: list[Problem], source: PromptSource) -> list[Problem]:
    """The problems of the part that a source is, of the two that its `held_out` makes."""
    if not source.held_out:
        return problems
    wanted = source.part == "held_out"
    return [problem for problem in problems if is_held_out(problem.prompt, source.held_out) == wanted]


def is_held_out(prompt: str | Messages, share: float) -> bool:
    """True if a problem belongs to the share that is held out: by its question alone, wherever it comes from."""
    digest = hashlib.blake2b(b"held out " + question_of(prompt).strip().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
