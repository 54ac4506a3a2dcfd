"""Readings of an answer: usually one, and one more where plain words may be a unit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dynamo_lightning.rewards.maths import units
from dynamo_lightning.rewards.maths.nodes import Node, Quantity, Symbol, UnreadableError, symbols_of
from dynamo_lightning.rewards.maths.parser import parse
from dynamo_lightning.rewards.maths.spelling import clean
from dynamo_lightning.rewards.maths.words import read_words

MAX_CHARACTERS = 500
"""Longest answer that is read; a reference may be longer, and then its answers up to twice as long as it."""

_COMMANDS = re.compile(r"\\(?:text\w*|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_WHOLE_TEXT = re.compile(r"\\(?:text\w*|mathrm|mbox)\s*\{([^{}]*\d[^{}]*)\}")
_SENTENCE = re.compile(r"[A-Za-z]{2,},? [A-Za-z]{2,},? [A-Za-z]{2,}")


@dataclass(frozen=True, slots=True)
class Readings:
    """An answer as it is written, and with plain words behind a number as a unit; None where it cannot be read so."""

    written: Node | None
    with_unit: Node | None = None

    def __bool__(self) -> bool:
        return self.written is not None or self.with_unit is not None


def read(text: str, reference: bool = False) -> Readings:
    """Return the readings of an answer, of a reference answer if asked for."""
    cleaned = clean(text)
    while cleaned.startswith("{") and cleaned.endswith("}") and _matches(cleaned):
        cleaned = cleaned[1:-1].strip()
    wrapped = _WHOLE_TEXT.fullmatch(cleaned)
    if wrapped and read(wrapped[1], reference):  # a number with its unit in one command for text
        return read(wrapped[1], reference)
    if not cleaned:
        return Readings(None)
    words = read_words(cleaned)
    if words is not None:
        return Readings(words)
    if _SENTENCE.search(_COMMANDS.sub(" ", cleaned)):
        return Readings(None, _read_with_unit(cleaned, reference))
    return Readings(_parse(cleaned), _read_with_unit(cleaned, reference))


def _parse(text: str) -> Node | None:
    try:
        node = parse(text)
    except UnreadableError:
        return None
    return None if node == Symbol("?") else node


def _read_with_unit(text: str, reference: bool) -> Node | None:
    """The reading of `60 km/h` and `$60` as a quantity."""
    if "=" in text:  # x = 60 km/h
        label, _, after = text.rpartition("=")
        if not re.fullmatch(r"\s*[A-Za-z](?:_\{?\w+\}?)?\s*", label):
            return None
        text = after.strip()
    split = units.split_bare(text, reference)
    if split is None:
        return None
    value = _parse(split[0].strip())
    if value is None or isinstance(value, Quantity) or symbols_of(value):
        return None
    return Quantity(value, split[1])


def _matches(text: str) -> bool:
    """The first brace is closed by the last one, and what is within is no set."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return index == len(text) - 1
    return False
