"""Sets of real numbers as disjoint intervals: `x > 6`, `(6, ∞)` and `{x | x > 6}` are one."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dynamo_lightning.rewards.maths.nodes import (
    Interval,
    Negative,
    Node,
    Relation,
    Sequence,
    SetOperation,
    Symbol,
    symbols_of,
)
from dynamo_lightning.rewards.maths.scalars import constant_value, infinity_sign, values_equal
from dynamo_lightning.rewards.maths.values import NoValueError, inexact, is_real

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_MAX_PIECES = 60


class NoSetError(Exception):
    """Not a set of real numbers with constant ends."""


@dataclass(frozen=True)
class _End:
    """An end of an interval on the line; `side` 0 is the number itself, ±1 just beside it."""

    infinite: int
    value: Any
    side: int

    def __lt__(self, other: _End) -> bool:
        if self.infinite != other.infinite:
            return self.infinite < other.infinite
        if self.infinite or values_equal(self.value, other.value):
            return self.side < other.side
        return bool(inexact(self.value) < inexact(other.value))

    def equals(self, other: _End) -> bool:
        if self.infinite or other.infinite:
            return self.infinite == other.infinite
        return self.side == other.side and values_equal(self.value, other.value)


Piece = tuple[_End, _End]
_ALL: Piece = (_End(-1, Fraction(0), 0), _End(1, Fraction(0), 0))


def sets_equal(first: Node, second: Node) -> bool | None:
    """Equality of two sets; None if one of them is no set of real numbers with constant ends."""
    try:
        one, other = _normal(_pieces(first)), _normal(_pieces(second))
    except NoSetError:
        return None
    return len(one) == len(other) and all(
        a.equals(c) and b.equals(d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def is_set(node: Node) -> bool:
    """Written as a set of real numbers rather than as a number, a pair, or a list."""
    return (
        isinstance(node, Interval | SetOperation)
        or node == Symbol("mathbb:R")
        or (isinstance(node, Relation) and any(operator not in ("=", "~", "=>") for operator in node.operators))
    )


def _pieces(node: Node) -> list[Piece]:
    if isinstance(node, Interval):
        return _between(node.left, node.right, node.closed_left, node.closed_right)
    if isinstance(node, Sequence):
        if node.kind == "tuple" and len(node.items) == 2:
            return _between(node.items[0], node.items[1], False, False)
        if node.kind == "set":
            return [_point(item) for item in node.items]
        if node.kind == "list" and all(isinstance(item, Relation | Interval | SetOperation) for item in node.items):
            if len(set().union(*(symbols_of(item) for item in node.items))) > 1:
                raise NoSetError
            if all(isinstance(item, Relation) and item.operators == ("!=",) for item in node.items):
                pieces = [_ALL]
                for item in node.items:
                    pieces = _intersection(pieces, _pieces(item))
                return pieces
            return [piece for item in node.items for piece in _pieces(item)]
    if isinstance(node, SetOperation):
        left, right = _pieces(node.left), _pieces(node.right)
        if len(left) * len(right) > _MAX_PIECES**2:
            raise NoSetError
        if node.operator == "cup":
            return left + right
        return _intersection(left, right if node.operator == "cap" else _complement(right))
    if isinstance(node, Relation):
        return _solutions(node)
    if node == Symbol("mathbb:R") or node == Symbol("R"):
        return [_ALL]
    raise NoSetError


def _solutions(relation: Relation) -> list[Piece]:
    """The numbers that satisfy a relation of one variable and constants."""
    sides, operators = relation.sides, relation.operators
    if operators == ("in",) and isinstance(sides[0], Symbol):
        return _pieces(sides[1])
    if len(sides) == 3 and isinstance(sides[1], Symbol) and not symbols_of(sides[0]) | symbols_of(sides[2]):
        lower = _solutions(Relation(operators[:1], sides[:2]))
        return _intersection(lower, _solutions(Relation(operators[1:], sides[1:])))
    if len(sides) != 2:
        raise NoSetError
    (left, right), (operator,) = sides, operators
    if isinstance(right, Symbol) and operator in _FLIPPED:
        left, right, operator = right, left, _FLIPPED[operator]
    if not isinstance(left, Symbol) or symbols_of(right):
        raise NoSetError
    if operator == "=":
        return [_point(right)]
    if operator == "!=":
        return _complement([_point(right)])
    if operator not in _FLIPPED:
        raise NoSetError
    closed = operator.endswith("=")
    end = _end(right)
    if operator.startswith("<"):
        return [(_ALL[0], _End(end.infinite, end.value, 0 if closed else -1))]
    return [(_End(end.infinite, end.value, 0 if closed else 1), _ALL[1])]


def _between(left: Node, right: Node, closed_left: bool, closed_right: bool) -> list[Piece]:
    first, last = _end(left), _end(right)
    if not first.infinite and not last.infinite and not (first < last or first.equals(last)):
        raise NoSetError
    return [
        (
            _End(first.infinite, first.value, 0 if closed_left else 1),
            _End(last.infinite, last.value, 0 if closed_right else -1),
        )
    ]


def _end(node: Node) -> _End:
    sign = infinity_sign(node)
    if sign:
        return _End(sign, Fraction(0), 0)
    value = constant_value(node)
    if value is None or not is_real(value):
        raise NoSetError
    try:
        inexact(value)
    except NoValueError:
        raise NoSetError from None
    return _End(0, value, 0)


def _point(node: Node) -> Piece:
    if isinstance(node, Negative) and infinity_sign(node):
        raise NoSetError
    end = _end(node)
    return end, end


def _complement(pieces: list[Piece]) -> list[Piece]:
    result = [_ALL]
    for first, last in pieces:
        outside = []
        if not first.infinite:
            outside.append((_ALL[0], _End(0, first.value, first.side - 1)))
        if not last.infinite:
            outside.append((_End(0, last.value, last.side + 1), _ALL[1]))
        result = _intersection(result, outside)
    return result


def _intersection(first: list[Piece], second: list[Piece]) -> list[Piece]:
    result = []
    for one in first:
        for other in second:
            start = other[0] if one[0] < other[0] else one[0]
            end = one[1] if one[1] < other[1] else other[1]
            if not end < start:
                result.append((start, end))
    return result


def _normal(pieces: list[Piece]) -> list[Piece]:
    """Pieces in order, those that overlap or touch joined, empty ones left out."""
    if len(pieces) > _MAX_PIECES:
        raise NoSetError
    ordered: list[Piece] = []
    for start, end in pieces:
        if end < start:
            continue
        place = next((index for index, piece in enumerate(ordered) if start < piece[0]), len(ordered))
        ordered.insert(place, (start, end))
    joined: list[Piece] = []
    for start, end in ordered:
        if joined and not _gap(joined[-1][1], start):
            joined[-1] = (joined[-1][0], end if joined[-1][1] < end else joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _gap(end: _End, start: _End) -> bool:
    """A number lies between an end and the next start."""
    if not end < start:
        return False
    if end.infinite or start.infinite or not values_equal(end.value, start.value):
        return True
    return start.side - end.side > 1
