"""Position in the tokens of an answer, and what every part of the parser needs of the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from dynamo_lightning.rewards.maths.nodes import Node, UnreadableError
from dynamo_lightning.rewards.maths.tokens import Token

MAX_DEPTH = 25


class Cursor(ABC):
    """The tokens, the position in them, and how deep in brackets it is."""

    def __init__(self, tokens: list[Token], text: str) -> None:
        self.tokens, self.text = tokens, text
        self.position = self.depth = self.bars = 0
        self.in_set = False  # where a colon is "such that"

    @property
    def token(self) -> Token:
        """The current token."""
        return self.tokens[self.position]

    def advance(self) -> Token:
        """The current token; the position moves on.

        Raises:
            UnreadableError: At the end of the text.
        """
        token = self.tokens[self.position]
        if self.position == len(self.tokens) - 1:
            raise UnreadableError("the text ends too early")
        self.position += 1
        return token

    def at(self, kind: str, text: str | None = None) -> bool:
        """The current token is of this kind, and has this text if one is given."""
        token = self.tokens[self.position]
        return token.kind == kind and (text is None or token.text == text)

    def expect(self, kind: str, text: str | None = None) -> Token:
        """The current token, consumed; UnreadableError if it is another one."""
        if not self.at(kind, text):
            raise UnreadableError(f"expected {text or kind}, got {self.token.text!r}")
        return self.advance()

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """One level of nesting.

        Raises:
            UnreadableError: If there are too many.
        """
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("too deep")
        yield
        self.depth -= 1

    @abstractmethod
    def items(self) -> Node:
        """One item, or a list of several."""

    @abstractmethod
    def item(self) -> Node:
        """One item."""

    @abstractmethod
    def sum(self) -> Node:
        """A sum."""

    @abstractmethod
    def product(self) -> Node:
        """A product."""

    @abstractmethod
    def power(self) -> Node:
        """A factor."""

    @abstractmethod
    def exponent(self) -> Node | None:
        """An exponent; None for primes."""

    @abstractmethod
    def atom(self) -> Node:
        """A number, a variable, a function with its argument, or something in brackets."""
