"""Plots of one or several runs, as plotly draws them; a plot without any data is left out.

Colors are left to the page, which has a light and a dark theme: each trace has `meta`, its color's number and its role.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamo_lightning.runs.history import RunHistory
from dynamo_lightning.runs.plot_specs import LINE_PLOTS, LinePlot
from dynamo_lightning.runs.trends import end_in_words, rolling_mean, trend_in_words

MAX_POINTS = 1500
"""Points of a curve; longer runs are drawn as means of several iterations."""
Trace = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """One plot of the page."""

    name: str
    """Identifier of its element."""
    section: str
    title: str
    """Sentence that says what one sees, with numbers."""
    caption: str
    """Sentence that says what is drawn."""
    traces: Sequence[Trace]
    y_title: str
    x_title: str = "RL iteration"
    layout: Mapping[str, Any] | None = None
    """Further options of plotly's layout."""


def line_plot(spec: LinePlot, runs: Sequence[RunHistory]) -> Plot | None:
    """The plot of some metrics over iterations; `None` if no run has any of them.

    Args:
        spec: What it shows.
        runs: One or several; each has its color, and each metric its dash, or with one run each metric a color.
    """
    traces: list[Trace] = []
    for position, run in enumerate(runs):
        shown = [name for name in spec.lines if run.has(name)]
        for number, name in enumerate(shown):
            color = number if len(runs) == 1 else position
            legend = _legend(spec.lines[name], run, len(runs), len(shown))
            traces += _curve(run, name, legend, color, dash=0 if len(runs) == 1 else number, smooth=spec.smooth,
                             logarithmic=spec.logarithmic)  # fmt: skip
        if spec.name == "entropy":
            traces += _spikes(run, position)
    if not traces:
        return None
    values = [value for trace in traces for value in trace["y"] if value is not None]
    if spec.only_if_not_zero and not any(values):
        return None
    main = next(name for name in spec.lines if any(run.has(name) for run in runs))
    title = trend_in_words(spec.subject, runs[0], main, spec.lines[main] if len(spec.lines) > 1 else "")
    if len(runs) > 1:
        title = end_in_words(spec.subject, runs, main, spec.lines[main] if len(spec.lines) > 1 else "")
    layout: dict[str, Any] = {"yaxis": {"type": "log"}} if spec.logarithmic else {}
    if spec.reference is not None:
        level = {"xref": "paper", "x0": 0, "x1": 1, "y0": spec.reference, "y1": spec.reference}
        layout["shapes"] = [{"type": "line", "line": {"dash": "dot", "width": 1}, **level}]
    return Plot(spec.name, spec.section, title, spec.caption, traces, spec.y_title, layout=layout)


def validation_plot(runs: Sequence[RunHistory]) -> list[Plot]:
    """A plot of each validation metric with its 95 % intervals, all runs in one."""
    plots: list[Plot] = []
    for name in sorted({name for run in runs for name in run.validations}):
        traces: list[Trace] = []
        ends: list[str] = []
        for position, run in enumerate(runs):
            points = run.validations.get(name, ())
            if not points:
                continue
            x = [point.iteration for point in points]
            if all(point.low is not None and point.high is not None for point in points):
                outline = [*(point.high for point in points), *(point.low for point in reversed(points))]
                traces.append(
                    {"type": "scatter", "x": x + x[::-1], "y": _plain(outline), "fill": "toself", "mode": "none",
                     "hoverinfo": "skip", "showlegend": False, "meta": {"color": position, "role": "band"},
                     "name": f"95 % interval {run.label}".strip()}
                )  # fmt: skip
            traces.append(
                {"type": "scatter", "x": x, "y": _plain([p.value for p in points]), "mode": "lines+markers",
                 "name": run.label if len(runs) > 1 else name, "meta": {"color": position, "role": "line"}}
            )  # fmt: skip
            first, last = points[0], points[-1]
            prefix = f"{run.label} " if len(runs) > 1 else ""
            ends.append(
                f"{prefix}{first.value:.3f} → {last.value:.3f}" if len(points) > 1 else f"{prefix}{last.value:.3f}"
            )
        plots.append(
            Plot(
                f"validation-{len(plots)}", "Results", f"{name}: {', '.join(ends)}",
                f"Validation {name} with 95 % intervals over problems.", traces, name,
            )
        )  # fmt: skip
    return plots


