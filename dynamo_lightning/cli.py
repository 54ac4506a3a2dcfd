"""The command line: Lightning's `fit`, `validate`, `test`, `predict`, and our `warm_start`, `export`, `report`."""

from __future__ import annotations

import re
import sys
import warnings
from argparse import ArgumentError, ArgumentParser
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import ActionConfigFile, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerCallable,
    OptimizerCallable,
)

from dynamo_lightning import __version__
from dynamo_lightning.checkpoints import check_strategy
from dynamo_lightning.data.literal_text import keep_text_literal, literal_arguments, plain_text
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.errors import MissingFileError, RunError, UserError
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.report import compare
from dynamo_lightning.warm_start import Demonstrations, warm_start

LOGGERS = ("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger")
HARMLESS_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's use of torch
    r".*your dataloader is not resumable",  # the data module keeps the stream's place
    r"Experiment logs directory .* exists and is not empty",  # two loggers share the run's folder
)
ONE_LINE_ERRORS = (ArgumentError, UserError, RunError, MisconfigurationException)
"""The parser's, ours and Lightning's words about a user's mistake; any other exception is a bug with its traceback."""
SUBCOMMANDS = {
    **LightningCLI.subcommands(),
    "warm_start": {"model", "datamodule"},
    "export": {"model", "datamodule"},
}
"""Lightning's and ours, each with the arguments that the command line does not offer."""
CALLBACKS = (
    "IterationCheckpoint",
    "EntropySpikeMonitor",
    "GradientStabilityMonitor",
    "VarianceReductionMonitor",
    "ModulationHistograms",
    "RolloutTable",
    "PredictionWriter",
    "BenchmarkReport",
    "ThroughputMonitor",
    "LearningSignalMonitor",
    "ProgressLines",
    "RunReport",
)


def shipped_configs() -> Path:
    """Folder of the configs that come with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def find_config(name: str) -> str:
    """The file itself, or the shipped config of that name if there is no such file here."""
    shipped = shipped_configs() / name.removeprefix("configs/")
    return str(shipped) if not Path(name).exists() and shipped.is_file() else name


class ShippedConfigFile(ActionConfigFile):
    """`--config` that falls back on the shipped configs."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Parse the file into the configuration."""
        super().__call__(parser, cfg, find_config(values), option_string)


