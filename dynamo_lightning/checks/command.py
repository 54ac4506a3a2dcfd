"""The subcommand `check` of the command line."""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamo_lightning.checks.settings import only_results, prepare

if TYPE_CHECKING:
    from dynamo_lightning.datamodule import RolloutDataModule
    from dynamo_lightning.module import PolicyModule


class CheckCommand:
    """The entry point `check` of a trainer, whose configuration `prepared` has changed."""

    check_folder: Path
    """Temporary folder."""
    planned: dict[str, Any]
    """Options of the planned run that were changed for the check."""

    def check(
        self, model: PolicyModule, datamodule: RolloutDataModule, run: str | None = None, json: bool = False
    ) -> None:
        """Check a set-up before a run, in about a minute: prompts, reward, engine, packing, memory, time, allocation.

        Args:
            model: The policy and its training step.
            datamodule: The data.
            run: Folder of an earlier run, whose success rates say how much the allocation can gain; by default they are
                assumed to be uniformly distributed.
            json: Print JSON instead of one line for each check.
        """
        from dynamo_lightning.checks.run import run_checks, worst

        results = run_checks(self, model, datamodule, self.check_folder, self.planned, run, json)  # type: ignore[arg-type]
        if worst(results) == "error":
            sys.exit(1)


def prepared(config: Any, cleanup: ExitStack) -> tuple[Path, dict[str, Any]]:
    """A temporary folder, and the planned options that were changed in the configuration."""
    cleanup.enter_context(only_results())
    folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="dynamo_lightning-check-"))
    return Path(folder), prepare(config, folder)
