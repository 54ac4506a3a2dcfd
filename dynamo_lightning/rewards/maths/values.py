"""Values of expressions: exact fractions where these stay small, else 50 digits of mpmath with any exponent.

Costs are bounded before they arise, so that no time limit is needed: each operation is refused if its operands are too
large, and counted. 9^(9^9) has a value, since mpmath's exponents are unlimited; 9^(9^(9^9)) has none.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from dynamo_lightning.rewards.maths.nodes import (
    Based,
    Constant,
    Function,
    Matrix,
    Mixed,
    Negative,
    Node,
    Number,
    PlusMinus,
    Power,
    Product,
    Quantity,
    Quotient,
    Sum,
    Symbol,
)

if TYPE_CHECKING:
    import mpmath

DIGITS = 50
MAX_INTEGER_BITS, MAX_FRACTION_BITS, MAX_EXPONENT_BITS = 200_000, 20_000, 2_000
MAX_STEPS = 4_000
_MAX_FACTORIAL = 3_000
_MAX_ANGLE = 10**15
_FLUSH = Fraction(1, 10**40)
_LOCAL = threading.local()


class NoValueError(Exception):
    """The expression has no value, or one that would take too long."""


@dataclass
class Evaluation:
    """Values of variables and conventions under which an expression is evaluated.

    Attributes:
        point: Value of each variable.
        sign: Sign that `±` stands for.
        log_base_10: Reads `log` as the decimal logarithm, instead of the natural one.
        steps: Operations left before the evaluation is given up.
    """

    point: Mapping[str, Fraction] = field(default_factory=dict)
    sign: int = 1
    log_base_10: bool = False
    steps: int = MAX_STEPS

    def value(self, node: Node) -> Any:
        """Return the value of a scalar expression: a Fraction, or a real or complex number of mpmath.

        Raises:
            NoValueError: If there is none: division by zero, an unknown variable, a set, or something too large.
        """
        try:
            return self._value(node)
        except (ArithmeticError, ValueError) as error:  # of mpmath's functions at their poles
            raise NoValueError(str(error)) from error

    def _value(self, node: Node) -> Any:
        self._spend(1)
        if isinstance(node, Number | Mixed):
            return node.value
        if isinstance(node, Symbol):
            if node.name not in self.point:
                raise NoValueError(node.name)
            return self.point[node.name]
        if isinstance(node, Constant):
            return _constant(node.name)
        if isinstance(node, Sum):
            return self._sum([self._value(term) for term in node.terms])
        if isinstance(node, Product):
            return self._product(node)
        if isinstance(node, Quotient):
            return self._divide(self._value(node.numerator), self._value(node.denominator))
        if isinstance(node, Power):
            return self._power(self._value(node.base), self._value(node.exponent))
        if isinstance(node, Negative):
            return -self._value(node.operand)
        if isinstance(node, PlusMinus):
            value = self._value(node.operand)
            return value if (self.sign > 0) != node.flipped else -value
        if isinstance(node, Based):
            return Fraction(int(node.digits, node.base))
        if isinstance(node, Quantity):
            return self._quantity(node)
        if isinstance(node, Function):
            return self._function(node)
        raise NoValueError(type(node).__name__)

    def _spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise NoValueError("too many operations")

    def _sum(self, values: list[Any]) -> Any:
        if all(isinstance(value, Fraction) for value in values):
            return _bounded(sum(values, Fraction(0)))
        numbers = [inexact(value) for value in values]
        total = context().fsum(numbers)
        largest = max(abs(number) for number in numbers)
        return Fraction(0) if abs(total) <= largest * inexact(_FLUSH) else total

    def _product(self, node: Product) -> Any:
        result: Any = Fraction(1)
        for factor in node.factors:
            result = _times(result, self._value(factor))
        return result

    @staticmethod
    def _divide(numerator: Any, denominator: Any) -> Any:
        if denominator == 0:
            raise NoValueError("division by zero")
        if isinstance(numerator, Fraction) and isinstance(denominator, Fraction):
            return _bounded(numerator / denominator)
        return inexact(numerator) / inexact(denominator)

    def _power(self, base: Any, exponent: Any) -> Any:
        self._spend(10)
        if base == 0:
            if not isinstance(exponent, Fraction) or exponent < 0:
                raise NoValueError("power of zero")
            return Fraction(int(exponent == 0))
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            exact = _exact_power(base, exponent)
            if exact is not None:
                return exact
        base, exponent = inexact(base), inexact(exponent)
        logarithm = exponent * context().log(base)
        return _exponential(logarithm)

    def _quantity(self, node: Quantity) -> Any:
        value = self._value(node.value)
        if node.unit == "%":
            return _times(value, Fraction(1, 100))
        if node.unit == "deg":
            return inexact(value) * context().pi / 180
        raise NoValueError("a unit within an expression")

    def _function(self, node: Function) -> Any:
        self._spend(20)
        if node.name == "det":
            return self._determinant(node.arguments[0])
        arguments = [self._value(argument) for argument in node.arguments]
        if node.name in _OF_INTEGERS:
            return _of_integers(node.name, arguments)
        if node.name == "binom" and len(arguments) == 2:
            return _binomial(*arguments)
        if node.name == "root" and len(arguments) == 2:
            return self._root(*arguments)
        if node.name == "log_base" and len(arguments) == 2:
            base, argument = arguments
            return self._divide(_real_function("ln", argument), _real_function("ln", base))
        if node.name in ("max", "min"):
            if not all(is_real(value) for value in arguments):
                raise NoValueError("no order")
            return (max if node.name == "max" else min)(arguments, key=inexact)
        if len(arguments) != 1:
            raise NoValueError(f"{node.name} of {len(arguments)}")
        if node.name == "log" and self.log_base_10:
            return self._divide(_real_function("ln", arguments[0]), _real_function("ln", Fraction(10)))
        return _real_function("ln" if node.name == "log" else node.name, arguments[0])

    def _root(self, degree: Any, radicand: Any) -> Any:
        if (
            isinstance(degree, Fraction)
            and degree.denominator == 1
            and degree % 2 == 1
            and is_real(radicand)
            and radicand < 0
        ):
            return -self._power(-radicand, 1 / degree)  # the real one
        return self._power(radicand, self._divide(Fraction(1), degree))

    def _determinant(self, matrix: Node) -> Any:
        if not isinstance(matrix, Matrix) or not len(matrix.rows) == len(matrix.rows[0]) <= 6:
            raise NoValueError("no determinant")
        return self._expand([[self._value(cell) for cell in row] for row in matrix.rows])

    def _expand(self, rows: list[list[Any]]) -> Any:
        if len(rows) == 1:
            return rows[0][0]
        self._spend(len(rows))
        terms = []
        for column, cell in enumerate(rows[0]):
            if cell != 0:
                minor = self._expand([row[:column] + row[column + 1 :] for row in rows[1:]])
                terms.append(_times(cell, minor) if column % 2 == 0 else -_times(cell, minor))
        return self._sum(terms) if terms else Fraction(0)


_OF_INTEGERS = frozenset(("factorial", "double_factorial", "gcd", "lcm", "mod"))


def context() -> mpmath.MPContext:
    """The thread's own context of mpmath: its functions change the precision of theirs while they work."""
    if not hasattr(_LOCAL, "context"):
        import mpmath

        _LOCAL.context = mpmath.MPContext()
        _LOCAL.context.dps = DIGITS
    return _LOCAL.context


