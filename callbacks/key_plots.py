"""The plots of a run's page in the loggers' own tools, as far as they have such plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dynamo_lightning.callbacks.group_table import group_columns
from dynamo_lightning.callbacks.thinned_curves import ThinnedCurves
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
    for section, title, lines in several_curves(names):
        kind = "Margin" if section == "Results" and "low" in lines.values() else "Multiline"
        layout.setdefault(section, {})[title] = [kind, list(lines)]
    return layout


def several_curves(names: set[str]) -> list[tuple[str, str, dict[str, str]]]:
    """Plots with more than one curve that these metrics have: section, title, and the curves' legends by metric."""
    plots = []
    for name in sorted(names):
        ends = {f"{name}_low": "low", f"{name}_high": "high"}
        if name.startswith("val/") and names.issuperset(ends):
            plots.append(("Results", name.removeprefix("val/"), {name: "value", **ends}))
    for spec in LINE_PLOTS:
        lines = {name: legend for name, legend in spec.lines.items() if name in names}
        if len(lines) > 1:
            plots.append((spec.section, spec.subject, lines))
    return plots


def wandb_charts(curves: ThinnedCurves) -> dict[str, Any]:
    """Weights & Biases' line plots of the metrics that belong together, by key."""
    from wandb import plot

    charts = {}
    for _, title, lines in several_curves(curves.names):
        xs, ys = zip(*map(curves.points, lines), strict=True)
        charts[f"key_plots/{title}"] = plot.line_series(
            list(xs), list(ys), keys=list(lines.values()), title=title, xname="iteration"
        )
    return charts


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


WANDB_RUN = "wandb.sdk.wandb_run"
"""Module of a run's class in Weights & Biases."""
GROWTH = 1.1
"""Factor by which a run has become longer when its charts are sent again."""


class KeyPlots(Callback):
    """Gives TensorBoard and W&B plots of several curves, and a picture of the groups.

    TensorBoard gets a layout for its tab *Custom Scalars* when a metric is logged for the first time. Weights & Biases
    has no such layout in a run: it gets line plots of their own under `key_plots/`, each with at most 200 points a
    curve (means over iterations in longer runs). They are sent when a run has become a tenth longer, by at least
    `every_n_iterations`, and at its end: it sends a small multiple of its last charts, not each point again and again.
    The picture shows each prompt's rollouts against its success rate.

    Args:
        every_n_iterations: RL iterations from one picture to the next; drawing one takes about 0.1 s.

    Raises:
        UserError: If `every_n_iterations` is below 1.
    """

    def __init__(self, every_n_iterations: int = 50) -> None:
        if every_n_iterations < 1:
            raise UserError(f"KeyPlots.every_n_iterations must be at least 1, got {every_n_iterations}")
        self.every_n_iterations = every_n_iterations
        self.curves = ThinnedCurves()
        self._names: set[str] = set()
        self._last = 0
        """Iterations that had finished when a metric was last taken in."""
        self._sent = 0
        """Iterations that had finished when the charts were last sent."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the layout if there are new metrics, the charts and the picture if they are due."""
        logged = trainer.callback_metrics  # on every rank: it may reduce metrics
        if not trainer.is_global_zero:
            return
        record = outputs["record"]
        iteration = record.batch.iteration
        self._write_layout(trainer, set(map(str, logged)))
        if _wandb_loggers(trainer):
            self._last = iteration + 1
            drawn = {name for spec in LINE_PLOTS for name in spec.lines}
            self.curves.add(self._last, {name: float(logged[name]) for name in drawn & logged.keys()})
            if self._last >= max(self._sent + self.every_n_iterations, GROWTH * self._sent):
                self._send(trainer)
        if iteration % self.every_n_iterations == 0:
            threshold = getattr(getattr(trainer, "datamodule", None), "success_threshold", 0.5)
            self._draw(trainer, group_columns(record, threshold), iteration)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes in the validation's metrics."""
        logged = trainer.callback_metrics
        if trainer.is_global_zero and self._last and _wandb_loggers(trainer):
            values = {name: float(value) for name, value in logged.items() if name.startswith("val/")}
            self.curves.add(self._last, values)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sends the charts of the whole run."""
        self._send(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Sends the charts of what there is."""
        self._send(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far; nothing without W&B."""
        return {"curves": self.curves.state_dict(), "last": self._last, "sent": self._sent} if self._last else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on with the curves of a checkpoint."""
        if state_dict:
            self.curves.load_state_dict(state_dict["curves"])
            self._last, self._sent = state_dict["last"], state_dict["sent"]

    def _send(self, trainer: Trainer) -> None:
        if self._sent == self._last or not trainer.is_global_zero:
            return
        self._sent = self._last
        charts = wandb_charts(self.curves)
        for logger in _wandb_loggers(trainer) if charts else ():
            logger.log_metrics(charts, step=self._last - 1)

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


def _wandb_loggers(trainer: Trainer) -> list[Any]:
    """Loggers of Weights & Biases, found without importing it: it is no requirement."""
    return [logger for logger in trainer.loggers if type(getattr(logger, "experiment", None)).__module__ == WANDB_RUN]
