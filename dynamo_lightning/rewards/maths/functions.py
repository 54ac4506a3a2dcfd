"""Parser of named functions: exponent, base and argument, with or without brackets."""

from __future__ import annotations

from abc import abstractmethod
from fractions import Fraction

from dynamo_lightning.rewards.maths.brackets import BracketParser
from dynamo_lightning.rewards.maths.construction import multiply, signed
from dynamo_lightning.rewards.maths.nodes import (
    Constant,
    Function,
    Interval,
    Negative,
    Node,
    Number,
    Power,
    Product,
    Quotient,
    Sequence,
    Symbol,
    UnreadableError,
)

_INVERSES = frozenset("arcsin arccos arctan arccot arcsec arccsc arcsinh arccosh arctanh".split())


class FunctionParser(BracketParser):
    """The functions of the grammar."""

    @abstractmethod
    def argument(self) -> Node:
        """A group, or one token."""

    def function(self, name: str) -> Node:
        """A named function: exponent, base, argument."""
        power: Node | None = None
        base: Node | None = None
        for _ in range(2):
            if self.at("op", "^") and power is None:
                self.advance()
                power = self.exponent()
            elif self.at("op", "_") and base is None:
                self.advance()
                base = self.argument() if name == "log" else None
                if base is None:
                    raise UnreadableError("a subscript of a function")
        if isinstance(power, Negative) and power.operand == Number(Fraction(1)) and "arc" + name in _INVERSES:
            name, power = "arc" + name, None
        arguments = self.function_arguments(name)
        if name == "lg":
            name, base = "log", Number(Fraction(10))
        node: Node
        if name == "exp":
            node = Power(Constant("e"), arguments[0])
        elif name == "log" and base is not None:
            node = Function("ln", arguments) if base == Constant("e") else Function("log_base", (base, *arguments))
        elif name == "sqrt":
            node = Power(arguments[0], Quotient(Number(Fraction(1)), Number(Fraction(2))))
        elif name == "cbrt":
            node = Function("root", (Number(Fraction(3)), *arguments))
        else:
            node = Function(name, arguments)
        return node if power is None else Power(node, power)

    def function_arguments(self, name: str) -> tuple[Node, ...]:
        """In brackets, or the product that follows up to the next function or bracket."""
        with self.deeper():
            arguments: tuple[Node, ...]
            if self.at("open"):
                opening = self.token.text
                inner = self.atom() if opening != "{" else self.group()
                if isinstance(inner, Sequence) and inner.kind in ("tuple", "set") and inner.items:
                    arguments = inner.items
                elif isinstance(inner, Interval):
                    arguments = (inner.left, inner.right)
                else:
                    arguments = (inner,)
            elif name == "det":
                arguments = (self.atom(),)
            else:
                sign = self.advance().text if self.at("op", "-") or self.at("op", "+") else "+"
                node = self.power()
                while self.token.kind in ("number", "symbol", "const") or (
                    self.at("command") and self.token.text != "binom"
                ):
                    if self.at("number"):
                        raise UnreadableError("two numbers side by side")
                    node = multiply(node, self.power())
                if (
                    self.at("op", "/")
                    and self.tokens[self.position + 1].kind in ("number", "symbol")
                    and isinstance(node, Constant | Symbol | Number | Product)
                ):
                    self.advance()
                    node = Quotient(node, self.power())
                arguments = (signed(sign, node),)
            return arguments
