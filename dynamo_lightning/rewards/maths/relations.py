"""Equations and inequalities: definitions such as `f(x) = 2x`, chains such as `17 + 25 = 42`, and equivalence."""

from __future__ import annotations

import re
from fractions import Fraction

from dynamo_lightning.rewards.maths.nodes import (
    Constant,
    Function,
    Negative,
    Node,
    Number,
    Power,
    Product,
    Quantity,
    Relation,
    Sequence,
    Sum,
    Symbol,
    Text,
    symbols_of,
)
from dynamo_lightning.rewards.maths.scalars import (
    constant_value,
    decimal_digits,
    proportional,
    scalars_equal,
    values_equal,
)
from dynamo_lightning.rewards.maths.values import NoValueError, context, inexact

OPEN = Symbol("?")
"""The left side of an answer that begins with an equals sign."""
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def definition(relation: Node) -> tuple[Node, Node] | None:
    """The label and the value of `label = value`, None if the relation is no definition.

    A label is a variable, a constant's letter such as I or e, a function's name, words, or a product or sum of
    variables; with a number in it, as in `2x = 84`, it is an equation to be solved.
    """
    if not isinstance(relation, Relation) or relation.operators not in (("=",), ("in",), ("~",)):
        return None
    label, value = relation.sides
    if relation.operators == ("in",) and not isinstance(label, Symbol):
        return None
    return (label, value) if _is_label(label) else None


def is_chain(relation: Relation) -> bool:
    """More than two sides, all of them joined by = or ≈, or an approximation behind a value."""
    return (len(relation.sides) > 2 and set(relation.operators) <= {"=", "~"}) or "~" in relation.operators


def conclusion(relation: Relation) -> Relation | None:
    """A chain `label = a = b` as `label = b`, None if it contradicts itself."""
    label, *values = relation.sides
    if not _is_label(label) or label == OPEN:
        return None
    last = _last_value(tuple(values), relation.operators[1:], None)
    return None if last is None else Relation(("=",), (label, last))


def stated_value(reference: Node, answer: Relation) -> Node | None:
    """The value that an answer states to be equal to its left side; None if it states something else.

    `17 + 25 = 42` states 42, `x = 42` too; `41 = 42` is false and states nothing.
    """
    if not set(answer.operators) <= {"=", "~"}:
        return None
    label, *values = answer.sides
    if _is_label(label):
        if symbols_of(label) & symbols_of(reference) and symbols_of(label) & symbols_of(values[-1]):
            return None
        if answer.operators[0] == "~" and not decimal_digits(reference):
            return None  # "≈ 42" is a guess where 42 is wanted
        return _last_value(tuple(values), answer.operators[1:], reference)
    return _last_value(answer.sides, answer.operators, reference)


def same_label(first: Node, second: Node) -> bool:
    """Two labels name the same thing: f(x) may be called y, and m_max m."""
    if first == second:
        return True
    if not isinstance(first, Symbol) or not isinstance(second, Symbol):
        return isinstance(first, Text) or isinstance(second, Text)
    if OPEN in (first, second):
        return True
    names = [re.sub(r"\(.*|[{}\s]", "", symbol.name) for symbol in (first, second)]
    if first.call or second.call:
        if first.call and second.call:
            return names[0] == names[1] or {len(names[0]), len(names[1])} == {1}
        return "y" in names or names[0] == names[1]
    stems = [name.partition("_") for name in names]
    return stems[0][0] == stems[1][0] and not (stems[0][2] and stems[1][2])


def common_labels(items: tuple[Node, ...]) -> Sequence | None:
    """`x = 1, y = 2` as a tuple in the order of the labels, `x = 1, x = 2` as a list; None of other items."""
    definitions = [definition(item) for item in items]
    if any(named is None or not isinstance(named[0], Symbol) or named[0].call for named in definitions):
        return None
    pairs = [(named[0].name, named[1]) for named in definitions if named is not None and isinstance(named[0], Symbol)]
    names = [name for name, _ in pairs]
    if len(set(names)) == 1 or (len({name.partition("_")[0] for name in names}) == 1 and len(names) <= 3):
        return Sequence("list", tuple(value for _, value in pairs))
    if len(set(names)) == len(names):
        return Sequence("tuple", tuple(value for _, value in sorted(pairs, key=lambda pair: pair[0])))
    return None


def equivalent(first: Relation, second: Relation) -> bool:
    """Two relations that say the same: equal or swapped sides, or differences of sides that are proportional."""
    if len(first.sides) != 2 or len(second.sides) != 2:
        return first.operators == second.operators and all(map(scalars_equal, first.sides, second.sides))
    (left, right), (other_left, other_right) = first.sides, second.sides
    operator, other = first.operators[0], second.operators[0]
    if operator in _FLIPPED and other == _FLIPPED[operator]:
        other_left, other_right, other = other_right, other_left, operator
    if operator != other or operator not in ("=", "!=", *_FLIPPED):
        return False
    difference, other_difference = Sum((left, Negative(right))), Sum((other_left, Negative(other_right)))
    return proportional(difference, other_difference, positive=operator in _FLIPPED)


def _is_label(node: Node) -> bool:
    if isinstance(node, Symbol | Text):
        return True
    if isinstance(node, Sequence):  # (x, y) = (1, 2)
        return node.kind == "tuple" and all(isinstance(item, Symbol) for item in node.items)
    if isinstance(node, Constant):
        return node.name != "infinity"
    if isinstance(node, Function) and node.name not in ("abs", "sin", "cos", "tan", "gcd", "lcm", "max", "min"):
        return False
    if not isinstance(node, Product | Sum | Function | Power | Negative):
        return False
    parts = list(node.walk())
    has_power = any(isinstance(part, Power) for part in parts)
    return bool(symbols_of(node)) and not has_power and not any(isinstance(part, Number) for part in parts)


def _last_value(sides: tuple[Node, ...], operators: tuple[str, ...], reference: Node | None) -> Node | None:
    """The last side that is stated exactly, if all sides agree; behind ≈ stands only a rounding of it."""
    exact = sides[0]
    for operator, side in zip(operators, sides[1:], strict=True):
        if operator == "~":
            if not _is_rounding(exact, side, reference):
                return None
            if reference is not None and decimal_digits(_bare(reference)) and not decimal_digits(_bare(exact)):
                exact = side  # the reference is rounded, too
        else:
            if isinstance(side, Relation) or not _same_value(exact, side):
                return None
            exact = side
    return exact


def _same_value(first: Node, second: Node) -> bool:
    if isinstance(first, Sequence | Text) or isinstance(second, Sequence | Text):
        return first == second
    return scalars_equal(_bare(first), _bare(second))


def _is_rounding(exact: Node, rounded: Node, reference: Node | None) -> bool:
    """A numeral within half a unit of its last digit from an exact value."""
    value, approximation = constant_value(_bare(exact)), constant_value(_bare(rounded))
    if value is None or approximation is None:
        return False
    if isinstance(value, Fraction) and value.denominator == 1:
        return values_equal(value, approximation)
    try:
        value, approximation = inexact(value), inexact(approximation)
    except NoValueError:
        return False
    digits = decimal_digits(_bare(rounded))
    size = context().floor(context().log10(abs(approximation))) if approximation else 0
    unit = context().mpf(10) ** (size - digits + 1) if digits else 1
    return bool(abs(value - approximation) <= unit)


def _bare(node: Node) -> Node:
    return node.value if isinstance(node, Quantity) else node
