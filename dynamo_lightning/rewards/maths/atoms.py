"""Parser of the smallest parts: numbers, variables, words, and LaTeX commands with their arguments."""

from __future__ import annotations

import re
from fractions import Fraction

from dynamo_lightning.rewards.maths import units
from dynamo_lightning.rewards.maths.construction import repeating_decimal
from dynamo_lightning.rewards.maths.functions import FunctionParser
from dynamo_lightning.rewards.maths.nodes import (
    Based,
    Constant,
    Function,
    Node,
    Number,
    Power,
    Product,
    Quantity,
    Quotient,
    Sequence,
    Symbol,
    Text,
    UnreadableError,
)
from dynamo_lightning.rewards.maths.tokens import Token

_ACCENTS = frozenset(
    "hat bar vec tilde dot ddot overline underline widehat widetilde overrightarrow mathbf mathcal mathbb mathit "
    "boldsymbol bm mathfrak mathscr pmb textbf".split()
)
_FONTS = frozenset(("mathbf", "boldsymbol", "bm", "textbf", "mathit", "pmb", "underline"))


class AtomParser(FunctionParser):
    """The atoms of the grammar."""

    def atom(self) -> Node:
        """A number, a variable, a function with its argument, or something in brackets."""
        token = self.advance()
        if token.kind == "number":
            return self.number(token)
        if token.kind == "repeating":
            return repeating_decimal(token.text)
        if token.kind == "const":
            if token.text == "empty":
                return Sequence("set", ())
            if self.at("op", "_") or (token.text in "ei" and self.at("op", "'")):
                return self.symbol(token.text)
            return Constant(token.text)
        if token.kind == "symbol":
            return self.symbol(token.text)
        if token.kind == "text":
            return self.words(token)
        if token.kind == "function":
            return self.function(token.text)
        if token.kind == "command":
            return self.command(token.text)
        if token.kind == "open":
            return self.bracket(token.text)
        if token.kind == "bar" and token.text == "|":
            return self.absolute_value("bar")
        if token.kind == "begin":
            return self.matrix(token.text)
        raise UnreadableError(f"{token.text!r} begins nothing")

    def argument(self) -> Node:
        r"""The argument of `\frac` or `\sqrt`: a group, or one token; `\frac12` takes one digit."""
        if self.at("open", "{"):
            return self.group()
        if self.at("number") and len(self.token.text) > 1 and self.token.text.isdigit():
            token = self.token
            self.tokens[self.position : self.position + 1] = [
                Token("number", token.text[0], token.spaced, token.start),
                Token("number", token.text[1:], False, token.start + 1),
            ]
        return self.atom()

    def subscript(self) -> str:
        """`_…` as part of a name, without braces and spaces."""
        self.expect("op", "_")
        if not self.at("open", "{"):
            return "_" + self.advance().text.strip()
        parts: list[str] = []
        depth = 0
        while not self.at("end"):
            token = self.advance()
            depth += (token.text == "{") - (token.text == "}")
            if depth == 0:
                return "_" + "".join(parts)
            if token.text not in "{}":
                parts.append(token.text.strip())
        raise UnreadableError("a subscript without an end")

    def number(self, token: Token) -> Node:
        """A numeral, with its base if a subscript gives one."""
        if self.at("op", "_"):
            base = re.sub(r"[^0-9a-z]", "", self.subscript().lower())
            base = {"two": "2", "three": "3", "five": "5", "eight": "8", "ten": "10", "sixteen": "16"}.get(base, base)
            if not base.isdigit() or not 2 <= int(base[:4]) <= 36 or not token.text.isdigit():
                raise UnreadableError("no base")
            return Based(token.text.lstrip("0") or "0", int(base))
        whole, point, decimals = token.text.partition(".")
        digits = len((whole + decimals).lstrip("0")) if point and decimals else 0
        return Number(Fraction(int((whole + decimals) or "0"), 10 ** len(decimals)), max(digits, 1) if decimals else 0)

    def symbol(self, name: str) -> Node:
        """A variable with its subscript."""
        if self.at("op", "_"):
            name += self.subscript()
        return Symbol(name)

    def words(self, first: Token) -> Node:
        """Words that are a whole item; a currency sign before a value."""
        if first.text in "$€£¥₹":
            value = self.product() if not self.at("text") else self.atom()
            return Quantity(value, units.read_unit(first.text) or "")
        parts = [first.text]
        while self.at("text") or self.at("symbol") or self.at("const") or self.at("number"):
            token = self.advance()
            parts.append(" " * token.spaced + token.text)
        return Text(" ".join("".join(parts).split()))

    def command(self, name: str) -> Node:
        """A LaTeX command."""
        if name == "frac":
            numerator = self.argument()
            return Quotient(numerator, self.argument())
        if name == "sqrt":
            degree: Node = Number(Fraction(2))
            if self.at("open", "["):
                self.advance()
                degree = self.sum()
                self.expect("close", "]")
            if self.at("number") or self.at("repeating"):
                radicand: Node = self.atom()
            else:
                radicand = self.group() if self.at("open", "{") else self.atom()
            if degree == Number(Fraction(2)):
                return Power(radicand, Quotient(Number(Fraction(1)), degree))
            return Function("root", (degree, radicand))
        if name == "binom":
            if self.at("open", "("):
                pair = self.atom()
                if isinstance(pair, Sequence) and len(pair.items) == 2:
                    return Function("binom", pair.items)
                raise UnreadableError("a binomial coefficient of two")
            upper = self.argument()
            return Function("binom", (upper, self.argument()))
        if name in ("boxed", "fbox", "displaylines", "mathop", "color", "ensuremath"):
            return self.group()
        if name in _ACCENTS:
            return self.accented(name)
        if name in ("sum", "prod", "int", "iint", "oint", "lim", "limsup", "liminf", "ldots", "cdots", "dots", "begin"):
            raise UnreadableError(f"\\{name}")
        if name in ("pmod",):
            raise UnreadableError("a congruence")
        return self.symbol(name)

    def accented(self, accent: str) -> Node:
        """A letter in another font or under an accent."""
        start = self.token.start
        inner = self.group() if self.at("open", "{") else self.atom()
        if accent in ("mathbf", "boldsymbol", "bm", "textbf", "mathit", "pmb", "underline") and not isinstance(
            inner, Constant
        ):
            return inner
        if isinstance(inner, Symbol | Constant | Product | Text | Number):
            written = re.sub(r"[{}\s]", "", self.text[start : self.token.start])
            return self.symbol(f"{accent}:{written}")
        return inner
