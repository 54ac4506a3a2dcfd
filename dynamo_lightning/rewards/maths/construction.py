"""Nodes made from parts: signs, products, primes, repeating decimals, units."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from dynamo_lightning.rewards.maths.nodes import (
    Negative,
    Node,
    Number,
    PlusMinus,
    Product,
    Quantity,
    Relation,
    Symbol,
    Text,
    UnreadableError,
)


def signed(sign: str, node: Node) -> Node:
    """`node` with a sign before it."""
    signs: dict[str, Callable[[Node], Node]] = {
        "+": lambda operand: operand,
        "-": Negative,
        "+-": PlusMinus,
        "-+": lambda operand: PlusMinus(operand, flipped=True),
    }
    return signs[sign](node)


def multiply(first: Node, second: Node) -> Node:
    """A product, flat."""
    return Product((*first.factors, second) if isinstance(first, Product) else (first, second))


def primed(node: Node, prime: str) -> Node:
    """A variable with a prime; of something else, unreadable."""
    if not isinstance(node, Symbol):
        raise UnreadableError("a prime")
    return Symbol(node.name + prime)


def repeating_decimal(text: str) -> Number:
    r"""`0.1\overline{6}` as 1/6."""
    whole, _, rest = text.partition(".")
    once, _, tail = rest.partition("\\")
    again = re.sub(r"\D", "", tail)
    value = Fraction(int((whole + once) or "0"), 10 ** len(once))
    return Number(value + Fraction(int(again), 10 ** len(once) * (10 ** len(again) - 1)))


def with_unit(node: Node, unit: str | None) -> Node:
    """A value with its unit; the unit of a relation belongs to its last side."""
    if unit is None:
        raise UnreadableError("no unit")
    if isinstance(node, Relation):
        return Relation(node.operators, (*node.sides[:-1], with_unit(node.sides[-1], unit)))
    if isinstance(node, Text | Quantity):
        if isinstance(node, Quantity) and node.unit in (unit, "$"):
            return node
        raise UnreadableError("a unit of words")
    return Quantity(node, unit)
