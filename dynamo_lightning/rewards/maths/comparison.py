"""Equality of two answers that are read: units, labels, words, sets, tuples, matrices, equations, numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from dynamo_lightning.rewards.maths import matrices, realsets, relations, units
from dynamo_lightning.rewards.maths.forms import is_final
from dynamo_lightning.rewards.maths.nodes import (
    Based,
    Constant,
    Function,
    Interval,
    Matrix,
    Negative,
    Node,
    Number,
    PlusMinus,
    Product,
    Quantity,
    Quotient,
    Relation,
    Sequence,
    SetOperation,
    Sum,
    Symbol,
    Text,
    symbols_of,
)
from dynamo_lightning.rewards.maths.scalars import constant_value, scalars_equal, values_equal
from dynamo_lightning.rewards.maths.words import is_name, words_equal

AnswerKind = Literal["number", "expression"]
MAX_ITEMS = 120
_MAX_COMPARISONS = 3_000


@dataclass
class Comparison:
    """Rules under which answers are compared.

    Attributes:
        answer_kind: `number` wants a number worked out where the reference is one.
        lenient_units: Accepts another unit than the reference's, and 50 % for 0.5.
        budget: Comparisons of items left before two long lists are given up.
    """

    answer_kind: AnswerKind = "expression"
    lenient_units: bool = False
    budget: int = _MAX_COMPARISONS

    def equal(self, reference: Node, answer: Node) -> bool:
        """Return whether the answer equals the reference."""
        self.budget -= 1
        if self.budget < 0:
            return False
        reference, answer = expand(reference), expand(answer)
        if isinstance(reference, Quantity) or isinstance(answer, Quantity):
            return self._quantities_equal(reference, answer)
        if isinstance(reference, Relation) or isinstance(answer, Relation):
            return self._relations_equal(reference, answer)
        if isinstance(reference, Text) or isinstance(answer, Text):
            return words_equal(reference, answer)
        if realsets.is_set(reference) or realsets.is_set(answer):
            return self._sets_equal(reference, answer)
        if isinstance(reference, Sequence) or isinstance(answer, Sequence):
            return self._sequences_equal(reference, answer)
        first, second = matrices.as_matrix(reference), matrices.as_matrix(answer)
        if first is not None or second is not None:
            worked_out = self if isinstance(answer, Matrix) else replace(self, answer_kind="expression")
            return first is not None and second is not None and worked_out._matrices_equal(first, second)
        if isinstance(reference, Based) or isinstance(answer, Based):
            return self._based_equal(reference, answer)
        if is_name(reference) or is_name(answer):
            return reference == answer
        if self.answer_kind == "number" and not is_final(reference, answer):
            return False
        return scalars_equal(reference, answer)

    def _quantities_equal(self, reference: Node, answer: Node) -> bool:
        """Values with units: a unit is optional, but one that contradicts the other's is wrong."""
        wanted, given = _unit_of(reference), _unit_of(answer)
        value, own_value = _value_of(reference), _value_of(answer)
        if "%" in (wanted, given) and wanted != given:
            if wanted == "%" and given == "":  # 62 or 0.62 for 62 %
                return self.equal(value, own_value) or self.equal(Quotient(value, Number(Fraction(100))), own_value)
            if given == "%" and wanted == "":
                as_number = replace(answer, value=own_value) if isinstance(answer, Quantity) else answer
                return self.equal(value, own_value) or (
                    self.lenient_units and self._fraction_equals_percentage(value, as_number)
                )
        if wanted and given and not units.same_unit(wanted, given) and not self.lenient_units:
            return False
        return self.equal(value, own_value)

    def _fraction_equals_percentage(self, reference: Node, answer: Node) -> bool:
        first, second = constant_value(reference), constant_value(answer)
        return first is not None and second is not None and values_equal(first, second)

    def _relations_equal(self, reference: Node, answer: Node) -> bool:
        """Equations, definitions, and inequalities, or one of them and a bare answer."""
        if isinstance(reference, Relation) and isinstance(answer, Relation):
            if relations.is_chain(answer) and not relations.is_chain(reference):
                shorter = relations.conclusion(answer)
                return shorter is not None and self.equal(reference, shorter)
            first, second = relations.definition(reference), relations.definition(answer)
            if first is not None and second is not None and relations.same_label(first[0], second[0]):
                return self.equal(first[1], second[1])
            as_sets = realsets.sets_equal(reference, answer)
            if as_sets is not None and symbols_of(reference) == symbols_of(answer):
                return as_sets
            return relations.equivalent(reference, answer)
        if isinstance(reference, Relation):
            if realsets.is_set(reference):
                return self._sets_equal(reference, answer)
            named = relations.definition(reference)
            return named is not None and self.equal(named[1], answer)
        assert isinstance(answer, Relation)
        if answer.operators == ("in",) and isinstance(answer.sides[1], Sequence):  # x in {1, 2}
            return self.equal(reference, answer.sides[1])
        if realsets.is_set(answer):
            return self._sets_equal(reference, answer)
        stated = relations.stated_value(reference, answer)
        return stated is not None and self.equal(reference, stated)

    def _sets_equal(self, reference: Node, answer: Node) -> bool:
        """Sets of real numbers; intervals whose ends have variables are compared end by end."""
        equal = realsets.sets_equal(reference, answer)
        if equal is not None:
            # A pair of numbers may be an open interval, but a list of numbers is none.
            return equal and not isinstance(answer, Text)
        if isinstance(reference, Interval) and isinstance(answer, Interval):
            return (
                (reference.closed_left, reference.closed_right) == (answer.closed_left, answer.closed_right)
                and self.equal(reference.left, answer.left)
                and self.equal(reference.right, answer.right)
            )
        if isinstance(reference, SetOperation) and isinstance(answer, SetOperation):
            return (
                reference.operator == answer.operator
                and self.equal(reference.left, answer.left)
                and self.equal(reference.right, answer.right)
            )
        return False

    def _sequences_equal(self, reference: Node, answer: Node) -> bool:
        """Lists and sets in any order, tuples in theirs."""
        first, second = _as_sequence(reference), _as_sequence(answer)
        if first is None or second is None:
            return False
        if "ratio" in (first.kind, second.kind):
            return self._ratios_equal(first, second)
        if len(first.items) != len(second.items) or len(first.items) > MAX_ITEMS:
            return False
        if not first.items:
            return True
        if {first.kind, second.kind} == {"set", "tuple"} and len(first.items) > 1:
            return False
        if "tuple" in (first.kind, second.kind):
            return all(map(self.equal, first.items, second.items))
        left = list(second.items)
        for item in first.items:
            match = next((index for index, other in enumerate(left) if self.equal(item, other)), None)
            if match is None:
                return False
            del left[match]
        return True

    def _ratios_equal(self, first: Sequence, second: Sequence) -> bool:
        """3 : 4 and 3/4, or equal terms."""
        quotients = [
            Quotient(*pair.items) if pair.kind == "ratio" and len(pair.items) == 2 else pair.items[0]
            for pair in (first, second)
            if pair.items
        ]
        if len(quotients) == 2 and {len(first.items), len(second.items)} <= {1, 2}:
            worked_out = self.answer_kind == "expression" or is_final(*quotients)
            return worked_out and scalars_equal(*quotients)
        return len(first.items) == len(second.items) and all(map(self.equal, first.items, second.items))

    def _matrices_equal(self, first: Matrix, second: Matrix) -> bool:
        shapes = [(len(matrix.rows), len(matrix.rows[0])) for matrix in (first, second)]
        if shapes[0] != shapes[1]:
            return False
        pairs = zip((c for row in first.rows for c in row), (c for row in second.rows for c in row), strict=True)
        return all(self.equal(a, b) for a, b in pairs)

    @staticmethod
    def _based_equal(reference: Node, answer: Node) -> bool:
        """Numerals in a base: the same digits; the base may be left out, not changed."""
        if isinstance(reference, Based) and isinstance(answer, Based):
            return reference == answer
        if not isinstance(reference, Based) or not reference.digits.isdigit():
            return False
        return isinstance(answer, Number) and not answer.digits and answer.value == Fraction(int(reference.digits))


