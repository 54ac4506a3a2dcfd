"""Syntax tree of an answer.

Nodes are immutable and compare by structure: two readings of the same spelling are equal without being evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal


class UnreadableError(Exception):
    """The text is not an answer in the grammar of `parser`."""


@dataclass(frozen=True, slots=True)
class Node:
    """Base class of all nodes."""

    def children(self) -> Iterator[Node]:
        """The direct sub-nodes, in order."""
        for field in fields(self):
            value = getattr(self, field.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, tuple):
                    yield from item
                elif isinstance(item, Node):
                    yield item

    def walk(self) -> Iterator[Node]:
        """The node and everything below it."""
        stack: list[Node] = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children())


@dataclass(frozen=True, slots=True)
class Number(Node):
    """A numeral, exact. `digits` is the number of significant digits of a decimal, 0 of an integer."""

    value: Fraction
    digits: int = 0


@dataclass(frozen=True, slots=True)
class Mixed(Node):
    """A mixed number such as 1 1/2."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Based(Node):
    """A numeral with a subscript base, such as 52_8."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Symbol(Node):
    """A variable with its subscript and primes; `call` marks the left side of a definition such as f(x) = 2x."""

    name: str
    call: bool = False


@dataclass(frozen=True, slots=True)
class Constant(Node):
    """One of `pi`, `e`, `i`, `infinity`."""

    name: str


@dataclass(frozen=True, slots=True)
class Text(Node):
    """Words."""

    text: str


@dataclass(frozen=True, slots=True)
class Sum(Node):
    """A sum; a difference holds `Negative`s."""

    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Product(Node):
    """A product."""

    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Quotient(Node):
    """A fraction."""

    numerator: Node
    denominator: Node


@dataclass(frozen=True, slots=True)
class Power(Node):
    """A power."""

    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Negative(Node):
    """The additive inverse."""

    operand: Node


@dataclass(frozen=True, slots=True)
class PlusMinus(Node):
    """`±operand`, or `∓operand` with `flipped`: two values at once."""

    operand: Node
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class Function(Node):
    """A named function of arguments."""

    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Quantity(Node):
    """A value with a unit in canonical form, see `units`; percent and degrees are units."""

    value: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Sequence(Node):
    """Several values: a `list` without brackets, a `set`, a `tuple`, or a `ratio`."""

    kind: Literal["list", "set", "tuple", "ratio"]
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Interval(Node):
    """An interval of real numbers with at least one square bracket; `(a, b)` is read as a tuple."""

    left: Node
    right: Node
    closed_left: bool
    closed_right: bool


@dataclass(frozen=True, slots=True)
class SetOperation(Node):
    r"""`\cup`, `\cap` or `\setminus` of two sets."""

    operator: Literal["cup", "cap", "setminus"]
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Matrix(Node):
    """A matrix by rows."""

    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation(Node):
    """A chain of relations: `sides[0] operators[0] sides[1] …`; operators are = ≠ < > ≤ ≥ ≈ ∈."""

    operators: tuple[str, ...]
    sides: tuple[Node, ...]


def symbols_of(node: Node) -> set[str]:
    """The names of the variables in a node."""
    return {part.name for part in node.walk() if isinstance(part, Symbol)}


def functions_of(node: Node) -> set[str]:
    """The names of the functions in a node."""
    return {part.name for part in node.walk() if isinstance(part, Function)}