class DynamoTrainer(L.Trainer):
    """Lightning's trainer with two more entry points."""

    def warm_start(
        self, model: PolicyModule, datamodule: RolloutDataModule, demonstrations: Demonstrations, output_dir: str
    ) -> None:
        """Fine-tune the policy on demonstrations and write it in Hugging Face format.

        Args:
            model: Holds the policy.
            datamodule: Not used.
            demonstrations: What to learn.
            output_dir: Folder for the policy and its tokenizer.
        """
        warm_start(self, model, demonstrations, output_dir)

    def export(
        self,
        model: PolicyModule,
        datamodule: RolloutDataModule,
        ckpt_path: str,
        output_dir: str,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        """Write the policy of a checkpoint as a folder that transformers and vLLM load.

        Args:
            model: Says which architecture and tokenizer.
            datamodule: Not used.
            ckpt_path: The checkpoint.
            output_dir: The folder to write; must not exist, or be empty.
            dtype: Type of the written weights; by default that of the checkpoint.
        """
        from dynamo_lightning.export import export_policy

        export_policy(model, ckpt_path, output_dir, dtype)
        print(f"wrote {output_dir}")


class DynamoCLI(LightningCLI):
    """One configuration for every subcommand: `trainer`, `model`, `data`, `optimizer`, `lr_scheduler`.

    Args:
        chosen: The subcommand that will run, if known: building all their parsers takes seconds.
        kwargs: See `LightningCLI`.
    """

    def __init__(self, chosen: str | None = None, **kwargs: Any) -> None:
        self.chosen = chosen
        super().__init__(**kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """As Lightning's, with shipped configs found by name and no abbreviated options."""
        kwargs.setdefault("dump_header", [f"dynamo_lightning=={__version__}"])
        parser = LightningArgumentParser(allow_abbrev=False, exit_on_error=False, **kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ShippedConfigFile,
            help="YAML file; may be given several times, later ones win. A name that is not a file here is looked up "
            "among the shipped configs.",
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As Lightning's, with the values of text options as they are written."""
        if args is None:  # Lightning warns of arguments that are passed
            self.config = parser.parse_args(literal_arguments(sys.argv[1:]))
        else:
            super().parse_arguments(parser, literal_arguments(args))
        plain_text(self.config)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The links, and our defaults of Lightning's options."""
        parser.add_argument(
            "--optimizer",
            type=OptimizerCallable,
            default={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6, "weight_decay": 0.1}},
            help="Optimizer of the policy.",
        )
        parser.add_argument(
            "--lr_scheduler",
            type=LRSchedulerCallable | None,
            default={
                "class_path": "torch.optim.lr_scheduler.LinearLR",
                "init_args": {"start_factor": 0.1, "total_iters": 10},
            },
            help="Learning rate schedule, stepped with the optimizer; the default warms up over 10 steps.",
        )
        parser.add_argument(
            "--name",
            type=str,
            default="dynamo",
            help="Name of the run: its logs go to a new `runs/{name}/version_{n}`.",
        )
        parser.link_arguments("optimizer", "model.optimizer")
        parser.link_arguments("lr_scheduler", "model.lr_scheduler")
        parser.link_arguments("model.model_name", "data.tokenizer_name")
        parser.link_arguments("model.policy.revision", "data.tokenizer_revision")
        parser.link_arguments("model.policy.trust_remote_code", "data.trust_remote_code")
        parser.set_defaults(
            {
                "trainer.logger": [
                    {"class_path": logger, "init_args": {"save_dir": "runs", "name": None}} for logger in LOGGERS
                ],
                "trainer.callbacks": [{"class_path": f"dynamo_lightning.callbacks.{name}"} for name in CALLBACKS],
                "trainer.use_distributed_sampler": False,
                # A first forward under inference mode would break later training under FSDP2.
                "trainer.inference_mode": False,
                # The whole validation set is evaluated before training: the “before” of the report.
                "trainer.num_sanity_val_steps": -1,
                "trainer.log_every_n_steps": 1,
            }
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static
        """The chosen one, or all, each with the arguments that the command line does not offer."""
        return {self.chosen: SUBCOMMANDS[self.chosen]} if self.chosen in SUBCOMMANDS else SUBCOMMANDS

    def _run_subcommand(self, subcommand: str) -> None:
        """As Lightning's, after a look at the checkpoint."""
        ckpt_path = self.config[subcommand].get("ckpt_path")
        if ckpt_path in ("last", "best"):
            raise UserError(
                f"ckpt_path={ckpt_path} would be looked for in the new log folder of this command: give the file, such "
                f"as runs/{self.config[subcommand].name}/version_0/checkpoints/last.ckpt"
            )
        if ckpt_path is not None and not Path(ckpt_path).exists():
            raise MissingFileError(f"ckpt_path: there is no checkpoint {ckpt_path}")
        if ckpt_path is not None and subcommand != "export":
            check_strategy(ckpt_path, self.trainer.strategy)
        super()._run_subcommand(subcommand)

    def before_instantiate_classes(self) -> None:
        """Give all loggers of the run the same new folder; each would count its own versions otherwise."""
        if self.subcommand in ("warm_start", "export"):
            # They have no log folder: Lightning would write the config into the current one.
            self.save_config_callback = None
        config = self.config[self.subcommand]
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else []
        ours = [logger for logger in loggers if logger.class_path in LOGGERS]
        for logger in ours:
            logger.init_args.name = config.name if logger.init_args.name is None else logger.init_args.name
        folders = {Path(logger.init_args.save_dir) / logger.init_args.name for logger in ours}
        for logger in ours:
            if logger.init_args.version is None:
                logger.init_args.version = next_version(folders)


def next_version(folders: set[Path]) -> int:
    """The first number for which no folder has a `version_{number}`."""
    names = [path.name for folder in folders if folder.is_dir() for path in folder.iterdir()]
    taken = [int(match[1]) for name in names if (match := re.fullmatch(r"version_(\d+)", name))]
    return max(taken, default=-1) + 1


def main(args: ArgsType = None) -> DynamoCLI | None:
    """Run the command line.

    Args:
        args: Arguments as a list; those of the process by default.

    Returns:
        The command line with its trainer, model and data module; none after `report`.
    """
    given = sys.argv[1:] if args is None else args
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    keep_text_literal()
    for harmless in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=harmless)
    try:
        if isinstance(given, list) and given[:1] == ["report"]:
            parser = ArgumentParser(prog="python -m dynamo_lightning report", description="Put runs side by side.")
            parser.add_argument(
                "run_folders", nargs="+", help="Log folders of finished runs, with a summary.json each."
            )
            compare(parser.parse_args(given[1:]).run_folders)
            return None
        return DynamoCLI(
            chosen=str(given[0]) if isinstance(given, list) and given else None,
            model_class=PolicyModule,
            datamodule_class=RolloutDataModule,
            trainer_class=DynamoTrainer,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "python -m dynamo_lightning"},
            args=args,
        )
    except ONE_LINE_ERRORS as error:
        sys.exit(f"error: {error}")