def phase_plot(runs: Sequence[RunHistory]) -> Plot | None:
    """Seconds of each phase of an iteration, stacked; for several runs their means side by side."""
    names = sorted({name for run in runs for name in run.metrics if name.startswith("timing_s/") and run.has(name)})
    if not names:
        return None
    means = {run.label: {name: float(np.nanmean(run.metrics[name])) for name in names if run.has(name)} for run in runs}
    ends = []
    for run in runs:
        total = sum(means[run.label].values())
        slowest = max(means[run.label], key=lambda name: means[run.label][name], default="")
        if slowest and total:
            share = f"{slowest.removeprefix('timing_s/')} {means[run.label][slowest] / total:.0%}"
            ends.append(f"{run.label}: {share}" if len(runs) > 1 else share)
    title = f"Time of an iteration: mostly {', '.join(ends)}" if ends else "Time of an iteration"
    if len(runs) == 1:
        run = runs[0]
        traces = [
            {"type": "scatter", "mode": "lines", "stackgroup": "phases", "name": name.removeprefix("timing_s/"),
             **_points(run, [0.0 if math.isnan(v) else v for v in run.metrics[name]]),
             "meta": {"color": number, "role": "area"}}
            for number, name in enumerate(names)
        ]  # fmt: skip
        return Plot("phases", "Cost", title, "Seconds of each phase of an iteration, stacked.", traces, "seconds")
    traces = [
        {"type": "bar", "name": name.removeprefix("timing_s/"), "x": [run.label for run in runs],
         "y": _plain([means[run.label].get(name, math.nan) for run in runs]), "meta": {"color": number, "role": "bar"}}
        for number, name in enumerate(names)
    ]  # fmt: skip
    caption = "Mean seconds of each phase of an iteration, stacked."
    return Plot("phases", "Cost", title, caption, traces, "seconds", "run", layout={"barmode": "stack"})


def plots_of(runs: Sequence[RunHistory]) -> list[Plot]:
    """All plots of the runs that have data, in the order of the page."""
    found = [line_plot(spec, runs) for spec in (*LINE_PLOTS, *_reward_plot(runs))]
    if any(plot is not None and plot.name == "shares" for plot in found):  # the same, told apart
        found = [plot for plot in found if plot is None or plot.name != "no-signal"]
    plots = [*validation_plot(runs), *(plot for plot in found if plot is not None)]
    phases = phase_plot(runs)
    if phases is not None:
        plots.append(phases)
    order = ["Results", "Stability", "Allocation", "Modulation", "Responses", "Cost"]
    return sorted(plots, key=lambda plot: order.index(plot.section))


def _reward_plot(runs: Sequence[RunHistory]) -> list[LinePlot]:
    """The plot of each named reward by itself, if there are several."""
    names = {match[1] for run in runs for name in run.metrics if (match := re.fullmatch(r"rewards/(.+)/mean", name))}
    if len(names) < 2:
        return []
    caption = "Mean of each named reward by itself, unweighted; rewards that part ways measure different things."
    lines = {f"rewards/{name}/mean": name for name in sorted(names)}
    return [LinePlot("rewards", "Results", "Rewards by name", caption, "mean reward", lines)]


def _legend(line: str, run: RunHistory, num_runs: int, num_lines: int) -> str:
    if num_runs == 1:
        return line
    return run.label if num_lines == 1 else f"{run.label} {line}"


def _curve(
    run: RunHistory, name: str, legend: str, color: int, *, dash: int, smooth: bool, logarithmic: bool
) -> list[Trace]:
    values = np.asarray(run.metrics[name], dtype=float)
    if logarithmic:
        values = np.where(values > 0, values, math.nan)
        if not np.isfinite(values).any():
            return []
    base = {"type": "scatter", "mode": "lines" if len(values) > 1 else "markers", "name": legend}
    window = max(1, len(values) // 20)
    if not smooth or window == 1:
        return [base | _points(run, values) | {"meta": {"color": color, "dash": dash, "role": "line"}}]
    mean = np.exp(rolling_mean(np.log(values), window)) if logarithmic else rolling_mean(values, window)
    return [
        base | _points(run, values) | {"meta": {"color": color, "dash": dash, "role": "faint"}, "showlegend": False},
        base | _points(run, mean) | {"meta": {"color": color, "dash": dash, "role": "line"}},
    ]


def _spikes(run: RunHistory, color: int) -> list[Trace]:
    """Crosses at the iterations at which the number of entropy spikes rose."""
    counts, entropy = run.metrics.get("stability/entropy_spikes"), run.metrics.get("entropy")
    if counts is None or entropy is None:
        return []
    rises = [i for i in range(len(counts)) if counts[i] > (counts[i - 1] if i else 0.0) and math.isfinite(entropy[i])]
    if not rises:
        return []
    name = f"{len(rises)} spike{'s' * (len(rises) > 1)} {run.label}".strip()
    return [
        {"type": "scatter", "mode": "markers", "name": name,
         "x": [run.iterations[i] for i in rises], "y": _plain([entropy[i] for i in rises]),
         "meta": {"color": color, "role": "cross"}}
    ]  # fmt: skip


def _points(run: RunHistory, values: Sequence[float] | np.ndarray) -> Trace:
    """X and y of a curve; of long ones means of several iterations."""
    number = np.asarray(values, dtype=float)
    step = math.ceil(len(number) / MAX_POINTS)
    if step <= 1:
        return {"x": list(run.iterations), "y": _plain(number)}
    padded = np.pad(number, (0, -len(number) % step), constant_values=math.nan).reshape(-1, step)
    known = np.isfinite(padded)
    means = np.where(known, padded, 0).sum(1) / np.maximum(known.sum(1), 1)
    return {"x": list(run.iterations)[::step], "y": _plain(np.where(known.any(1), means, math.nan))}


def _plain(values: Sequence[Any] | np.ndarray) -> list[float | None]:
    """Numbers to five digits, none where there is no number."""
    return [float(f"{v:.5g}") if v is not None and math.isfinite(v) else None for v in values]
