"""The plots of a run's page in the loggers' own tools, as far as they have such plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dynamo_lightning.callbacks.group_table import group_columns
from dynamo_lightning.errors import UserError
from dynamo_lightning.runs.plot_specs import LINE_PLOTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def custom_scalars(names: set[str]) -> dict[str, dict[str, list[Any]]]:
    """Layout of TensorBoard's tab *Custom Scalars* for these metrics.

    Args:
        names: Metrics that are logged.

    Returns:
        By section and title `["Multiline", [names]]` for plots of several curves, and
        `["Margin", [value, low, high]]` for validation metrics with their intervals.
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for name in sorted(names):
        ends = [f"{name}_low", f"{name}_high"]
        if name.startswith("val/") and names.issuperset(ends):
            layout.setdefault("Results", {})[name.removeprefix("val/")] = ["Margin", [name, *ends]]
    for spec in LINE_PLOTS:
        shown = [name for name in spec.lines if name in names]
        if len(shown) > 1:
            layout.setdefault(spec.section, {})[spec.subject] = ["Multiline", shown]
    return layout


def group_picture(columns: dict[str, list[Any]]) -> Figure:
    """Rollouts of each prompt against the success rate expected of it, its color the rate observed.

    Args:
        columns: See `group_columns`.
    """
    from matplotlib.figure import Figure  # not pyplot: needs no display and keeps no global state

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    observed = [successes / size for successes, size in zip(columns["successes"], columns["sizes"], strict=True)]
    points = axes.scatter(columns["expected"], columns["sizes"], c=observed, vmin=0, vmax=1, s=25)
    figure.colorbar(points, label="success rate observed")
    axes.set(xlabel="success rate expected", ylabel="rollouts", xlim=(-0.03, 1.03))
    axes.set_ylim(bottom=0)
    return figure


class KeyPlots(Callback):
    """Gives TensorBoard a layout of plots with several curves, and TensorBoard and W&B a picture of the groups.

    The layout, for the tab *Custom Scalars*, is written when a metric is logged for the first time. The picture shows
    each prompt's rollouts against its success rate.

    Args:
        every_n_iterations: RL iterations from one picture to the next; drawing one takes about 0.1 s.

    Raises:
        UserError: If `every_n_iterations` is below 1.
    """

    def __init__(self, every_n_iterations: int = 50) -> None:
        if every_n_iterations < 1:
            raise UserError(f"KeyPlots.every_n_iterations must be at least 1, got {every_n_iterations}")
        self.every_n_iterations = every_n_iterations
        self._names: set[str] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the layout if there are new metrics, and the picture if it is due."""
        names = set(map(str, trainer.callback_metrics))  # on every rank: it may reduce metrics
        if not trainer.is_global_zero:
            return
        record = outputs["record"]
        iteration = record.batch.iteration
        self._write_layout(trainer, names)
        if iteration % self.every_n_iterations == 0:
            threshold = getattr(getattr(trainer, "datamodule", None), "success_threshold", 0.5)
            self._draw(trainer, group_columns(record, threshold), iteration)

    def _write_layout(self, trainer: Trainer, names: set[str]) -> None:
        if names <= self._names:
            return
        self._names |= names
        layout = custom_scalars(self._names)
        for logger in trainer.loggers:
            if add := getattr(getattr(logger, "experiment", None), "add_custom_scalars", None):
                add(layout)

    def _draw(self, trainer: Trainer, columns: dict[str, list[Any]], step: int) -> None:
        # by what they can do, not by class: importing the W&B logger's package must not become a requirement
        adders = [getattr(getattr(logger, "experiment", None), "add_figure", None) for logger in trainer.loggers]
        images = [getattr(logger, "log_image", None) for logger in trainer.loggers]
        if not columns["sizes"] or not any((*adders, *images)):
            return
        figure = group_picture(columns)
        for add_figure, log_image in zip(adders, images, strict=True):
            if log_image is not None:
                log_image(key="groups", images=[figure], step=step)
            elif add_figure is not None:
                add_figure("groups", figure, step, close=False)
