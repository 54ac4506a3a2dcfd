"""The command line: Lightning's `fit`, `validate`, `test`, `predict`, and `check`, `warm_start`, `export`, `report`."""

from __future__ import annotations

import inspect
import sys
import warnings
from argparse import ArgumentError
from contextlib import ExitStack
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
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dynamo_lightning import __version__
from dynamo_lightning.checkpoints import check_readable, check_strategy
from dynamo_lightning.checks.command import CheckCommand, prepared
from dynamo_lightning.data.literal_text import keep_text_literal, literal_arguments, plain_text
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.errors import MissingFileError, RunError, UserError, user_error_behind
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.runs.choice import (
    APPENDING_CSV,
    check_checkpoint_folders,
    check_logger_packages,
    choose_folder,
    drop_checkpointing,
    drop_replaced_tripwires,
    is_first_rank,
    point_loggers,
)
from dynamo_lightning.runs.class_names import (
    choices_by_option,
    config_with_class_paths,
    did_you_mean,
    nearest,
    with_class_paths,
)
from dynamo_lightning.runs.config import RunConfig, readable_config
from dynamo_lightning.runs.exports import already_exported, check_empty, record_export
from dynamo_lightning.runs.folder import RunFolder
from dynamo_lightning.runs.progress import finished_iterations, reason_to_stop
from dynamo_lightning.runs.report import report
from dynamo_lightning.warm_start import Demonstrations, warm_start

LOGGERS = (APPENDING_CSV, "lightning.pytorch.loggers.TensorBoardLogger")
HARMLESS_WARNINGS = (
    r"Checkpoint directory .* exists and is not empty",  # a resumed run goes on with it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's use of torch
    r".*your dataloader is not resumable",  # the data module keeps the stream's place
)
ONE_LINE_ERRORS = (ArgumentError, UserError, RunError, MisconfigurationException)
"""The parser's, ours and Lightning's words about a user's mistake; any other exception is a bug with its traceback."""
SUBCOMMANDS = {
    **LightningCLI.subcommands(),
    "check": {"model", "datamodule"},
    "warm_start": {"model", "datamodule"},
    "export": {"model", "datamodule"},
}
"""Lightning's and ours, each with the arguments that the command line does not offer."""
OVERVIEW = {
    "check": "Check a set-up before a run, in about a minute.",
    "fit": "Train; resume with --ckpt_path.",
    "validate": "Evaluate a policy on the validation data.",
    "test": "Evaluate a policy on the test data.",
    "predict": "Write responses to prompts and their rewards.",
    "export": "Write the policy of a checkpoint as a folder that transformers and vLLM load.",
    "report": "Put runs side by side, in the terminal or as a page (--output report.html).",
}
"""Short descriptions for `--help` of commands whose own descriptions are longer."""
CALLBACKS = (
    "IterationCheckpoint",
    "EntropySpikeMonitor",
    "GradientStabilityMonitor",
    "VarianceReductionMonitor",
    "ModulationHistograms",
    "RolloutTable",
    "GroupTable",
    "KeyPlots",
    "PredictionWriter",
    "BenchmarkReport",
    "ThroughputMonitor",
    "Tripwires",
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
        """Parse the file into the configuration, without what only other subcommands take."""
        file = find_config(values)
        parser.config_files = [*getattr(parser, "config_files", ()), file]
        if Path(file).is_file():
            text = Path(file).read_text(encoding="utf-8")
            readable = readable_config(text, parser.prog.split()[-1])
            readable = config_with_class_paths(readable, choices_by_option(parser))
            file = readable if readable != text else file
        super().__call__(parser, cfg, file, option_string)


class DynamoTrainer(CheckCommand, L.Trainer):
    """Lightning's trainer with three more entry points, whose log folder is that of the command."""

    folder: RunFolder | None = None

    @property
    def log_dir(self) -> str | None:
        """The folder of the command; called on all ranks, as Lightning's."""
        return super().log_dir if self.folder is None else self.strategy.broadcast(str(self.folder.path))

    def _run_stage(self) -> Any:
        """As Lightning's; a run that is resumed after its end takes no step."""
        if self.training and self.ckpt_path and (reason := reason_to_stop(self)):
            run = self.folder.path if self.folder is not None else self.ckpt_path
            rank_zero_only(print)(
                f"{run} is finished: {finished_iterations(self)} RL iterations, {reason}; nothing was trained. "
                f"A larger {reason.split('=')[0]} goes on"
            )
            return None
        return super()._run_stage()

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
        check_empty(output_dir)
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

        if already_exported(output_dir, ckpt_path, dtype):
            print(f"{output_dir} already holds the policy of {ckpt_path}")
            return
        export_policy(model, ckpt_path, output_dir, dtype)
        record_export(output_dir, ckpt_path, dtype)
        print(f"wrote {output_dir}")


class DynamoCLI(LightningCLI):
    """One configuration for every subcommand: `trainer`, `model`, `data`, `optimizer`, `lr_scheduler`.

    Args:
        chosen: The subcommand that will run, if known: building all their parsers takes seconds.
        cleanup: Called at the end of the command, however it ends.
        kwargs: See `LightningCLI`.
    """

    def __init__(self, chosen: str | None = None, cleanup: ExitStack | None = None, **kwargs: Any) -> None:
        self.chosen = chosen
        self.cleanup = cleanup or ExitStack()
        self.folder: RunFolder | None = None
        super().__init__(**kwargs)

    newest_parser: Any = None
    """Parser of the subcommand that is parsed, for what is said about its errors."""

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
        """As Lightning's, with class names as the documentation writes them and text options as they are written."""
        given = sys.argv[1:] if args is None else args
        if self.chosen in SUBCOMMANDS and isinstance(given, list):
            DynamoCLI.newest_parser = self._subcommand_parsers[self.chosen]
            given = with_class_paths(given, choices_by_option(DynamoCLI.newest_parser))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
            super().parse_arguments(parser, literal_arguments(given))
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
        ckpt_path = self._check_ckpt_path()
        if ckpt_path is not None and subcommand != "export":
            if self.config[subcommand].get("weights_only") is not False:  # false: the user vouches for it
                check_readable(ckpt_path)
            check_strategy(ckpt_path, self.trainer.strategy)
        super()._run_subcommand(subcommand)

    def _check_ckpt_path(self) -> str | None:
        """The checkpoint, if one is given, after a look whether it exists."""
        subcommand = str(self.subcommand)
        ckpt_path = self.config[subcommand].get("ckpt_path")
        if ckpt_path in ("last", "best"):
            raise UserError(
                f"ckpt_path={ckpt_path} would be looked for in the new log folder of this command: give the file, such "
                f"as runs/{self.config[subcommand].name}/version_0/checkpoints/last.ckpt"
            )
        if ckpt_path is not None and not Path(ckpt_path).exists():
            raise MissingFileError(f"ckpt_path: there is no checkpoint {ckpt_path}")
        return ckpt_path

    def _parse_ckpt_path(self) -> None:
        """Leave the options as they were given: Lightning's would override them by those in the checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Claim the folder of the command, and have all loggers write into it."""
        config = self.config[self.subcommand]
        given = config.clone()
        drop_checkpointing(config)
        drop_replaced_tripwires(config)
        if self.subcommand == "export":  # it logs nothing
            config.trainer.logger = False
        elif self.subcommand == "check":
            self.prepared = prepared(config, self.cleanup)
        else:
            self._check_ckpt_path()
            check_logger_packages(config)
            files = getattr(self._parser(self.subcommand), "config_files", ())
            self.folder = choose_folder(str(self.subcommand), config, files)
        if self.folder is not None and is_first_rank():
            self.cleanup.callback(self.folder.release)
            check_checkpoint_folders(config, self.folder)
            print(f"folder   {self.folder.path}{' (resumed)' * (self.folder.kind == 'resumed')}")
        point_loggers(config, self.folder)
        if self.subcommand in ("check", "warm_start", "export"):
            # Lightning would write the config at their fits, which are not the command's own.
            self.save_config_callback = None
        self.save_config_kwargs = {"given": given, "folder": self.folder}

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """As Lightning's; the trainer knows its folder."""
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, DynamoTrainer)
        trainer.folder = self.folder
        if self.subcommand == "check":
            trainer.check_folder, trainer.planned = self.prepared
        return trainer