def expand(node: Node) -> Node:
    """Return a node with `±` written out as two values, trivial brackets left out, negative units moved outwards."""
    if isinstance(node, Sequence):
        items = tuple(part for item in node.items for part in _both_signs(item))
        if node.kind == "list" and items and all(isinstance(item, Relation) for item in items):
            labelled = relations.common_labels(items)
            if labelled is not None:
                return labelled
        if node.kind == "list" and len(items) > 1 and isinstance(items[0], Relation):
            first = relations.definition(items[0])
            if first is not None and not any(isinstance(item, Relation) for item in items[1:]):
                return Sequence("list", (first[1], *items[1:]))
        return replace(node, items=items) if items != node.items else node
    if isinstance(node, Product) and len(node.factors) == 2 and isinstance(node.factors[1], Sequence):
        name, point = node.factors  # a point with its name, A(1, 2)
        if (
            isinstance(name, Symbol)
            and name.name[0].isupper()
            and isinstance(point, Sequence)
            and point.kind == "tuple"
        ):
            return point
    if isinstance(node, Negative) and isinstance(node.operand, Quantity):
        return Quantity(Negative(node.operand.value), node.operand.unit)
    if isinstance(node, Relation) and node.operators == ("=",) and isinstance(node.sides[1], Sequence):
        named = relations.definition(node)
        if named is not None and node.sides[1].kind in ("list", "tuple"):
            return node
    signs = _both_signs(node)
    return signs[0] if len(signs) == 1 else Sequence("list", tuple(signs))


