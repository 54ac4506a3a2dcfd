"""Folders that `export` and `warm_start` write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dynamo_lightning.errors import UserError

RECORD = "export.json"


def check_empty(output_dir: str) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: If the folder exists and is not empty.
    """
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"output_dir {output_dir} already exists and is not an empty folder: name another one")


def already_exported(output_dir: str, ckpt_path: str, dtype: str | None) -> bool:
    """True if the folder was exported from this very checkpoint in this type of weights."""
    try:
        return json.loads(Path(output_dir, RECORD).read_text(encoding="utf-8")) == _origin(ckpt_path, dtype)
    except (OSError, ValueError):
        return False


def record_export(output_dir: str, ckpt_path: str, dtype: str | None) -> None:
    """Note in an exported folder what it was exported from."""
    Path(output_dir, RECORD).write_text(json.dumps(_origin(ckpt_path, dtype), indent=2) + "\n", encoding="utf-8")


def free_export_folder(run: str, checkpoint: str) -> str:
    """The folder to suggest for an export of a run's checkpoint, such that the command works."""
    number = 1
    while True:
        folder = os.path.join(run, "export" if number == 1 else f"export-{number}")
        if not os.path.exists(folder) or already_exported(folder, checkpoint, None):
            return folder
        number += 1


def _origin(ckpt_path: str, dtype: str | None) -> dict[str, Any]:
    path = Path(os.path.realpath(ckpt_path))
    written = path / ".metadata" if path.is_dir() else path
    status = written.stat()
    return {"checkpoint": path.name, "bytes": status.st_size, "modified_ns": status.st_mtime_ns, "dtype": dtype}
