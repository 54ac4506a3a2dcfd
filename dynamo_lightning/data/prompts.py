"""From a data set's rows to prompts: columns, templates, token ids, and ids that never depend on a row's position.

Rows that cannot be used stop the run with a message; nothing is skipped silently, but prompts longer than the limit
are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_lightning.data.rows import LOCAL_SUFFIXES, Row, column_names, get_column, read_rows, without_column
from dynamo_lightning.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

REWARD_ARGUMENTS = ("prompt", "response", "answer")
"""Columns of these names would collide with a reward's own arguments; they are not handed to it a second time."""


@dataclass
class PromptSource:
    """A data set and how to make prompts of it."""

    path: str
    """Hub id, local `.jsonl`, `.json`, `.csv` or `.parquet` file, or `embedded:` and a file inside the package."""
    name: str | None = None
    """Name in metrics and part of every prompt's id; null takes the file's stem or the last part of the hub id."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set; may be a slice such as `train[:1000]`."""
    prompt_column: str = "prompt"
    """Column with the problem: a string, or a list of chat messages; dots lead into nested columns."""
    answer_column: str = "answer"
    """Column with the reference answer; dots lead into nested columns, as in `reward_model.ground_truth`."""
    template: str | None = None
    """Text around the problem, with `{prompt}` in its place and, if wanted, `{system_prompt}`; other braces stand for
    themselves. Null takes the tokenizer's chat template. Only with a text of your own does the tokenizer add special
    tokens, such as the beginning of sequence: a chat template has its own."""
    system_prompt: str | None = None
    """System message put before the problem; it replaces one that the row has."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as `enable_thinking: false`."""
    max_prompts: int | None = None
    """Take only the first so many different prompts (before prompts that are too long are left out)."""

    @property
    def label(self) -> str:
        """`name`, or what stands for it."""
        file = Path(self.path)
        return self.name or (file.stem if file.suffix in LOCAL_SUFFIXES else file.name)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one source, and what became of its rows."""

    prompts: tuple[Prompt, ...]
    """In the order of the rows, `[num_prompts]`."""
    num_rows: int
    """Rows of the data set."""
    num_merged: int
    """Rows that repeat an earlier row's prompt and answer."""
    num_too_long: int
    """Prompts left out because they have more tokens than allowed."""
    source: str
    """Name of the source."""


