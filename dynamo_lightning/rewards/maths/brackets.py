"""Parser of what stands in brackets: groups, tuples, intervals, sets, absolute values, matrices."""

from __future__ import annotations

from dynamo_lightning.rewards.maths.cursor import Cursor
from dynamo_lightning.rewards.maths.nodes import (
    Function,
    Interval,
    Matrix,
    Node,
    Relation,
    Sequence,
    UnreadableError,
)

_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "<": ">", "floor": "floor", "ceil": "ceil", "|": "|"}
_MATRICES = frozenset(("pmatrix", "bmatrix", "matrix", "smallmatrix", "array", "vmatrix", "Bmatrix", "psmallmatrix"))


class BracketParser(Cursor):
    """The brackets of the grammar."""

    def group(self) -> Node:
        """`{…}`."""
        self.expect("open", "{")
        bars, self.bars = self.bars, 0
        node = self.items()
        self.bars = bars
        self.expect("close", "}")
        return Sequence("set", node.items) if isinstance(node, Sequence) and node.kind == "list" else node

    def bracket(self, opening: str) -> Node:
        """Something in brackets: a group, a tuple, an interval, a set, or a rounded value."""
        if opening == "{":
            self.position -= 1
            return self.group()
        if opening == "|":
            return self.absolute_value("close")
        bars, self.bars = self.bars, 0
        if opening == "\\{" and self.at("close", "\\}"):
            self.advance()
            return Sequence("set", ())
        in_set, self.in_set = self.in_set, opening == "\\{"
        node = self.items()
        self.in_set = in_set
        if opening == "\\{" and (self.at("bar") or self.at("op", ":")):  # {x | condition}
            self.advance()
            node = self.items()
            if isinstance(node, Sequence):
                raise UnreadableError("several conditions")
        self.bars = bars
        if not self.at("close"):
            raise UnreadableError("a bracket without an end")
        closing = self.advance().text
        items = node.items if isinstance(node, Sequence) and node.kind == "list" else (node,)
        if opening in "([" and closing in ")]" and len(items) == 2 and (opening, closing) != ("(", ")"):
            return Interval(items[0], items[1], opening == "[", closing == "]")
        if closing != _CLOSING[opening]:
            raise UnreadableError("brackets that do not match")
        if opening in ("floor", "ceil"):
            return Function(opening, (node,))
        if opening == "\\{":
            return node if isinstance(node, Relation) else Sequence("set", items)
        return Sequence("tuple", items) if len(items) > 1 else node

    def absolute_value(self, closing: str) -> Node:
        """Something between bars."""
        self.bars += 1
        node = self.sum()
        self.bars -= 1
        self.expect(closing, "|")
        return Function("abs", (node,))

    def matrix(self, begin: str) -> Node:
        """An environment of rows."""
        name = begin[begin.index("{") + 1 : begin.index("}")].rstrip("*")
        if name not in _MATRICES:
            raise UnreadableError(f"environment {name}")
        rows, row = [], [self.item()]
        while not self.at("end", f"\\end{{{name}}}"):
            if self.at("op", "&"):
                self.advance()
                row.append(self.item())
            elif self.at("row"):
                self.advance()
                rows.append(tuple(row))
                if self.at("end"):
                    row = []
                    break
                row = [self.item()]
            else:
                raise UnreadableError("a matrix without an end")
        self.expect("end", f"\\end{{{name}}}")
        if row:
            rows.append(tuple(row))
        if len({len(cells) for cells in rows}) != 1:
            raise UnreadableError("rows of different lengths")
        return Function("det", (Matrix(tuple(rows)),)) if name == "vmatrix" else Matrix(tuple(rows))
