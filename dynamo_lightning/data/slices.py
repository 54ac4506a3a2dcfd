"""Splits that are slices, such as `train[:-100]`, of rows that are read one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from dynamo_lightning.errors import UserError

T = TypeVar("T")

_SPLIT = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of a split; each end counts rows, or per cent of them, from the start or (negative) the end."""

    split: str
    start: str | None = None
    stop: str | None = None

    @property
    def is_whole(self) -> bool:
        """True if no row is left out."""
        return self.start is None and self.stop is None

    def take(self, rows: Callable[[], Iterable[T]]) -> Iterator[T]:
        """Yield the rows of the slice.

        Args:
            rows: Reads all rows from the first; called twice where the ends depend on their number.
        """
        if self.is_whole:
            yield from rows()
            return
        if all(end is None or end.isdigit() for end in (self.start, self.stop)):
            start, stop = (int(end) if end is not None else None for end in (self.start, self.stop))
        else:
            number = sum(1 for _ in rows())
            start, stop, _ = slice(_end(self.start, number), _end(self.stop, number)).indices(number)
        yield from islice(rows(), start, stop)


def _end(end: str | None, number: int) -> int | None:
    """The end of a slice in rows; per cent are rounded to the nearest row, as `datasets` does."""
    if end is None or not end.endswith("%"):
        return int(end) if end is not None else None
    return round(number * int(end[:-1]) / 100)


def parse_split(split: str, option: str) -> Slice:
    """Read a split such as `train`, `train[:1000]`, `train[-100:]` or `train[10%:]`.

    Raises:
        UserError: If it is none of these.
    """
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise UserError(f"{option}.split={split!r} is no split: give a name, or a slice such as train[:1000]")
    return Slice(*match.groups())