@dataclass
class _Problem:
    """A row on its way to a prompt."""

    row_number: int
    prompt: str | Messages
    answer: str
    row: Row
    count: int = 1


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
        FileNotFoundError: If the file or hub data set does not exist.
        ValueError: If the settings contradict each other, a row lacks a usable prompt or answer, one prompt has two
            answers, or every prompt is too long.
    """
    _check_settings(source, tokenizer, option)
    rows = read_rows(source.path, source.subset, source.split, option)
    for name, column in (("prompt_column", source.prompt_column), ("answer_column", source.answer_column)):
        if all(get_column(row, column) is None for row in rows):
            listed = ", ".join(column_names(rows[0]))
            raise ValueError(f"{option}.{name}: {source.path!r} has nothing in {column!r}; its columns: {listed}")

    problems = _merge(rows, source, option)[: source.max_prompts]
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
                question=_question(problem.prompt),
                text=text,
                token_ids=tuple(map(known_tokens.setdefault, token_ids, token_ids)),
                answer=problem.answer,
                source=label,
                columns={key: value for key, value in columns.items() if key not in REWARD_ARGUMENTS},
                count=problem.count,
            )
        )
    if not prompts:
        raise ValueError(
            f"{option}.path: all {len(problems)} prompts of {source.path!r} are longer than "
            f"data.max_prompt_length={max_prompt_length} tokens, the shortest has {shortest}"
        )
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts), "two prompts with one 63-bit hash"
    num_merged = sum(problem.count - 1 for problem in problems)
    return PromptSet(tuple(prompts), len(rows), num_merged, len(problems) - len(prompts), label)


def _check_settings(source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str) -> None:
    """Raise a ValueError if settings contradict each other or the tokenizer."""
    if source.max_prompts is not None and source.max_prompts < 1:
        raise ValueError(f"{option}.max_prompts={source.max_prompts} must be at least 1, or null for all")
    if source.template is None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{option}.template is null, which takes the tokenizer's chat template, but {tokenizer.name_or_path!r} "
                "has none: give a text with {prompt} in it"
            )
        fixed = {"conversation", "tokenize", "add_generation_prompt"} & source.chat_template_kwargs.keys()
        if fixed:
            raise ValueError(f"{option}.chat_template_kwargs may not set {', '.join(sorted(fixed))}")
        return
    if "{prompt}" not in source.template:
        raise ValueError(f"{option}.template={source.template!r} has no {{prompt}}")
    if (source.system_prompt is None) == ("{system_prompt}" in source.template):
        raise ValueError(
            f"{option}.template={source.template!r} and {option}.system_prompt={source.system_prompt!r}: "
            "give a system prompt and its place {system_prompt}, or neither"
        )
    if source.chat_template_kwargs:
        raise ValueError(f"{option}.chat_template_kwargs={source.chat_template_kwargs} needs {option}.template: null")


def _merge(rows: Iterable[Row], source: PromptSource, option: str) -> list[_Problem]:
    """Return one problem for all rows with the same prompt and answer; ValueError if only the answers differ."""
    problems: dict[str, _Problem] = {}
    for number, row in enumerate(rows):
        where = f"row {number} of {source.path!r} (counting from 0)"
        try:
            prompt = _read_prompt(get_column(row, source.prompt_column))
        except ValueError as error:
            raise ValueError(f"{option}.prompt_column={source.prompt_column!r}: {where} {error}") from None
        try:
            answer = _read_answer(get_column(row, source.answer_column))
        except ValueError as error:
            raise ValueError(f"{option}.answer_column={source.answer_column!r}: {where} {error}") from None
        key = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
        first = problems.setdefault(key, _Problem(number, prompt, answer, row, count=0))
        if first.answer != answer:
            raise ValueError(
                f"{option}.path: rows {first.row_number} and {number} of {source.path!r} (counting from 0) have the "
                f"same prompt but different answers, {first.answer!r} and {answer!r}"
            )
        first.count += 1
    return list(problems.values())


def _read_prompt(value: Any) -> str | Messages:
    """Return a prompt column's value, messages without their empty fields; ValueError if it cannot be used."""
    if value is None or value == "" or value == []:
        raise ValueError("has no prompt")
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"has a {type(value).__name__}, expected a string or a list of chat messages")
    messages = [{key: item for key, item in message.items() if item is not None} for message in value]
    if not all(isinstance(message.get("role"), str) for message in messages):
        raise ValueError("has a chat message without a role")
    if not all(isinstance(message.get("content"), str) for message in messages):
        raise ValueError("has a chat message whose content is not text")
    if messages[-1]["role"] != "user":
        raise ValueError(f"has chat messages that end with the role {messages[-1]['role']!r}, expected 'user'")
    return messages


def _read_answer(value: Any) -> str:
    """Return the answer as text: numbers are written out (27.0 as 27), a list of one stands for what is in it."""
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list):
        value = value[0]
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value):
        raise ValueError("has no answer")
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    raise ValueError(f"has the answer {value!r}, expected a string, a number, or a list of one of them")


def _question(prompt: str | Messages) -> str:
    """Return the problem itself: of messages, the user's last."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _tokenize(
    problems: list[_Problem], source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str
) -> Iterator[tuple[_Problem, str, list[int]]]:
    """Yield each problem with its text and token ids; a thousand at a time, for fast tokenizers run in parallel."""
    for start in range(0, len(problems), 1000):
        chunk = problems[start : start + 1000]
        texts = [_render(problem, source, tokenizer, option) for problem in chunk]
        encoded = tokenizer(texts, add_special_tokens=source.template is not None, return_attention_mask=False)
        yield from zip(chunk, texts, encoded["input_ids"], strict=True)


def _render(problem: _Problem, source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str) -> str:
    """Return what the policy reads."""
    prompt = problem.prompt
    if source.template is not None:
        if not isinstance(prompt, str) and [message["role"] for message in prompt] != ["user"]:
            raise ValueError(
                f"{option}.template={source.template!r} has a place for one message, but row {problem.row_number} of "
                f"{source.path!r} (counting from 0) has {len(prompt)}: use null, the tokenizer's chat template"
            )
        # One pass, for the problem may contain the words `{system_prompt}`; no str.format, for LaTeX is full of braces.
        values = {"{prompt}": _question(prompt), "{system_prompt}": source.system_prompt or ""}
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
        raise ValueError(
            f"{option}.template: the tokenizer's chat template refuses row {problem.row_number} of {source.path!r} "
            f"(counting from 0): {error}"
        ) from error
    assert isinstance(text, str)
    return text
