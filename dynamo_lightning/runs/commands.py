"""The shell commands that a run prints at its end; each works as it stands."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from dynamo_lightning.runs.exports import free_export_folder
from dynamo_lightning.runs.folder import CONFIG, newest_config


def commands(folder: str, checkpoint: str, datamodule: Any) -> tuple[str | None, dict[str, str]]:
    """The commands that continue a run.

    Args:
        folder: Log folder of the run.
        checkpoint: Its newest checkpoint; empty without one.
        datamodule: Says which data the run can be evaluated on: `test` is preferred to `val`.

    Returns:
        The config of the run, if it was saved, and commands by purpose; none that could not work, as when there is no
        config (a run of Lightning's `Trainer`) or no checkpoint.
    """
    config = newest_config(Path(folder))
    if not config.is_file():
        return None, {}
    if not checkpoint:
        return str(Path(folder, CONFIG)), {}
    sources = getattr(datamodule, "sources", {})
    evaluation = "test" if sources.get("test") else "validate" if sources.get("val") else None
    return str(config), follow_ups(str(config), checkpoint, free_export_folder(folder, checkpoint), evaluation)


def follow_ups(config: str, checkpoint: str, export: str, evaluation: str | None) -> dict[str, str]:
    """Commands by purpose; paths below the working folder are given relative to it.

    Args:
        config: Config of the run.
        checkpoint: Its checkpoint.
        export: Folder for the exported policy.
        evaluation: Subcommand that evaluates it, `test` or `validate`; none leaves this out.
    """
    here = os.getcwd() + os.sep
    config, checkpoint, export = (shlex.quote(path.removeprefix(here)) for path in (config, checkpoint, export))
    run, state = "python -m dynamo_lightning", f"--config {config} --ckpt_path {checkpoint}"
    found = {
        "resume": f"{run} fit {state}",
        "evaluate": f"{run} {evaluation} {state}",
        "export": f"{run} export {state} --output_dir {export}",
    }
    if evaluation is None:
        del found["evaluate"]
    return found
