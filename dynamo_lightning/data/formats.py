"""JSON lines, JSON, CSV and TSV as they are written, plain or compressed, with the line of every row.

Not through `datasets`, whose type inference turns dates into timestamps, 12345678901234567890123 into a rounded float,
and, where strings and numbers are mixed, the answer "1.50" into 1.5.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dynamo_lightning.errors import UserError

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_LARGEST_FIELD = 2**31 - 1  # characters of a CSV cell; the module's own limit is 131,072
_SPACE = re.compile(r"[ \t\r\n]*")

NumberedRow = tuple[int, dict[str, Any]]
"""A row and the line on which it begins, counting from 1."""


def text_suffix(name: str) -> str | None:
    """The suffix of a file that is read here, such as `.jsonl` of `a.jsonl.gz`; none of any other file."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in TEXT_SUFFIXES else None


def read_text_file(file: Path, name: str, prompt_column: str) -> Iterator[NumberedRow]:
    """Yield the rows of a file.

    Args:
        file: The file; the cache names downloaded ones by their hash.
        name: Its name, by whose suffixes the format is known.
        prompt_column: A JSON object that has this column is a row; one without it may wrap a list of rows.

    Raises:
        UserError: Naming the line, if a row cannot be read.
        OSError: If the file cannot be read.
    """
    suffix = text_suffix(name)
    opened: Any = gzip.open(file, "rb") if name.lower().endswith(".gz") else file.open("rb")
    with opened as content:
        try:
            if suffix in (".csv", ".tsv"):
                yield from _read_table(content, "\t" if suffix == ".tsv" else ",")
            else:
                yield from _read_json(content, prompt_column.split(".")[0], prompt_column)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"the compressed file is damaged: {error}") from None
        except RecursionError:
            raise UserError("JSON is nested too deeply") from None


def _read_json(content: IO[bytes], *columns: str) -> Iterator[NumberedRow]:
    """Yield the rows of JSON lines, of one list, of an object that wraps one list, or of objects over several lines."""
    first = b""
    for first in content:  # the first line that is not blank
        if first.removeprefix(codecs.BOM_UTF8).strip():
            break
    content.seek(0)
    head = first.removeprefix(codecs.BOM_UTF8).strip()
    try:
        row = json.loads(head) if head.startswith(b"{") else None
    except ValueError:
        row = None
    if isinstance(row, dict) and not (_wrapped_lists(row) and not any(column in row for column in columns)):
        yield from _read_lines(content)
    elif head.startswith((b"[", b"{")) and (row is not None or not head.endswith(b"}")):
        yield from _read_values(_decode(content.read()), columns)
    else:
        yield from _read_lines(content)


def _read_lines(content: IO[bytes]) -> Iterator[NumberedRow]:
    for number, line in enumerate(content, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(_decode(line, number))
        except json.JSONDecodeError as error:
            raise UserError(f"line {number}: {error.msg} (column {error.colno})") from None
        except ValueError as error:
            raise UserError(str(error) if isinstance(error, UserError) else f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"line {number} is a {type(row).__name__}, not an object")
        yield number, row


def _read_values(text: str, columns: tuple[str, ...]) -> Iterator[NumberedRow]:
    """Yield the rows of JSON values over any number of lines."""
    lines = _LineCounter(text)
    decoder = json.JSONDecoder()
    position = _SPACE.match(text, 0).end()  # type: ignore[union-attr]  # matches nothing, too
    while position < len(text):
        if text[position] == "[":
            position = yield from _list_rows(text, position, lines, decoder)
        else:
            value, end = _decode_value(decoder, text, position)
            wrapped = _wrapped_lists(value) if isinstance(value, dict) else []
            if not isinstance(value, dict):
                raise UserError(f"line {lines.line(position)} is a {type(value).__name__}, not an object")
            if not wrapped or any(column in value for column in columns):
                yield lines.line(position), value
            elif len(wrapped) > 1:
                raise UserError(f"its object has several lists of rows, {', '.join(wrapped)}: keep one in the file")
            else:
                start = _member_position(decoder, text, position, wrapped[0])
                yield from _list_rows(text, start, lines, decoder)
            position = end
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]


def _list_rows(text: str, position: int, lines: _LineCounter, decoder: json.JSONDecoder) -> Any:
    """Yield the objects of the list that begins at `position`; return where it ends."""
    position = _SPACE.match(text, position + 1).end()  # type: ignore[union-attr]
    while text[position : position + 1] != "]":
        value, end = _decode_value(decoder, text, position)
        if not isinstance(value, dict):
            raise UserError(f"line {lines.line(position)}: a row is a {type(value).__name__}, not an object")
        yield lines.line(position), value
        position = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        mark = text[position : position + 1]
        if mark == ",":
            position = _SPACE.match(text, position + 1).end()  # type: ignore[union-attr]
        elif mark != "]":
            raise UserError(f"line {lines.line(position)}: expected ',' or ']' after a row")
    return position + 1


def _member_position(decoder: json.JSONDecoder, text: str, position: int, wanted: str) -> int:
    """Where the value of an object's member begins; the object is known to be readable."""
    position = _SPACE.match(text, position + 1).end()  # type: ignore[union-attr]
    while True:
        key, position = decoder.raw_decode(text, position)
        position = text.index(":", position) + 1
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        if key == wanted:
            return position
        _, position = decoder.raw_decode(text, position)
        position = _SPACE.match(text, text.index(",", position) + 1).end()  # type: ignore[union-attr]


def _decode_value(decoder: json.JSONDecoder, text: str, position: int) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise UserError(f"line {error.lineno}: {error.msg} (column {error.colno})") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise UserError(f"line {text.count(chr(10), 0, position) + 1}: {error}") from None


def _wrapped_lists(value: dict[str, Any]) -> list[str]:
    """The members of an object that are lists of objects."""
    return [
        key
        for key, item in value.items()
        if isinstance(item, list) and item and all(isinstance(element, dict) for element in item)
    ]


def _read_table(content: IO[bytes], delimiter: str) -> Iterator[NumberedRow]:
    """Yield the rows of a table with a header; all values stay text."""
    csv.field_size_limit(_LARGEST_FIELD)
    reader = csv.reader(io.StringIO(_decode(content.read()), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"line {line}: {error}") from None
        if not cells:
            continue
        if header is None:
            header = cells
            repeated = sorted({name for name in header if header.count(name) > 1 and name})
            if repeated:
                raise UserError(f"line {line}: the header names {', '.join(map(repr, repeated))} more than once")
            continue
        if len(cells) > len(header):
            raise UserError(f"line {line} has more cells than the header, {len(cells)} and {len(header)}")
        values: list[str | None] = [*cells, *[None] * (len(header) - len(cells))]
        yield line, dict(zip(header, values, strict=True))


def _decode(content: bytes, line: int | None = None) -> str:
    """Return text without a byte order mark; UserError with the line if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = line if line is not None else content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {number} is not UTF-8, byte 0x{content[error.start]:02x}: convert the file to UTF-8"
        ) from None


class _LineCounter:
    """Lines of growing positions in a text, counting from 1."""

    def __init__(self, text: str) -> None:
        self._text, self._position, self._line = text, 0, 1

    def line(self, position: int) -> int:
        """The line of a position that is not before the last one asked for, or counted from the start."""
        if position < self._position:
            self._position, self._line = 0, 1
        self._line += self._text.count("\n", self._position, position)
        self._position = position
        return self._line
