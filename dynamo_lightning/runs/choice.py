"""The folder of a command, chosen from its configuration before anything is built."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import _get_rank

from dynamo_lightning.errors import UserError
from dynamo_lightning.runs.folder import (
    EVALUATIONS,
    RunFolder,
    check_name,
    claim,
    claim_exactly,
    next_number,
    read_record,
    run_name,
    run_of_checkpoint,
)

APPENDING_CSV = "dynamo_lightning.runs.csv_log.AppendingCSVLogger"


LOGGER_PACKAGES = {
    "WandbLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "NeptuneLogger": "neptune",
    "TensorBoardLogger": "tensorboard",
}
"""Packages that Lightning's loggers need, each installed under its own name."""


def check_logger_packages(config: Any) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        UserError: Naming both.
    """
    loggers = config.trainer.logger
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        name = str(getattr(logger, "class_path", "")).rsplit(".", 1)[-1]
        package = LOGGER_PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"trainer.logger: {name} needs the package {package}, which is not installed: pip install {package}"
            )


def file_loggers(config: Any) -> list[Any]:
    """Configurations of the loggers that write into the folder of the command: CSV and TensorBoard."""
    loggers = config.trainer.logger
    paths = [
        (logger, str(getattr(logger, "class_path", "")))
        for logger in (loggers if isinstance(loggers, list) else [loggers])
    ]
    return [
        logger
        for logger, path in paths
        if path == APPENDING_CSV
        or (path.startswith("lightning.pytorch.loggers.") and path.endswith((".CSVLogger", ".TensorBoardLogger")))
    ]


def choose_folder(subcommand: str, config: Any, config_files: Sequence[str]) -> RunFolder | None:
    """Claim the folder that a command writes into; on other ranks than 0 a placeholder.

    Args:
        subcommand: `fit`, `validate`, `test`, `predict` or `warm_start`.
        config: Its configuration.
        config_files: The files that were given as `--config`.

    Returns:
        The folder; none for a command that writes no logs.

    Raises:
        UserError: If the name is no folder, the folder cannot be written, or is another run's.
    """
    if config.trainer.fast_dev_run:
        return None
    check_name(config.name)
    loggers = file_loggers(config)
    writes = bool(loggers) or subcommand in ("fit", "predict")
    if not writes and not (subcommand == "test" and config.model.evaluation.folder is None):
        return None
    ckpt_path = config.get("ckpt_path")
    run = run_of_checkpoint(ckpt_path) if ckpt_path else None
    root = Path(loggers[0].init_args.save_dir) if loggers else Path(config.trainer.default_root_dir or ".") / "runs"
    name = (loggers[0].init_args.name if loggers else None) or config.name
    if subcommand in ("fit", "warm_start"):
        if subcommand == "fit" and run is not None and run_name(run) == name:
            folder = RunFolder(run, "resumed", run)
        else:
            folder = _new_run(root, name, loggers, "run" if subcommand == "fit" else subcommand)
        if is_first_rank():
            folder.lock()
        return folder
    if run is None:
        run = next((Path(file).parent for file in reversed(config_files) if run_name(Path(file).parent)), None)
    return _new_evaluation(root / name, run, subcommand)


def check_checkpoint_folders(config: Any, folder: RunFolder) -> None:
    """Refuse a new run whose callbacks save where another run keeps its checkpoints.

    Raises:
        UserError: Naming both.
    """
    callbacks = config.trainer.callbacks
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        dirpath = callback.get("init_args", {}).get("dirpath") if callback is not None else None
        if not isinstance(dirpath, str) or folder.kind != "new":
            continue
        record = read_record(Path(dirpath))
        owner = Path(os.path.normpath(Path(dirpath) / str(record.get("run", ""))))
        if record.get("kind") == "checkpoints" and run_name(owner) is not None:
            raise UserError(
                f"trainer.callbacks: dirpath={dirpath} holds the checkpoints of the run {owner}: give the new run "
                "another dirpath, or none, or resume that run with --ckpt_path and its --name"
            )


def is_first_rank() -> bool:
    """True if this process is the one that makes folders; known before the trainer is built."""
    return (_get_rank() or 0) == 0


def _new_run(root: Path, name: str, loggers: Sequence[Any], kind: str) -> RunFolder:
    record = {"kind": kind, "name": name}
    version = loggers[0].init_args.version if loggers else None
    if not is_first_rank():
        return RunFolder(root / name / f"version_{version or 0}", "new")
    if version is None:
        parents = {root / name} | {Path(logger.init_args.save_dir) / name for logger in loggers}
        return RunFolder(claim(root / name, "version_", record, next_number(parents, "version_")), "new")
    exact = root / name / (version if isinstance(version, str) else f"version_{version}")
    try:
        return RunFolder(claim_exactly(exact, record), "new")
    except FileExistsError:
        raise UserError(
            f"trainer.logger: version={version} names {exact}, which already exists: leave version out, or resume the "
            "run in it with --ckpt_path"
        ) from None


def _new_evaluation(own: Path, run: Path | None, subcommand: str) -> RunFolder:
    record = {"kind": "evaluation", "command": subcommand}
    if not is_first_rank():
        return RunFolder((run or own) / EVALUATIONS / "0", "evaluation", run)
    if run is not None:
        try:
            return RunFolder(claim(run / EVALUATIONS, "", record), "evaluation", run)
        except UserError:  # somebody else's run, which may only be read
            pass
    return RunFolder(claim(own / EVALUATIONS, "", record), "evaluation", run)


def point_loggers(config: Any, folder: RunFolder | None) -> None:
    """Have the loggers write into the folder, in a configuration that is about to be instantiated."""
    loggers = file_loggers(config)
    for logger in loggers:
        if logger.class_path.endswith(".CSVLogger"):  # Lightning's deletes the metrics of a run that it goes on with
            logger.class_path = APPENDING_CSV
            logger.init_args.pop("flush_logs_every_n_steps", None)
    root = loggers[0].init_args.save_dir if loggers else None
    if folder is None:
        return
    for logger in loggers:
        arguments = logger.init_args
        if folder.kind == "evaluation":  # in two parts: a name that is a number alone would be taken for one
            run = folder.path.parent.parent
            arguments.save_dir, arguments.name = str(run.parent), run.name
            arguments.version = os.path.join(folder.path.parent.name, folder.path.name)
            continue
        if arguments.save_dir == root:
            arguments.save_dir, arguments.name = str(folder.path.parent.parent), folder.path.parent.name
        else:  # a folder of its own, in which the run has the same name
            arguments.name = arguments.name or config.name
        arguments.version = folder.path.name


def drop_checkpointing(config: Any) -> None:
    """With `trainer.enable_checkpointing=false`, take our own checkpoint callback out of the list of defaults."""
    callbacks = config.trainer.callbacks
    if config.trainer.enable_checkpointing is False and isinstance(callbacks, list):
        config.trainer.callbacks = [c for c in callbacks if not c.class_path.endswith(".IterationCheckpoint")]


def drop_replaced_tripwires(config: Any) -> None:
    """Keep the last of several `Tripwires`, such as that of the defaults and one added by `+=`."""
    callbacks = config.trainer.callbacks
    if isinstance(callbacks, list):
        replaced = [c for c in callbacks if getattr(c, "class_path", "").endswith(".Tripwires")][:-1]
        config.trainer.callbacks = [c for c in callbacks if not any(c is other for other in replaced)]
