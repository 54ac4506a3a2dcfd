"""Folders and data sets of the Hugging Face hub: where `datasets` finds JSON or CSV, our own reader reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_lightning.data.formats import text_suffix
from dynamo_lightning.errors import UserError

if TYPE_CHECKING:
    import datasets

SAVED_FILES = ("state.json", "dataset_dict.json")
"""Files that `save_to_disk` writes beside the data, for a data set and for several splits."""


def is_saved_dataset(folder: Path) -> bool:
    """True if a folder was written by `datasets`' `save_to_disk`."""
    return any((folder / name).is_file() for name in SAVED_FILES)


def read_saved_dataset(folder: Path, split: str, option: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a folder that `save_to_disk` wrote."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"{option}.split={split!r}: {str(folder)!r} has the splits {', '.join(map(str, saved))}")
        saved = saved[split]
    elif split != "train":
        raise UserError(f"{option}.split={split!r}: {str(folder)!r} has one split only, called 'train'")
    yield from iterate(saved)


def find_text_files(path: str, subset: str | None, split: str) -> list[tuple[str, Path]] | None:
    """The JSON or CSV files of a split of a folder or hub data set, as names and local (downloaded) files.

    `datasets` decides which files those are: by the configurations of the data set's card, by their names and folders.

    Returns:
        None if the data set has other files: `datasets.load_dataset` reads them.

    Raises:
        FileNotFoundError: If there is no such data set.
        OSError: If the hub cannot be reached.
        UserError: If there are such files, but not of this split, or the data set cannot be understood.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(path, subset)
    except FileNotFoundError:
        raise
    except datasets.exceptions.DatasetsError as error:
        raise UserError(first_line(error.__cause__ or error)) from error
    files = getattr(builder.config, "data_files", None)
    if not files or not all(text_suffix(str(name)) for names in files.values() for name in names):
        return None
    if split not in files:
        raise UserError(f"split {split!r} is none of {', '.join(map(str, files))}")
    names = [str(name) for name in files[split]]
    return list(zip(names, download(names), strict=True))


def download(names: list[str]) -> list[Path]:
    """Local copies of the files of a hub data set; local files stay where they are."""
    import datasets

    return [Path(file) for file in datasets.DownloadManager().download(names)]


def read_datasets(path: str, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, or of a folder or hub data set in a format that only `datasets` reads."""
    import datasets  # a second to import, and only needed here

    try:
        if path.endswith(".parquet"):
            dataset = datasets.load_dataset("parquet", data_files=path, split=split)
        else:
            dataset = datasets.load_dataset(path, subset, split=split)
    except FileNotFoundError:
        raise
    except (datasets.exceptions.DatasetsError, StopIteration) as error:
        raise UserError(first_line(error.__cause__ or error)) from error
    yield from iterate(dataset)


def iterate(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set of `datasets`, a thousand at a time from disk."""
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def first_line(error: BaseException) -> str:
    """An error's message in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
