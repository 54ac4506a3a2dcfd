"""One rule for who writes where: a command writes only into a folder that it made, or into the run that it resumes.

`fit` makes `runs/{name}/version_{n}`, or goes on in the run of its checkpoint; `validate`, `test` and `predict` make
`evaluations/{n}` in the run of their checkpoint. A folder is claimed by `mkdir`, which only one of two commands started
at the same moment can win. `run.json` marks a folder as a run's; runs of version 0.1 are known by their config.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from dynamo_lightning.errors import UserError

RECORD = "run.json"
CONFIG = "config.yaml"
CONFIG_HEADER = "# dynamo_lightning=="
"""Begins every config that the command line saved."""
EVALUATIONS = "evaluations"


@dataclass
class RunFolder:
    """The folder of one command.

    Args:
        path: The folder.
        kind: `new` for a run that starts here, `resumed` for one that goes on here, `evaluation` for an evaluation.
        run: Folder of the run to which an evaluation belongs, or the run itself.
    """

    path: Path
    kind: Literal["new", "resumed", "evaluation"]
    run: Path | None = None
    _lock: IO[str] | None = None

    def lock(self) -> None:
        """Keep other commands from resuming the same run; the lock ends with this process, whatever ends it.

        Raises:
            UserError: If another process holds it.
        """
        try:
            import fcntl

            self._lock = (self.path / RECORD).open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"ckpt_path: another process is writing into {self.path}: wait for its end, or start a new run from "
                "this checkpoint with another --name"
            ) from None
        except (ImportError, OSError):  # a file system without locks, or a folder that is only read
            return

    def release(self) -> None:
        """Unlock the folder; remove it if it was made for a command that wrote nothing into it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self.kind == "resumed" or not self.path.is_dir():
            return
        files = list(self.path.iterdir())
        if all(file.name in (RECORD, "hparams.yaml") or "tfevents" in file.name for file in files):
            for file in files:
                file.unlink()
            self.path.rmdir()


def read_record(folder: Path) -> dict[str, Any]:
    """Contents of a folder's `run.json`; empty if there is none, or it is not ours."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def run_name(folder: Path) -> str | None:
    """The `--name` of the run in this folder; none if it is not the folder of a run."""
    record = read_record(folder)
    if record.get("kind") == "run":
        return str(record.get("name"))
    if not re.fullmatch(r"version_\d+", folder.name):
        return None
    try:  # of version 0.1
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    name = re.search(r"^name: *(\S.*?) *$", text, re.MULTILINE)
    return name[1].strip("'\"") if text.startswith(CONFIG_HEADER) and name else None


def run_of_checkpoint(ckpt_path: str) -> Path | None:
    """Folder of the run that wrote a checkpoint: above `checkpoints/`, or named by a record beside the checkpoint."""
    for path in dict.fromkeys((Path(ckpt_path), Path(os.path.realpath(ckpt_path)))):
        beside = read_record(path.parent)
        if beside.get("kind") == "checkpoints":
            folder = Path(os.path.normpath(path.parent / str(beside.get("run"))))
            if run_name(folder) is not None:
                return folder
        for folder in (path.parent, path.parent.parent):
            if run_name(folder) is not None:
                return folder
    return None


def mark_checkpoints(checkpoint_folder: Path, run: Path) -> None:
    """Leave a record of the run beside checkpoints that do not lie inside its folder."""
    if os.path.realpath(checkpoint_folder).startswith(os.path.realpath(run) + os.sep):
        return
    checkpoint_folder.mkdir(parents=True, exist_ok=True)
    record = {"kind": "checkpoints", "run": os.path.relpath(run, checkpoint_folder)}
    (checkpoint_folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


def newest_config(run: Path) -> Path:
    """The config with which a run was started, or resumed last."""
    resumed = _numbered(run, r"config\.resume-(\d+)\.yaml")
    return run / (f"config.resume-{resumed[-1]}.yaml" if resumed else CONFIG)


def next_resume_config(run: Path) -> Path:
    """Path of the config of the next resume that changes options."""
    resumed = _numbered(run, r"config\.resume-(\d+)\.yaml")
    return run / f"config.resume-{resumed[-1] + 1 if resumed else 1}.yaml"


def check_name(name: str) -> None:
    """Refuse a name that is no folder below the log folder.

    Raises:
        UserError: If it is empty, absolute or leads out of it.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"name={name!r} must name a folder below the log folder, such as my_run")


def claim(parent: Path, prefix: str, record: dict[str, Any], at_least: int = 0) -> Path:
    """Make the next numbered folder that does not exist yet, as one atomic step.

    Args:
        parent: Folder in which it is made, with its parents.
        prefix: Beginning of its name, before the number.
        record: Contents of its `run.json`.
        at_least: Smallest number.

    Returns:
        The folder.

    Raises:
        UserError: If nothing can be written there.
    """
    numbers = _numbered(parent, re.escape(prefix) + r"(\d+)")
    number = max([at_least, *(taken + 1 for taken in numbers)])
    while True:
        try:
            return claim_exactly(parent / f"{prefix}{number}", record)
        except FileExistsError:  # another command was quicker
            number += 1


def claim_exactly(folder: Path, record: dict[str, Any]) -> Path:
    """Make a folder that must not exist yet.

    Raises:
        FileExistsError: If it does.
        UserError: If nothing can be written there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(_unwritable(folder.parent, error)) from error
    try:
        folder.mkdir()
        (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(_unwritable(folder.parent, error)) from error
    return folder


def next_number(parents: set[Path], prefix: str) -> int:
    """The first number for which none of the folders has an entry `{prefix}{number}`."""
    return max((number + 1 for parent in parents for number in _numbered(parent, rf"{prefix}(\d+)")), default=0)


def _unwritable(folder: Path, error: OSError) -> str:
    return (
        f"trainer.logger: the log folder {folder} cannot be written ({error.strerror}): start the command in a folder "
        "where it can, or set save_dir of trainer.logger"
    )


def _numbered(folder: Path, pattern: str) -> list[int]:
    """Numbers in the names of a folder's entries that match, in ascending order."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))
