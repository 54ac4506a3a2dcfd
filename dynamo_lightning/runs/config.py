"""Saved configs: written once for each run, read by every subcommand."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dynamo_lightning.runs.folder import (
    CONFIG,
    CONFIG_HEADER,
    RunFolder,
    mark_checkpoints,
    newest_config,
    next_resume_config,
)

ARGUMENTS = {
    "fit": {"ckpt_path", "weights_only"},
    "validate": {"ckpt_path", "verbose", "weights_only"},
    "test": {"ckpt_path", "verbose", "weights_only"},
    "predict": {"ckpt_path", "return_predictions", "weights_only"},
    "warm_start": {"demonstrations", "output_dir"},
    "export": {"ckpt_path", "output_dir", "dtype"},
    "check": {"run", "json"},
}
"""By subcommand, the options that it does not share with all others."""
_EVALUATIONS = {"validate", "test", "predict"}
_OF_A_RESUME = ("ckpt_path", "weights_only")


def readable_config(text: str, subcommand: str) -> str:
    """A config's text without what only other subcommands take.

    Left out are their own arguments; the checkpoint from which another kind of command started; and, in configs that
    version 0.1 saved, the folder of the run that is baked into its loggers.

    Args:
        text: YAML in block style, as configs are written.
        subcommand: The subcommand that reads it.
    """
    saved = text.startswith(CONFIG_HEADER)
    foreign: set[str] = set().union(*ARGUMENTS.values()) - ARGUMENTS.get(subcommand, set())
    if saved and subcommand not in (_EVALUATIONS if _saved_by_evaluation(text) else {"fit"}):
        foreign |= {"ckpt_path"}
    lines, skipping = [], False
    for line in text.splitlines(keepends=True):
        key = re.match(r"(\w+) *:", line)
        if key or (line.strip() and not line[0].isspace() and line[0] not in "#-"):
            skipping = key is not None and key[1] in foreign
        if not skipping:
            lines.append(line)
    text = "".join(lines)
    return _without_version(text) if saved else text


def _saved_by_evaluation(text: str) -> bool:
    return re.search(r"^(verbose|return_predictions):", text, re.MULTILINE) is not None


def _without_version(text: str) -> str:
    """Loggers of version 0.1 with name and version null again, where both were filled in."""
    pattern = r"(init_args:\n +save_dir: [^\n]*\n +name: )[^\n]*(\n +version: )\d+(?=\n)"
    return re.sub(pattern, r"\1null\2null", text)


def _options(text: str) -> Any:
    """Options of a config, but for the checkpoint that a resume starts from."""
    values = yaml.safe_load(text)
    return {name: value for name, value in values.items() if name not in _OF_A_RESUME}


class RunConfig(SaveConfigCallback):
    """Saves the config into the command's folder: `config.yaml`, or `config.resume-1.yaml`, … if a resume changes it.

    Args:
        parser: Parser of the subcommand.
        config: Its configuration with the folder filled in, which is not what is saved.
        given: The configuration as it was given.
        folder: The folder of the command; none saves nothing.
        kwargs: See `SaveConfigCallback`.
    """

    def __init__(self, parser: Any, config: Any, given: Any, folder: RunFolder | None, **kwargs: Any) -> None:
        super().__init__(parser, config, **kwargs)
        self.given = copy.deepcopy(given)
        self.folder = folder

    @rank_zero_only
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config, unless the run has the same already; only rank 0, which needs no others for it."""
        if self.already_saved or self.folder is None:
            return
        self.already_saved = True
        if self.folder.kind == "resumed":
            return  # on_train_start: a run that is finished is left as it is
        self.folder.path.mkdir(parents=True, exist_ok=True)
        (self.folder.path / CONFIG).write_text(self._text(), encoding="utf-8")

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what a resume changes; note the run beside its checkpoints, if they lie elsewhere."""
        if self.folder is None:
            return
        if self.folder.kind == "resumed":
            text, newest = self._text(), newest_config(self.folder.path)
            if not newest.is_file() or _options(newest.read_text(encoding="utf-8")) != _options(text):
                next_resume_config(self.folder.path).write_text(text, encoding="utf-8")
        for checkpoint in trainer.checkpoint_callbacks:
            if dirpath := getattr(checkpoint, "dirpath", None):
                mark_checkpoints(Path(dirpath), self.folder.path)

    def _text(self) -> str:
        return self.parser.dump(self.given, skip_none=False)