def inexact(value: Any) -> Any:
    """A value as a number of mpmath, refused if its exponent is too large to go on with."""
    numbers = context()
    if isinstance(value, Fraction):
        return numbers.mpf(value.numerator) / value.denominator
    for part in (value.real, value.imag) if isinstance(value, numbers.mpc) else (value,):
        if not numbers.isfinite(part):
            raise NoValueError("not finite")
        if part and abs(part.exp).bit_length() > MAX_EXPONENT_BITS:
            raise NoValueError("too large")
    return value


def is_real(value: Any) -> bool:
    """A Fraction or a real number of mpmath."""
    return isinstance(value, Fraction | context().mpf)


def _constant(name: str) -> Any:
    numbers = context()
    if name == "infinity":
        raise NoValueError("infinity")
    return {"pi": +numbers.pi, "e": +numbers.e, "i": numbers.mpc(0, 1)}[name]


def _bounded(value: Fraction) -> Any:
    """A fraction, or its approximation if it grew too large."""
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    limit = MAX_INTEGER_BITS if value.denominator == 1 else MAX_FRACTION_BITS
    return value if bits <= limit else inexact(value)


def _times(first: Any, second: Any) -> Any:
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return _bounded(first * second)
    if first == 0 or second == 0:
        return Fraction(0)
    return inexact(first) * inexact(second)


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """A power that is rational and small enough, None otherwise."""
    root = exponent.denominator
    if root > 1:
        if base < 0 or root > 100:
            return None
        numerator, denominator = _integer_root(base.numerator, root), _integer_root(base.denominator, root)
        if numerator is None or denominator is None:
            return None
        base = Fraction(numerator, denominator)
    if abs(base) == 1:
        return base if exponent.numerator % 2 else Fraction(1)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    limit = MAX_INTEGER_BITS if base.denominator == 1 or base.numerator in (1, -1) else MAX_FRACTION_BITS
    if exponent.numerator.bit_length() > 20 or bits * abs(exponent.numerator) > limit:
        return None
    return base**exponent.numerator


