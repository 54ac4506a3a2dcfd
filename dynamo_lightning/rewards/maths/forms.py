r"""Final form: an answer that is worked out, not the problem restated.

With `answer_kind: number` a number is wanted where the reference is one. A reference that is a numeral asks for a
numeral: `17+25`, `6 \cdot 7`, `\sqrt{1764}` and `\gcd(84, 126)` are not 42. Another constant, such as `2\sqrt{3}`,
allows roots, powers and the functions that the reference itself uses.
"""

from __future__ import annotations

from dynamo_lightning.rewards.maths.nodes import (
    Based,
    Constant,
    Mixed,
    Negative,
    Node,
    Number,
    Product,
    Quantity,
    Quotient,
    functions_of,
    symbols_of,
)
from dynamo_lightning.rewards.maths.scalars import is_power_of_ten

_SAME_FAMILY = {"ln": "log", "log_base": "log", "root": "", "abs": "abs"}


def is_numeral(node: Node) -> bool:
    """A number written out: integer, decimal, fraction, mixed number, percentage, or scientific notation."""
    if isinstance(node, Negative):
        return not isinstance(node.operand, Negative) and is_numeral(node.operand)
    if isinstance(node, Quantity):
        return is_numeral(node.value)
    if isinstance(node, Quotient):
        return _is_integer(node.numerator) and _is_integer(node.denominator)
    if isinstance(node, Product):
        return len(node.factors) == 2 and isinstance(node.factors[0], Number) and is_power_of_ten(node.factors[1])
    return isinstance(node, Number | Mixed | Based) or is_power_of_ten(node)


def is_final(reference: Node, answer: Node) -> bool:
    """The answer is worked out as far as the reference is; true if the reference has variables."""
    if symbols_of(reference) or symbols_of(answer):
        return True
    if is_numeral(reference):
        if not is_numeral(answer):
            return isinstance(answer, Constant)
        return not (_is_integer(reference) and isinstance(_without_sign(answer), Quotient))
    allowed = _families(reference)
    return _families(answer) <= allowed


def _families(node: Node) -> set[str]:
    return {_SAME_FAMILY.get(name, name) for name in functions_of(node)} - {""}


def _is_integer(node: Node) -> bool:
    node = _without_sign(node)
    return isinstance(node, Number) and node.value.denominator == 1 and not node.digits


def _without_sign(node: Node) -> Node:
    while isinstance(node, Negative | Quantity):
        node = node.operand if isinstance(node, Negative) else node.value
    return node
