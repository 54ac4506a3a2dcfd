r"""Recursive-descent parser of answers, from LaTeX or plain text to `nodes`.

Grammar, from loose to tight: items separated by commas or "or"; relations; unions of sets; sums; products, with or
without a sign; powers; numbers, variables, functions, brackets. Two numerals side by side are not a product: `36 18` is
unreadable, and `1 1/2` or `1\frac{1}{2}` a mixed number.
"""

from __future__ import annotations

from dynamo_lightning.rewards.maths import units
from dynamo_lightning.rewards.maths.atoms import AtomParser
from dynamo_lightning.rewards.maths.construction import multiply, primed, signed, with_unit
from dynamo_lightning.rewards.maths.cursor import MAX_DEPTH
from dynamo_lightning.rewards.maths.nodes import (
    Function,
    Mixed,
    Negative,
    Node,
    Number,
    Power,
    Product,
    Quantity,
    Quotient,
    Relation,
    Sequence,
    SetOperation,
    Sum,
    Symbol,
    UnreadableError,
)
from dynamo_lightning.rewards.maths.tokens import tokenize


def parse(text: str) -> Node:
    """Return the tree of a cleaned answer.

    Raises:
        UnreadableError: If it is not in the grammar.
    """
    parser = _Parser(tokenize(text), text)
    node = parser.items()
    if parser.token.kind != "end" or parser.token.text:
        raise UnreadableError(f"{parser.token.text!r} is left over")
    return node


