"""From rows to problems: prompt and answers are read, and rows that state the same problem become one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dynamo_lightning.data.rows import Place, Row, column_names, get_column
from dynamo_lightning.data.source import BOXED, PromptSource
from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.math import last_boxed

Messages = list[dict[str, Any]]


@dataclass
class Problem:
    """A row on its way to a prompt."""

    place: Place
    prompt: str | Messages
    answers: tuple[str, ...]
    """All accepted answers, at least one."""
    row: dict[str, Any]
    row_index: int
    """Position of the row in the data set, counting from 0."""
    count: int = 1
    conflicts: bool = False

    @property
    def answer(self) -> str | list[str]:
        """The answer as the problem's id knows it: alone, or all of several."""
        return self.answers[0] if len(self.answers) == 1 else list(self.answers)


def merge_rows(rows: Iterable[dict[str, Any]], source: PromptSource, option: str) -> tuple[list[Problem], int, int]:
    """Return one problem for all rows with the same prompt and answer.

    Rows are read one at a time and repeated ones forgotten: DAPO-Math-17k has 1.8 million.

    Args:
        rows: The data set.
        source: Its columns, and what to do with conflicting answers.
        option: Where `source` stands in the config, for messages.

    Returns:
        The problems in the order of their first rows; the number of rows; the number of rows of problems that were left
        out because of conflicting answers.

    Raises:
        UserError: Naming the row that lacks a usable prompt or answer, or the two rows whose answers differ.
    """
    problems: dict[str, Problem] = {}
    num_rows = 0
    for index, row in enumerate(rows):
        num_rows += 1
        place = row.place if isinstance(row, Row) else Place(source.path, index + 1, "row")
        prompt, answers = _read_row(row, place, index == 0, source, option)
        key = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
        first = problems.setdefault(key, Problem(place, prompt, answers, row, index, count=0))
        if first.answers != answers:
            if source.conflicting_answers == "refuse":
                other = Problem(place, prompt, answers, row, index)
                raise UserError(
                    f"{option}.path: {_pair(first.place, place)} have the same prompt but different answers, "
                    f"{first.answer!r} and {other.answer!r}: repair them, or leave such prompts out with "
                    f"{option}.conflicting_answers: drop"
                )
            first.conflicts = True
        first.count += 1
    kept = [problem for problem in problems.values() if not problem.conflicts]
    if problems and not kept:
        raise UserError(f"{option}.path: every prompt of {source.path!r} has conflicting answers")
    return kept, num_rows, sum(problem.count for problem in problems.values() if problem.conflicts)


def question_of(prompt: str | Messages) -> str:
    """Return the problem itself: of messages, the user's last."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _pair(first: Place, second: Place) -> str:
    """Two places in words."""
    if first.file == second.file:
        return f"{first.unit}s {first.number} and {second.number} of {first.file!r}"
    return f"{first} and {second}"


def _read_row(
    row: dict[str, Any], place: Place, is_first: bool, source: PromptSource, option: str
) -> tuple[str | Messages, tuple[str, ...]]:
    """Return a row's prompt and answers; UserError with the option and the row."""
    values = []
    for name, column in (("prompt_column", source.prompt_column), ("answer_column", source.answer_column)):
        value = get_column(row, column)
        if value is None and is_first and column not in column_names(row):
            listed = ", ".join(column_names(row))
            raise UserError(f"{option}.{name}: {place.file!r} has nothing in {column!r}; its columns: {listed}")
        values.append(value)
    try:
        prompt = _extract_prompt(_read_prompt(values[0]), source.prompt_pattern)
    except ValueError as error:
        raise UserError(f"{option}.prompt_column={source.prompt_column!r}: {place} {error}") from None
    try:
        read = [_extract_answer(answer, source.answer_pattern) for answer in _read_answers(values[1])]
    except ValueError as error:
        raise UserError(f"{option}.answer_column={source.answer_column!r}: {place} {error}") from None
    return prompt, tuple(dict.fromkeys(read))


def _read_prompt(value: Any) -> str | Messages:
    """Return a prompt column's value, messages without their empty fields; ValueError if it cannot be used."""
    if value is None or value == "" or value == []:
        raise UserError("has no prompt")
    if isinstance(value, str):
        _check_characters(value, "prompt")
        return value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"has a {type(value).__name__}, expected a string or a list of chat messages")
    messages = [{key: item for key, item in message.items() if item is not None} for message in value]
    if not all(isinstance(message.get("role"), str) for message in messages):
        raise UserError("has a chat message without a role")
    if not all(isinstance(message.get("content"), str) for message in messages):
        raise UserError("has a chat message whose content is not text")
    for message in messages:
        _check_characters(message["content"], "prompt")
    if messages[-1]["role"] != "user":
        raise UserError(f"has chat messages that end with the role {messages[-1]['role']!r}, expected 'user'")
    return messages


def _extract_prompt(prompt: str | Messages, pattern: str | None) -> str | Messages:
    """Return the prompt, or the part of its last message that the pattern's first group matches."""
    if pattern is None:
        return prompt
    match = re.search(pattern, question_of(prompt))
    if match is None or not match[1].strip():
        raise UserError(f"has a prompt that prompt_pattern={pattern!r} does not match: {question_of(prompt)[:80]!r}")
    return match[1] if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": match[1]}]


def _read_answers(value: Any) -> list[str]:
    """Return every accepted answer as text; a list holds any number of them."""
    if isinstance(value, list) and value:
        if any(isinstance(item, list | dict) for item in value):
            raise UserError(f"has the answer {value!r}, expected a string, a number, or a list of them")
        return [_read_answer(item) for item in value]
    return [_read_answer(value)]


def _read_answer(value: Any) -> str:
    """Return an answer as text: numbers are written out, 27.0 as 27."""
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value):
        raise UserError("has no answer")
    if isinstance(value, str):
        _check_characters(value, "answer")
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    raise UserError(f"has the answer {value!r}, expected a string, a number, or a list of them")


def _check_characters(text: str, what: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell, but which is no character: no tokenizer takes it."""
    lone = next((index for index, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
    if lone is not None:
        code = f"\\u{ord(text[lone]):04x}"
        raise UserError(f"has half a surrogate pair in its {what}, {code} at character {lone + 1}: repair the text")


def _extract_answer(text: str, pattern: str | None) -> str:
    """Return the answer, or the last part of a worked solution that the pattern finds."""
    if pattern is None:
        return text
    if pattern == BOXED:
        answer = last_boxed(text)
    else:
        matches = list(re.finditer(pattern, text))
        answer = matches[-1][1] if matches else None
    if answer is None or not answer.strip():
        raise UserError(f"has no answer that answer_pattern={pattern!r} finds in {text[-80:]!r}")
    return answer.strip()