def _both_signs(node: Node) -> list[Node]:
    """A node with each sign of its `±`."""
    if isinstance(node, Sequence | Matrix | Interval | SetOperation | Text | Symbol | Number):
        return [node]
    if not any(isinstance(part, PlusMinus) for part in node.walk()):
        return [node]
    return [_with_sign(node, 1), _with_sign(node, -1)]


def _with_sign(node: Node, sign: int) -> Node:
    """A node in which `±` is that sign."""
    if isinstance(node, PlusMinus):
        operand = _with_sign(node.operand, sign)
        return operand if (sign > 0) != node.flipped else Negative(operand)
    if isinstance(node, Sum):
        return Sum(tuple(_with_sign(term, sign) for term in node.terms))
    if isinstance(node, Product):
        return Product(tuple(_with_sign(factor, sign) for factor in node.factors))
    if isinstance(node, Quotient):
        return Quotient(_with_sign(node.numerator, sign), _with_sign(node.denominator, sign))
    if isinstance(node, Negative):
        return Negative(_with_sign(node.operand, sign))
    if isinstance(node, Quantity):
        return Quantity(_with_sign(node.value, sign), node.unit)
    if isinstance(node, Function):
        return Function(node.name, tuple(_with_sign(argument, sign) for argument in node.arguments))
    if isinstance(node, Relation):
        return Relation(node.operators, tuple(_with_sign(side, sign) for side in node.sides))
    return node


def _unit_of(node: Node) -> str:
    return node.unit if isinstance(node, Quantity) else ""


def _value_of(node: Node) -> Node:
    return node.value if isinstance(node, Quantity) else node


def _as_sequence(node: Node) -> Sequence | None:
    """A sequence as it is, a vector as a tuple, a single value as a set of one."""
    if isinstance(node, Sequence):
        return node
    matrix = matrices.as_matrix(node)
    if matrix is not None:
        if len(matrix.rows) == 1 or len(matrix.rows[0]) == 1:
            return Sequence("tuple", tuple(cell for row in matrix.rows for cell in row))
        return None
    if isinstance(node, Interval | SetOperation | Relation | Text):
        return None
    return Sequence("set", (node,)) if not isinstance(node, Constant) or node.name != "empty" else Sequence("set", ())