def print_overview(given: list[str]) -> None:
    """Answer `--help`, `--version` and a command that does not exist, without the seconds that all parsers take."""
    commands = {name: getattr(DynamoTrainer, name) for name in SUBCOMMANDS} | {"report": report}
    first = given[0] if given else ""
    if first in commands or (first.startswith("-") and first not in ("-h", "--help", "--version")):
        return
    if first == "--version":
        print(f"dynamo_lightning {__version__}")
        sys.exit()
    if first and first not in ("-h", "--help"):
        sys.exit(f"error: {first} is no command{nearest(first, list(commands))}; --help lists them")
    summaries = {name: (inspect.getdoc(function) or "").split("\n")[0] for name, function in commands.items()}
    print("usage: python -m dynamo_lightning [--help] [--version] COMMAND ...\n\ncommands:")
    for name, summary in (summaries | OVERVIEW).items():
        print(f"  {name:12}{summary}")
    print("\noptions of a command: python -m dynamo_lightning COMMAND --help")
    sys.exit(0 if first else 2)


def console() -> None:
    """The command `dynamo_lightning`, whose exit status is that of the run."""
    main()


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
    if isinstance(given, list):
        print_overview(given)
    with ExitStack() as cleanup:
        try:
            if isinstance(given, list) and given[:1] == ["report"]:
                report(given[1:])
                return None
            return DynamoCLI(
                chosen=str(given[0]) if isinstance(given, list) and given else None,
                cleanup=cleanup,
                model_class=PolicyModule,
                datamodule_class=RolloutDataModule,
                trainer_class=DynamoTrainer,
                save_config_callback=RunConfig,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_kwargs={"prog": "python -m dynamo_lightning"},
                args=args,
            )
        except ArgumentError as error:
            sys.exit(f"error: {did_you_mean(str(error), DynamoCLI.newest_parser)}")
        except (*ONE_LINE_ERRORS, ValueError) as error:
            words = error if isinstance(error, ONE_LINE_ERRORS) else user_error_behind(error)
            if words is None:
                raise
            sys.exit(f"error: {words}")
