"""Equality of scalar expressions: by exact value, or by their values at several points.

Two expressions with variables are equal if their values agree to 25 digits wherever both have one, at points between
which no identity of ordinary length could tell them apart by chance (Schwartz–Zippel).
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from dynamo_lightning.rewards.maths.nodes import (
    Constant,
    Negative,
    Node,
    Number,
    Power,
    Product,
    Sum,
    functions_of,
    symbols_of,
)
from dynamo_lightning.rewards.maths.values import Evaluation, NoValueError, context, inexact

MIN_ROUNDED_DIGITS = 6
"""A reference decimal with so many significant digits may be the rounding of an exact answer."""
_INTEGER_FUNCTIONS = frozenset(("floor", "ceil", "factorial", "binom", "gcd", "lcm", "mod", "double_factorial"))
_MAX_SYMBOLS = 12


def scalars_equal(reference: Node, answer: Node) -> bool:
    """Two scalar expressions have the same value, for all values of their variables."""
    if reference == answer:
        return True
    for infinite, other in ((reference, answer), (answer, reference)):
        sign = infinity_sign(infinite)
        if sign:
            return sign == infinity_sign(other)
    names = sorted(symbols_of(reference) | symbols_of(answer))
    if not names:
        return _constants_equal(reference, answer)
    if len(names) > _MAX_SYMBOLS:
        return False
    if symbols_of(reference) != symbols_of(answer) and _is_trivial(reference) and _is_trivial(answer):
        return False
    decimal_logs = (False, True) if "log" in functions_of(reference) | functions_of(answer) else (False,)
    return any(_agree_everywhere(reference, answer, names, decimal) for decimal in decimal_logs)


def constant_value(node: Node, **conventions: Any) -> Any:
    """Return the value of an expression without variables; None if it has none."""
    try:
        return Evaluation(**conventions).value(node)
    except NoValueError:
        return None


def values_equal(first: Any, second: Any) -> bool:
    """Two values are equal: exactly as fractions, otherwise to 25 digits."""
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    try:
        first, second = inexact(first), inexact(second)
        return bool(abs(first - second) <= max(abs(first), abs(second)) * inexact(Fraction(1, 10**25)))
    except (NoValueError, ArithmeticError, ValueError):
        return False


def proportional(first: Node, second: Node, positive: bool = False) -> bool:
    """Two expressions with variables differ by a constant factor, a positive one if asked for."""
    names = sorted(symbols_of(first) | symbols_of(second))
    if not names or len(names) > _MAX_SYMBOLS or symbols_of(first) != symbols_of(second):
        return False
    ratio: Any = None
    agreements = 0
    for point in _points(names, first, second):
        values = _values_at(first, second, point, False)
        if values is None:
            continue
        if values[0] == 0 or values[1] == 0:
            return False
        here = (
            values[0] / values[1]
            if all(isinstance(v, Fraction) for v in values)
            else inexact(values[0]) / inexact(values[1])
        )
        if ratio is not None and not values_equal(ratio, here):
            return False
        ratio = here
        agreements += 1
    if agreements < 2:
        return False
    return not positive or (isinstance(ratio, Fraction | context().mpf) and ratio > 0)


def _constants_equal(reference: Node, answer: Node) -> bool:
    """Two constant expressions have the same value, or the reference is a rounding of it to many digits."""
    for decimal in (False, True) if "log" in functions_of(reference) | functions_of(answer) else (False,):
        first = constant_value(reference, log_base_10=decimal)
        second = constant_value(answer, log_base_10=decimal)
        if (
            first is not None
            and second is not None
            and (values_equal(first, second) or _rounds_to(reference, answer, second))
        ):
            return True
    return False


def _rounds_to(reference: Node, answer: Node, value: Any) -> bool:
    """The reference is a decimal of many digits, and the answer, exact or at least as precise as six, rounds to it."""
    digits = decimal_digits(reference)
    if digits < MIN_ROUNDED_DIGITS:
        return False
    own_digits = decimal_digits(answer)
    if own_digits:
        if own_digits < MIN_ROUNDED_DIGITS:
            return False
        digits = min(digits, own_digits)
    elif isinstance(_mantissa(answer), Number):  # an integer is no rounding
        return False
    first = constant_value(reference)
    try:
        first, value = inexact(first), inexact(value)
    except NoValueError:
        return False
    if first == 0 or not isinstance(value, context().mpf):
        return False
    unit = context().mpf(10) ** (context().floor(context().log10(abs(first))) - digits + 1)
    return bool(abs(first - value) <= unit * inexact(Fraction(51, 100)))


def decimal_digits(node: Node) -> int:
    """The number of significant digits of a decimal or of the mantissa in scientific notation, 0 of anything else."""
    mantissa = _mantissa(node)
    return mantissa.digits if isinstance(mantissa, Number) else 0


def _mantissa(node: Node) -> Node:
    """A numeral without sign and power of ten."""
    if isinstance(node, Negative):
        node = node.operand
    if isinstance(node, Product) and len(node.factors) == 2 and is_power_of_ten(node.factors[1]):
        return node.factors[0]
    return node


def is_power_of_ten(node: Node) -> bool:
    """10 to an integer, as scientific notation has it."""
    if not isinstance(node, Power) or node.base != Number(Fraction(10)):
        return False
    exponent = node.exponent.operand if isinstance(node.exponent, Negative) else node.exponent
    return isinstance(exponent, Number) and exponent.value.denominator == 1


def _agree_everywhere(reference: Node, answer: Node, names: list[str], decimal: bool) -> bool:
    """The values agree at every point where both exist, and at two of them at least."""
    agreements = 0
    for point in _points(names, reference, answer):
        values = _values_at(reference, answer, point, decimal)
        if values is None:
            continue
        if not values_equal(*values):
            return False
        agreements += 1
    return agreements >= 2


def _values_at(first: Node, second: Node, point: dict[str, Fraction], decimal: bool) -> tuple[Any, Any] | None:
    try:
        return (
            Evaluation(point, log_base_10=decimal).value(first),
            Evaluation(point, log_base_10=decimal).value(second),
        )
    except NoValueError:
        return None


def _points(names: list[str], *nodes: Node) -> Iterator[dict[str, Fraction]]:
    """Values of the variables: positive; negative too beside an absolute value; integers for functions of integers."""
    used = set().union(*(functions_of(node) for node in nodes))
    if used & _INTEGER_FUNCTIONS or any(_is_alternating(node) for node in nodes):
        for step in (5, 8, 14, 19, 27, 36):  # falling, so that binom(n, k) and n − k make sense in either order
            yield {name: Fraction(step * (3 + len(names) - index) // 3 + index) for index, name in enumerate(names)}
        for step in (7, 12):
            yield {name: Fraction(step + 5 * index) for index, name in enumerate(names)}
        return
    for offset in (Fraction(3, 11), Fraction(17, 13), Fraction(29, 7)):
        yield {name: offset + Fraction(7 * index + 2, 17) for index, name in enumerate(names)}
    yield {name: Fraction(41, 19) - Fraction(5 * index + 1, 23 + index) for index, name in enumerate(names)}
    if "abs" in used or "sgn" in used:
        yield {name: -Fraction(9, 7) - Fraction(index, 3) for index, name in enumerate(names)}
        for negative in names[:4]:
            yield {name: Fraction(8 + index, 5) * (-1 if name == negative else 1) for index, name in enumerate(names)}


def _is_alternating(node: Node) -> bool:
    """Contains (−1)^n, which only integers n make real."""
    return any(
        isinstance(part, Power) and part.base == Negative(Number(Fraction(1))) and symbols_of(part.exponent)
        for part in node.walk()
    )


def _is_trivial(node: Node) -> bool:
    """No sum in which a variable could cancel."""
    return not any(isinstance(part, Sum) for part in node.walk())


def infinity_sign(node: Node) -> int:
    """±1 of ±∞, 0 of anything else."""
    if isinstance(node, Negative):
        return -infinity_sign(node.operand)
    return int(isinstance(node, Constant) and node.name == "infinity")
