"""Files and folders that are, whenever the process is killed, either the old ones or the new ones, whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Path under which a file or folder is written before it is renamed, in the same folder."""
    return path.with_name(f"{path.name}.partial")


def delete(path: Path) -> None:
    """Removes a file, a link or a folder with its contents; nothing happens if there is none."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(source: Path, target: Path) -> None:
    """Renames a finished file, folder or link over whatever bears the target's name.

    Files and links are exchanged in one step. A folder cannot replace anything in one step: the old one is moved aside
    first, so that it is still there, whole, if we are killed in between.
    """
    if _is_folder(target) or (_is_folder(source) and (target.exists() or target.is_symlink())):
        aside = target.with_name(f"{target.name}.old")
        delete(aside)
        target.rename(aside)
        source.rename(target)
        delete(aside)
    else:
        os.replace(source, target)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file, with its folder if there is none.

    Args:
        path: The file.
        content: Text is written as UTF-8, line ends as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    publish(partial, path)


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """A folder that bears its name when all of it is written; after an error there is none.

    Args:
        path: The folder.

    Yields:
        An empty folder to write into.
    """
    partial = partial_path(path)
    delete(partial)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        delete(partial)
        raise
    publish(partial, path)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