def _integer_root(number: int, degree: int) -> int | None:
    """The exact root of an integer, None if it has none."""
    if degree == 2:
        root = math.isqrt(number)
    elif number.bit_length() > 1_000:
        return None
    else:
        root = round(number ** (1 / degree))
        root = next((near for near in (root - 1, root, root + 1) if near**degree == number), root)
    return root if root**degree == number else None


def _exponential(logarithm: Any) -> Any:
    """E to the power of a number, unless it is too large to be represented."""
    logarithm = inexact(logarithm)
    real = logarithm.real if isinstance(logarithm, context().mpc) else logarithm
    imaginary = logarithm.imag if isinstance(logarithm, context().mpc) else 0
    if abs(real) > 2**200 or abs(imaginary) > _MAX_ANGLE:
        raise NoValueError("too large")
    return context().exp(logarithm)


def _of_integers(name: str, arguments: list[Any]) -> Any:
    """A function of integers; the factorial also of other numbers."""
    if not all(isinstance(value, Fraction) and value.denominator == 1 for value in arguments):
        if name == "factorial" and len(arguments) == 1:
            return _gamma(arguments[0])
        raise NoValueError("not an integer")
    numbers = [value.numerator for value in arguments]
    if name == "gcd":
        return Fraction(math.gcd(*numbers))
    if name == "lcm":
        if sum(number.bit_length() for number in numbers) > MAX_FRACTION_BITS:
            raise NoValueError("too large")
        return Fraction(math.lcm(*numbers))
    if name == "mod":
        if len(numbers) != 2 or numbers[1] <= 0:
            raise NoValueError("no modulus")
        return Fraction(numbers[0] % numbers[1])
    (number,) = numbers
    if number < 0:
        raise NoValueError("factorial of a negative number")
    if name == "factorial":
        return Fraction(math.factorial(number)) if number <= _MAX_FACTORIAL else _gamma(arguments[0])
    if number > _MAX_FACTORIAL:
        raise NoValueError("too large")
    return Fraction(math.prod(range(number, 1, -2)))


def _gamma(value: Any) -> Any:
    """The factorial of a number that is large or no integer, by the logarithm of the gamma function."""
    number = inexact(value)
    if abs(number) > 2**60:
        raise NoValueError("too large")
    return _exponential(context().loggamma(number + 1))


def _binomial(upper: Any, lower: Any) -> Any:
    if not isinstance(lower, Fraction) or lower.denominator != 1 or not isinstance(upper, Fraction):
        return _by_gamma(upper, lower)
    count = lower.numerator
    if upper.denominator == 1 and 0 <= upper <= 10_000 and 0 <= count <= upper:
        return Fraction(math.comb(upper.numerator, count))
    if count < 0:
        return Fraction(0)
    if count > 50 or upper.numerator.bit_length() > 200:
        return _by_gamma(upper, lower)
    return math.prod((upper - index for index in range(count)), start=Fraction(1)) / math.factorial(count)


def _by_gamma(upper: Any, lower: Any) -> Any:
    """A binomial coefficient by the gamma function."""
    return _gamma(upper) / (_gamma(lower) * _gamma(inexact(upper) - inexact(lower)))


def _real_function(name: str, value: Any) -> Any:
    """A function of one number."""
    numbers = context()
    if name in ("abs", "floor", "ceil", "sgn"):
        if name == "abs":
            return abs(value)
        if not is_real(value) or abs(value) > 2 ** (8 * DIGITS):
            raise NoValueError(name)
        if name == "sgn":
            return Fraction((value > 0) - (value < 0))
        if isinstance(value, Fraction):
            return Fraction(math.floor(value) if name == "floor" else math.ceil(value))
        rounded = numbers.floor(value) if name == "floor" else numbers.ceil(value)
        nearest = numbers.nint(value)
        return Fraction(int(nearest if abs(value - nearest) < inexact(_FLUSH) * max(1, abs(value)) else rounded))
    if name == "ln":
        if value == 1:
            return Fraction(0)
        return numbers.log(inexact(value))
    number = inexact(value)
    if abs(number) > _MAX_ANGLE:
        raise NoValueError("too large")
    if name in _MPMATH_NAMES:
        result = getattr(numbers, _MPMATH_NAMES[name])(number)
        if name in ("sin", "cos", "tan", "cot") and abs(result) < inexact(_FLUSH):
            return Fraction(0)
        return result
    raise NoValueError(name)


_MPMATH_NAMES = {
    **{name: name for name in "sin cos tan cot sec csc sinh cosh tanh coth sech csch".split()},
    **{f"arc{name}": f"a{name}" for name in "sin cos tan cot sec csc sinh cosh tanh".split()},
}
