r"""Answers to references that our own reader cannot read: what math-verify is asked, and what it is not.

math-verify takes upper for lower case and reads two numbers side by side as a sum. An answer to an integral is nearly
always one that our own reader reads, so it must be, in the letters of the reference; only an answer that itself holds
an integral, sum, product or limit is left to math-verify alone.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dynamo_lightning.rewards.maths import library
from dynamo_lightning.rewards.maths.boxes import last_boxed
from dynamo_lightning.rewards.maths.comparison import AnswerKind
from dynamo_lightning.rewards.maths.forms import is_numeral
from dynamo_lightning.rewards.maths.nodes import Based, Node, Quantity, Relation, Sequence, Text, symbols_of
from dynamo_lightning.rewards.maths.reading import read
from dynamo_lightning.rewards.maths.scalars import constant_value
from dynamo_lightning.rewards.maths.spelling import clean

_OPERATORS = re.compile(r"\\(?:i{0,3}nt|oint|sum|prod|lim)(?![a-zA-Z])")
_TWO_NUMBERS = re.compile(r"[\d.]\s+[\d.]")
_LABEL = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?(?:\s*\([A-Za-z]\))?")


def without_frame(answer: str) -> str:
    """Return a reference or answer in one spelling, without its box, dollar signs and final full stop."""
    boxed = last_boxed(answer)
    return clean(answer if boxed is None else boxed)


def can_parse(reference: str) -> bool:
    """Return whether math-verify reads a reference."""
    return library.can_parse(without_frame(reference))


def equals(reference: str, answer: str, answer_kind: AnswerKind) -> bool:
    """Return whether every side of an answer, as of `S = 2^3 = 8`, equals a reference beyond our own reader."""
    wanted = without_frame(reference)
    sides = _sides(without_frame(answer))
    if len(sides) > 1 and _LABEL.fullmatch(sides[0]):
        del sides[0]
    if len(sides) > 4 or (answer_kind == "number" and len(sides) > 1) or not library.can_parse(wanted):
        return False
    return all(_is_candidate(wanted, side, answer_kind) for side in sides) and library.equals(wanted, *sides)


def _sides(text: str) -> list[str]:
    """The sides of an equation; an equals sign in braces, as of a sum's lower end, separates none."""
    sides, depth = [""], 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        if character == "=" and depth == 0:
            sides.append("")
        else:
            sides[-1] += character
    return [side.strip() for side in sides]


def _is_candidate(reference: str, answer: str, answer_kind: AnswerKind) -> bool:
    """An answer that may be asked about: one value, of the reference's letters, worked out if a number is wanted."""
    if _OPERATORS.search(answer):
        return answer_kind == "expression" and not _TWO_NUMBERS.search(answer)
    given = read(answer).written
    if given is None or isinstance(given, Sequence | Relation | Text | Quantity | Based):
        return False
    if not {name[:1] for name in symbols_of(given)} <= set(reference):
        return False
    return answer_kind == "expression" or _is_worked_out(given)


def _is_worked_out(given: Node) -> bool:
    r"""A numeral, or a constant that is none, as pi/2; `6 \cdot 7` is a number that was not worked out."""
    return bool(symbols_of(given)) or is_numeral(given) or not isinstance(constant_value(given), Fraction)
