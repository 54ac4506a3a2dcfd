"""From a data set's rows to prompts: columns, templates, token ids, and ids that never depend on a row's position.

Rows that cannot be used stop the run with a message; nothing is skipped silently, but prompts longer than the limit
are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dynamo_lightning.data.problems import Messages, Problem, merge_rows, question_of
from dynamo_lightning.data.rows import read_rows, without_column
from dynamo_lightning.data.source import PromptSource, check_settings
from dynamo_lightning.data.templates import resolve_template
from dynamo_lightning.errors import UserError
from dynamo_lightning.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWARD_ARGUMENTS = ("prompt", "response", "answer")
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


def prompt_id(source: str, prompt: str | Messages, answer: str) -> int:
    """Return the stable 63-bit id of a problem: a hash of source name, problem (or messages) and answer."""
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
    rows = read_rows(source.path, source.subset, source.split, option)
    problems, num_rows, num_conflicting = merge_rows(rows, source, option)
    num_merged = sum(problem.count - 1 for problem in problems)
    problems = problems[: source.max_prompts]
    label, prompts, shortest = source.label, [], math.inf
    known_tokens: dict[int, int] = {}  # one int object per token id instead of one per token: a third of the memory
    for problem, text, token_ids in _tokenize(problems, source, tokenizer, option):
        shortest = min(shortest, len(token_ids))
        if len(token_ids) > max_prompt_length:
            continue
        columns = without_column(without_column(problem.row, source.prompt_column), source.answer_column)
        prompts.append(
            Prompt(
                prompt_id=prompt_id(label, problem.prompt, problem.answer),
                question=question_of(problem.prompt),
                text=text,
                token_ids=tuple(map(known_tokens.setdefault, token_ids, token_ids)),
                answer=problem.answer,
                source=label,
                columns={key: value for key, value in columns.items() if key not in REWARD_ARGUMENTS},
                count=problem.count,
                row=problem.row_number,
            )
        )
    if not prompts:
        raise UserError(
            f"{option}.path: all {len(problems)} prompts of {source.path!r} are longer than "
            f"data.max_prompt_length={max_prompt_length} tokens, the shortest has {shortest}"
        )
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts), "two prompts with one 63-bit hash"
    return PromptSet(tuple(prompts), num_rows, num_merged, num_conflicting, len(problems) - len(prompts), label)


def _tokenize(
    problems: list[Problem], source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str
) -> Iterator[tuple[Problem, str, list[int]]]:
    """Yield each problem with its text and token ids; a thousand at a time, for fast tokenizers run in parallel."""
    for start in range(0, len(problems), 1000):
        chunk = problems[start : start + 1000]
        texts = [_render(problem, source, tokenizer, option) for problem in chunk]
        encoded = tokenizer(texts, add_special_tokens=source.template is not None, return_attention_mask=False)
        yield from zip(chunk, texts, encoded["input_ids"], strict=True)


def _render(problem: Problem, source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str) -> str:
    """Return what the policy reads."""
    prompt = problem.prompt
    if source.template is not None:
        if not isinstance(prompt, str) and [message["role"] for message in prompt] != ["user"]:
            raise UserError(
                f"{option}.template={source.template!r} has a place for one message, but row {problem.row_number} of "
                f"{source.path!r} (counting from 0) has {len(prompt)}: use null, the tokenizer's chat template"
            )
        # One pass, for the problem may contain the words `{system_prompt}`; no str.format, for LaTeX is full of braces.
        values = {"{prompt}": question_of(prompt), "{system_prompt}": source.system_prompt or ""}
        return re.sub(r"\{prompt\}|\{system_prompt\}", lambda match: values[match[0]], source.template)
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if source.system_prompt is not None:
        others = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": source.system_prompt}, *others]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **source.chat_template_kwargs
        )
    except TemplateError as error:
        raise UserError(
            f"{option}.template: the tokenizer's chat template refuses row {problem.row_number} of {source.path!r} "
            f"(counting from 0): {error}"
        ) from error
    assert isinstance(text, str)
    return text
