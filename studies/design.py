"""The design of a study: arms, learning rates, seeds and the end that decides, in one file of its own."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_lightning.errors import UserError


@dataclass(frozen=True)
class Arm:
    """A method under study: options of `fit` that set it apart from the shared ones."""

    name: str
    options: tuple[str, ...]
    """Options of `python -m dynamo_lightning fit`, each `--name=value`."""
    note: str = ""
    learning_rate: float | None = None
    """Rate of its main runs, chosen on pilot seeds; `None`: all rates of the grid on all seeds."""
    num_seeds: int | None = None
    """Main seeds that it is run on, the first ones; `None`: all."""


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the result file, such as `equal_1e-04_0`."""
        return f"{self.arm.name}_{self.learning_rate:.0e}_{self.seed}"

    @property
    def options(self) -> tuple[str, ...]:
        """Options of this run that the shared ones do not have."""
        return (
            *self.arm.options,
            f"--optimizer.init_args.lr={self.learning_rate}",
            f"--seed_everything={self.seed}",
        )


@dataclass(frozen=True)
class Study:
    """All that is fixed before the first run."""

    name: str
    frozen_on: str
    """Day on which the design was fixed, ISO 8601."""
    shared: dict[str, Any]
    """Options of every run, as in a config of `fit`."""
    arms: tuple[Arm, ...]
    reference: str
    """Arm that the others are compared with."""
    learning_rates: tuple[float, ...]
    """Grid of every arm, in the order of the runs."""
    seeds: tuple[int, ...]
    metric: str
    """Validation metric with a target, such as `val/arithmetic/pass@1`."""
    target: float | None
    """Value of the metric that is to be reached; `None`: runs go to the limit, and `final_metrics` are compared."""
    limit: int
    """RL iterations after which a run ends; one that never reached the target counts with this number, and all its
    tokens."""
    final_metrics: tuple[str, ...] = ()
    """Metrics whose last logged value is kept, such as `stability/entropy_spikes`."""
    pilot_seeds: tuple[int, ...] = ()
    """Seeds on which every arm has the whole grid, to choose `Arm.learning_rate`; not among `seeds`."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if self.reference not in names or len(set(names)) != len(names):
            raise UserError(f"arms {names} must differ in name, and reference={self.reference!r} must be one of them")
        if both := sorted(set(self.pilot_seeds) & set(self.seeds)):
            raise UserError(
                f"seeds {both} are pilot seeds too: a rate would be chosen on the runs that it is judged by"
            )
        for arm in self.arms:
            if arm.learning_rate is not None and arm.learning_rate not in self.learning_rates:
                raise UserError(f"learning_rate={arm.learning_rate} of {arm.name} is not in {self.learning_rates}")
        runs = [run.name for run in self.runs()]
        if twice := sorted({name for name in runs if runs.count(name) > 1}):
            raise UserError(
                f"two runs are called {twice[0]}: learning rates of one arm must differ in their first digit"
            )

    def runs(self) -> Iterator[Run]:
        """All runs, pilots first; seeds outermost and arms innermost, so that an unfinished study is balanced.

        An arm without a chosen rate has no main runs in a study with pilot seeds.
        """
        for seed in self.pilot_seeds:
            for learning_rate in self.learning_rates:
                for arm in self.arms:
                    yield Run(arm, learning_rate, seed)
        for number, seed in enumerate(self.seeds):
            for learning_rate in self.learning_rates:
                for arm in self.arms:
                    chosen = (arm.learning_rate is None and not self.pilot_seeds) or arm.learning_rate == learning_rate
                    if chosen and (arm.num_seeds is None or number < arm.num_seeds):
                        yield Run(arm, learning_rate, seed)


def load_study(path: Path) -> Study:
    """Read the `STUDY` of a design file.

    Raises:
        UserError: If there is no such file, or no study in it.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the design of a study, such as studies/noise_limited.py")
    study = runpy.run_path(str(path)).get("STUDY")
    if not isinstance(study, Study):
        raise UserError(f"{path} must define STUDY, a studies.design.Study")
    return study


def results_folder(design: Path) -> Path:
    """Folder of a design's result files: `studies/noise_limited/results` for `studies/noise_limited.py`."""
    return design.with_suffix("") / "results"
