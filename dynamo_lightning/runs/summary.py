"""The `summary.json` of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynamo_lightning.errors import MissingFileError, UserError

NEEDED = ("iterations", "before", "after", "seconds", "final")


def read_summary(folder: str) -> dict[str, Any]:
    """Numbers of a run.

    Args:
        folder: Its log folder.

    Raises:
        MissingFileError: If there is no summary.
        UserError: If it is not complete.
    """
    path = Path(folder) / "summary.json"
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: a run writes it when it ends; is {folder} a run's log folder?")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not complete JSON ({error}): resume the run, which writes it again") from None
    missing = [name for name in NEEDED if not isinstance(summary, dict) or name not in summary]
    if missing:
        raise UserError(f"{path} is not complete: {', '.join(missing)} missing; is it the summary of a run?")
    return summary
