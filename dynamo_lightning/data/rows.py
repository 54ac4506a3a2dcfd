"""Read the rows of a data set: local JSON, CSV and Parquet files, or the Hugging Face hub.

JSON and CSV are read as they are written, not through `datasets`: its type inference turns a column of dates into
timestamps and, where strings and numbers are mixed, the answer "1.50" into 1.5. It also spares a copy on disk.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dynamo_lightning.embedded import local_path
from dynamo_lightning.errors import MissingFileError, UserError

LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

Row = dict[str, Any]


def read_rows(path: str, subset: str | None, split: str, option: str) -> Iterator[Row]:
    """Yield all rows of a data set, one at a time.

    Args:
        path: A local file, a name such as `embedded:arithmetic/train.jsonl`, or a hub id.
        subset: Configuration of a hub data set.
        split: Split of a hub data set, which may be a slice such as `train[:1000]`.
        option: Where these settings stand in the config, for messages.

    Raises:
        MissingFileError: If there is no such file or hub data set.
        UserError: If it cannot be read or is empty.
    """
    try:
        file = Path(local_path(path)).expanduser()
    except FileNotFoundError as error:
        raise MissingFileError(f"{option}.path: {error}") from error
    is_local = file.suffix in LOCAL_SUFFIXES or path.startswith((".", "/", "~", "embedded:"))
    if is_local and not file.exists():
        raise MissingFileError(f"{option}.path: there is no file {str(file)!r} (in {str(Path.cwd())!r})")
    if file.is_file() and file.suffix not in LOCAL_SUFFIXES:
        raise UserError(f"{option}.path: {path!r} is none of {', '.join(LOCAL_SUFFIXES)}")
    if is_local and not file.is_dir() and (subset is not None or split != "train"):
        raise UserError(
            f"{option}.subset={subset!r}, {option}.split={split!r}: the file {path!r} has none, leave them at null and "
            f"'train' ({option}.max_prompts takes the first rows only)"
        )
    rows = _read_file(file) if file.suffix in (".json", ".jsonl", ".csv") else None
    rows = rows if rows is not None else _read_datasets(path if not is_local else str(file), subset, split)
    is_empty = True
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except FileNotFoundError as error:
            raise MissingFileError(f"{option}.path: cannot find {path!r}: {_first_line(error)}") from error
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{option}.path: cannot read {path!r}: {_first_line(error)}") from error
        is_empty = False
        yield row
    if is_empty:
        raise UserError(f"{option}.path: {path!r} has no rows")


def get_column(row: Row, column: str) -> Any:
    """Return the value of a column, nested ones by dots (`reward_model.ground_truth`); None if the row lacks it."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def without_column(row: Row, column: str) -> Row:
    """Return the row without one column, which may be nested."""
    head, _, rest = column.partition(".")
    if column in row or not rest:
        return {key: value for key, value in row.items() if key != column}
    return {key: without_column(value, rest) if key == head else value for key, value in row.items()}


def column_names(row: Row) -> list[str]:
    """Return the names of all columns, nested ones with dots."""
    names = []
    for key, value in row.items():
        names += [f"{key}.{name}" for name in column_names(value)] if isinstance(value, dict) else [key]
    return names


def _read_file(file: Path) -> Iterator[Row]:
    """Yield the rows of a JSON or CSV file."""
    yield from _read_csv(file) if file.suffix == ".csv" else _read_json(file)


def _read_json(file: Path) -> Iterator[Row]:
    """Yield the rows of a file with one object per line, or with one list of objects."""
    with file.open("rb") as lines:
        is_list = lines.readline().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        lines.seek(0)
        rows: Iterable[Any] = json.loads(_decode(lines.read())) if is_list else (row for row in lines if row.strip())
        for number, row in enumerate(rows):
            try:
                parsed = row if is_list else json.loads(_decode(row))
            except ValueError as error:
                raise UserError(f"row {number} (counting from 0): {error}") from error
            if not isinstance(parsed, dict):
                raise UserError(f"row {number} (counting from 0) is a {type(parsed).__name__}, not an object")
            yield parsed


def _read_csv(file: Path) -> Iterator[Row]:
    """Yield the rows of a file with a header; all values stay text."""
    for number, row in enumerate(csv.DictReader(io.StringIO(_decode(file.read_bytes()), newline=""))):
        if None in row:
            raise UserError(f"row {number} (counting from 0) has more cells than the header")
        yield row


def _decode(content: bytes) -> str:
    """Return text without a byte order mark; ValueError with the line if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        place = f"line {line} (counting from 0) " if b"\n" in content.rstrip() else ""
        raise UserError(f"{place}is not UTF-8, byte 0x{content[error.start]:02x}: convert the file") from None


def _read_datasets(path: str, subset: str | None, split: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file, a folder or a hub data set."""
    import datasets  # a second to import, and only needed here

    try:
        if path.endswith(".parquet"):
            dataset = datasets.load_dataset("parquet", data_files=path, split=split)
        else:
            dataset = datasets.load_dataset(path, subset, split=split)
    except FileNotFoundError:
        raise
    except (datasets.exceptions.DatasetsError, StopIteration) as error:
        raise UserError(_first_line(error.__cause__ or error)) from error
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _first_line(error: BaseException) -> str:
    """Return an error's message in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