class _Parser(AtomParser):
    """The levels of the grammar from lists down to powers."""

    def items(self) -> Node:
        """One item, or a list of several."""
        with self.deeper():
            items = [self.item()]
            while self.at("sep"):
                self.advance()
                while self.at("sep"):  # ", and"
                    self.advance()
                if self.at("end") or self.at("close"):
                    raise UnreadableError("nothing after a comma")
                items.append(self.item())
        return items[0] if len(items) == 1 else Sequence("list", tuple(items))

    def item(self) -> Node:
        """A relation, with a unit if words follow."""
        node = self.relation()
        if self.at("text") or (self.at("op", "/") and self.tokens[self.position + 1].kind == "text"):
            node = with_unit(node, units.read_unit(self.unit_text()))
        return node

    def unit_text(self) -> str:
        """The rest of an item as text: words, powers and slashes."""
        parts = []
        while not (self.at("end") or self.at("sep") or self.at("close") or self.at("row") or self.at("op", "&")):
            token = self.advance()
            if token.kind not in ("text", "op", "number", "symbol", "const", "open", "postfix"):
                raise UnreadableError("no unit")
            parts.append((" " if token.spaced or token.kind == "text" else "") + token.text)
            if token.text == "{":
                parts[-1] = "".join(self.advance().text for _ in range(2 if self.at("op", "-") else 1))
                self.expect("close", "}")
        return "".join(parts)

    def relation(self) -> Node:
        """Sides of a chain of relations."""
        operators: list[str] = []
        label = self.label()
        if self.at("rel", "~") or (self.at("rel", "=") and label is None):  # "= 5" goes on from the text before the box
            sides: list[Node] = [Symbol("?")]
        else:
            sides = [label if label is not None else self.sets()]
        while self.at("rel"):
            operators.append(self.advance().text)
            sides.append(self.sets())
        return Relation(tuple(operators), tuple(sides)) if operators else sides[0]

    def label(self) -> Node | None:
        """The left side of `f(x) = …` or of words followed by an equals sign, None if it is something else."""
        start = self.position
        if self.at("text") and self.tokens[start + 1].kind == "rel":
            return Symbol(self.advance().text.strip())
        if not self.at("symbol"):
            return None
        name = self.advance().text
        while self.at("op", "_") or self.at("op", "'"):
            name += self.subscript() if self.at("op", "_") else self.advance().text
        if self.at("open", "("):
            depth = 0
            while not self.at("end"):
                token = self.advance()
                depth += (token.text == "(") - (token.text == ")")
                if depth == 0:
                    break
                if token.kind == "rel":
                    break
            argument = self.text[self.tokens[start].start : self.token.start].partition("(")[2]
            if depth == 0 and self.at("rel", "="):
                return Symbol(f"{name}({argument.replace(' ', '')}", call=True)
        self.position = start
        return None

    def sets(self) -> Node:
        """Sums joined by set operations."""
        node = self.sum()
        while self.at("op") and self.token.text in ("cup", "cap", "setminus"):
            operator = self.advance().text
            node = SetOperation(operator, node, self.sum())  # type: ignore[arg-type]
        return node

    def sum(self) -> Node:
        """Terms with signs."""
        terms = [self.product()]
        while self.at("op") and self.token.text in ("+", "-", "+-", "-+"):
            sign = self.advance().text
            term = self.product()
            terms.append(signed(sign, term))
        node = terms[0] if len(terms) == 1 else Sum(tuple(terms))
        while self.at("op", "mod"):
            self.advance()
            node = Function("mod", (node, self.product()))
        if len(terms) == 2 and isinstance(terms[1], Negative) and isinstance(terms[1].operand, Sequence):
            node = SetOperation("setminus", terms[0], terms[1].operand)
        if self.at("op", ":") and not self.in_set:
            parts = [node]
            while self.at("op", ":"):
                self.advance()
                parts.append(self.product())
            node = Sequence("ratio", tuple(parts))
        return node

    def product(self) -> Node:
        """Factors with `*`, `/`, or nothing between them."""
        if self.at("op") and self.token.text in ("+", "-", "+-", "-+"):
            sign = self.advance().text
            with self.deeper():
                return signed(sign, self.product())
        node = self.power()
        while True:
            if self.at("op", "*"):
                self.advance()
                node = multiply(node, self.signed_power())
            elif self.at("op", "/") and self.tokens[self.position + 1].kind != "text":  # else a unit
                self.advance()
                node = Quotient(node, self.signed_power())
            elif self.starts_factor():
                node = self.juxtapose(node)
            else:
                return node

    def signed_power(self) -> Node:
        """A factor that may carry a sign, as in `2 * -3`."""
        if self.at("op", "-"):
            self.advance()
            return Negative(self.power())
        return self.power()

    def starts_factor(self) -> bool:
        """A factor begins here, which a product without a sign goes on with."""
        token = self.token
        if token.kind == "open":
            return True
        if token.kind == "bar":
            return (
                token.text == "|"
                and self.bars == 0
                and any(later.kind == "bar" for later in self.tokens[self.position + 1 :])
            )
        return token.kind in ("number", "symbol", "const", "function", "command", "begin")

    def juxtapose(self, node: Node) -> Node:
        """A product without a sign, or a mixed number.

        Raises:
            UnreadableError: If a numeral follows a numeral or a letter.
        """
        if isinstance(node, Number) and node.value.denominator == 1 and not node.digits:
            mixed = self.mixed(node)
            if mixed is not None:
                return self.postfix(mixed)
        if self.at("number") or self.at("repeating"):
            previous = self.tokens[self.position - 1]
            raised = self.tokens[self.position + 1].text == "^" and previous.kind == "symbol"  # n2^n
            if (
                not raised and not (previous.kind == "close" and previous.text in (")", "]", "}"))
            ) or self.ends_in_numeral(node):
                raise UnreadableError("two numbers side by side")
        elif (
            self.at("command", "frac")
            and self.ends_in_numeral(node)
            and not self.tokens[self.position - 1].kind == "close"
        ):
            if self.tokens[self.position + 1].kind == "number":
                raise UnreadableError("two numbers side by side")
        return multiply(node, self.power())

    @staticmethod
    def ends_in_numeral(node: Node) -> bool:
        """The last factor is a plain numeral."""
        while isinstance(node, Product):
            node = node.factors[-1]
        return isinstance(node, Number)

    def mixed(self, whole: Number) -> Node | None:
        r"""`1 1/2` or `1\frac{1}{2}` from the fraction on; None if it is no proper fraction of numerals."""
        start = self.position
        if self.at("number") and self.tokens[start + 1].text == "/" and self.tokens[start + 2].kind == "number":
            part: Node = Quotient(self.atom(), (self.advance(), self.atom())[1])
        elif self.at("command", "frac"):
            part = self.atom()
        else:
            return None
        if isinstance(part, Quotient) and isinstance(part.numerator, Number) and isinstance(part.denominator, Number):
            numerator, denominator = part.numerator.value, part.denominator.value
            if (
                denominator
                and 0 < numerator < denominator
                and (numerator.denominator, denominator.denominator) == (1, 1)
            ):
                return Mixed(whole.value + numerator / denominator)
        self.position = start
        return None

    def power(self) -> Node:
        """A base with factorials, percent signs, degrees and exponents behind it."""
        return self.postfix(self.atom())

    def postfix(self, node: Node) -> Node:
        """`node` with what stands behind it."""
        for _ in range(MAX_DEPTH):
            if isinstance(node, Quantity) and (self.at("postfix") or self.at("op", "^")):
                raise UnreadableError("two units")
            if self.at("op", "!"):
                self.advance()
                if self.at("op", "!"):
                    self.advance()
                    node = Function("double_factorial", (node,))
                else:
                    node = Function("factorial", (node,))
            elif self.at("postfix", "%"):
                self.advance()
                node = Quantity(node, "%")
            elif self.at("postfix", "deg"):
                self.advance()
                node = Quantity(node, units.degree_unit(self.temperature_scale()))
            elif self.at("op", "^"):
                self.advance()
                if self.degree_sign():
                    node = Quantity(node, units.degree_unit(self.temperature_scale()))
                elif self.at("op", "*") or self.at("op", "'"):
                    node = primed(node, self.advance().text)
                else:
                    exponent = self.exponent()
                    node = primed(node, "'") if exponent is None else Power(node, exponent)
            elif self.at("op", "'"):
                node = primed(node, self.advance().text)
            else:
                return node
        raise UnreadableError("too many signs")

    def temperature_scale(self) -> str:
        """C or F behind a degree sign, or nothing."""
        if (self.at("symbol") or self.at("text")) and self.token.text.strip() in ("C", "F"):
            return self.advance().text.strip()
        return ""

    def degree_sign(self) -> bool:
        r"""`\circ` or `{\circ}`, consumed."""
        for length, texts in ((1, ["circ"]), (3, ["{", "circ", "}"])):
            if [token.text for token in self.tokens[self.position : self.position + length]] == texts:
                self.position += length
                return True
        return False

    def exponent(self) -> Node | None:
        """An exponent; None for primes."""
        if self.at("open", "{"):
            if self.tokens[self.position + 1].text == "'":
                while not self.at("close"):
                    self.advance()
                self.advance()
                return None
            return self.group()
        if self.at("op", "-") or self.at("op", "+"):
            return signed(self.advance().text, self.exponent_atom())
        return self.exponent_atom()

    def exponent_atom(self) -> Node:
        """An exponent without braces, with one of its own: powers associate to the right."""
        with self.deeper():
            node = self.atom()
            if self.at("op", "^"):
                self.advance()
                above = self.exponent()
                node = node if above is None else Power(node, above)
            return node
