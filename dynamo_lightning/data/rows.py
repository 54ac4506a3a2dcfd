"""The rows of a data set, wherever it is: local files, folders, patterns of file names, or the Hugging Face hub."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dynamo_lightning.data import hub
from dynamo_lightning.data.formats import read_text_file, text_suffix
from dynamo_lightning.data.slices import parse_split
from dynamo_lightning.errors import MissingFileError, UserError
from dynamo_lightning.policy.embedded import local_path

LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""All but Parquet also compressed, with `.gz` behind."""


class Place(NamedTuple):
    """Where a row is, for messages."""

    file: str
    number: int
    """Counting from 1."""
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.unit} {self.number} of {self.file!r}"


class Row(dict[str, Any]):
    """A row's columns by name, and the place that it was read from."""

    __slots__ = ("place",)

    def __init__(self, columns: dict[str, Any], place: Place) -> None:
        super().__init__(columns)
        self.place = place


class _FileError(UserError):
    """A file that cannot be read; the message begins with its name."""


def read_rows(path: str, subset: str | None, split: str, option: str, prompt_column: str = "prompt") -> Iterator[Row]:
    """Yield all rows of a data set, one at a time.

    Args:
        path: A local file, folder or pattern such as `data/*.jsonl`, a name such as `embedded:arithmetic/train.jsonl`,
            or a hub id.
        subset: Configuration of a hub data set.
        split: Split of a folder or hub data set; of anything, a slice such as `train[:1000]` or `train[:-100]`.
        option: Where these settings stand in the config, for messages.
        prompt_column: Tells rows from objects that wrap a list of rows in JSON.

    Raises:
        MissingFileError: If there is no such file or hub data set.
        UserError: If it cannot be read or is empty.
    """
    try:
        rows = _find_rows(path, subset, split, option, prompt_column)
        is_empty = True
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            is_empty = False
            yield row
    except MissingFileError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{option}.path: cannot find {path!r}: {hub.first_line(error)}") from error
    except PermissionError as error:
        raise UserError(
            f"{option}.path: cannot read {path!r}: no permission for {error.filename or 'a file'}; if that is a cache, "
            "set the environment variable HF_HOME to a folder that you may write to"
        ) from error
    except (OSError, ValueError) as error:
        message = hub.first_line(error)
        if isinstance(error, _FileError):
            raise UserError(f"{option}.path: cannot read {message}") from error
        named = isinstance(error, UserError) and message.startswith(option)
        raise UserError(message if named else f"{option}.path: cannot read {path!r}: {message}") from error
    if is_empty:
        raise UserError(f"{option}.path: {path!r} has no rows" + f" in {option}.split={split!r}" * ("[" in split))


def _find_rows(path: str, subset: str | None, split: str, option: str, prompt_column: str) -> Iterator[Row]:
    """Yield the rows of whatever the path stands for."""
    try:
        place = Path(local_path(path)).expanduser()
    except FileNotFoundError as error:
        raise MissingFileError(f"{option}.path: {error}") from error
    wanted = parse_split(split, option)
    files = _local_files(path, place, option)
    if files is not None:
        if subset is not None or wanted.split != "train":
            raise UserError(
                f"{option}.subset={subset!r}, {option}.split={split!r}: the file {path!r} has none, leave them at null "
                "and 'train', or a slice of it such as train[:1000]"
            )
        return wanted.take(lambda: _read_files([(str(file), file) for file in files], prompt_column))
    if place.is_dir() and hub.is_saved_dataset(place):
        return wanted.take(lambda: _number(hub.read_saved_dataset(place, wanted.split, option), str(place)))
    name = str(place) if place.is_dir() else path
    texts = hub.find_text_files(name, subset, wanted.split)
    if texts is not None:
        return wanted.take(lambda: _read_files(texts, prompt_column))
    return _number(hub.read_datasets(name, subset, split), name)


def _local_files(path: str, place: Path, option: str) -> list[Path] | None:
    """The files that a path names; none if it is a folder, or not local.

    Raises:
        MissingFileError: If it is written like a path, but there is nothing.
        UserError: If a file has none of the known formats.
    """
    if place.is_dir():
        return None
    files = [place]
    if not place.exists() and any(mark in path for mark in "*?["):
        files = [Path(name) for name in sorted(glob.glob(str(place), recursive=True)) if Path(name).is_file()]
        if not files:
            raise MissingFileError(f"{option}.path: no file matches {path!r} (in {str(Path.cwd())!r})")
    elif not place.exists():
        known = text_suffix(place.name) is not None or place.suffix == ".parquet"
        if known or path.startswith((".", "/", "~", "embedded:")) or path.endswith("/") or path.count("/") > 1:
            raise MissingFileError(f"{option}.path: there is no file {str(place)!r} (in {str(Path.cwd())!r})")
        return None
    for file in files:
        if text_suffix(file.name) is None and file.suffix != ".parquet":
            raise UserError(
                f"{option}.path: {str(file)!r} is none of {', '.join(LOCAL_SUFFIXES)} (compressed: .jsonl.gz and so on)"
            )
    return files


def _read_files(files: list[tuple[str, Path]], prompt_column: str) -> Iterator[Row]:
    """Yield the rows of files, one after the other; an error names the file."""
    for name, file in files:
        if text_suffix(name) is None:
            yield from _number(hub.read_datasets(str(file), None, "train"), name)
            continue
        try:
            for line, row in read_text_file(file, name, prompt_column):
                yield Row(row, Place(name, line))
        except UserError as error:
            raise _FileError(f"{name!r}, {error}") from None


def _number(rows: Iterator[dict[str, Any]], name: str) -> Iterator[Row]:
    """Rows of a format without lines, with their numbers."""
    for number, row in enumerate(rows, start=1):
        yield Row(row, Place(name, number, "row"))


def get_column(row: dict[str, Any], column: str) -> Any:
    """Return the value of a column, nested ones by dots (`reward_model.ground_truth`); None if the row lacks it."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def without_column(row: dict[str, Any], column: str) -> dict[str, Any]:
    """Return the row without one column, which may be nested."""
    head, _, rest = column.partition(".")
    if column in row or not rest:
        return {key: value for key, value in row.items() if key != column}
    return {
        key: without_column(value, rest) if key == head and isinstance(value, dict) else value
        for key, value in row.items()
    }


def column_names(row: dict[str, Any]) -> list[str]:
    """Return the names of all columns, nested ones with dots."""
    names = []
    for key, value in row.items():
        names += [f"{key}.{name}" for name in column_names(value)] if isinstance(value, dict) else [key]
    return names
