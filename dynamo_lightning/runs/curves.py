"""The picture of a run's curves, `curves.png`.

Matplotlib is imported where it is needed: it would make every start of the command line wait.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynamo_lightning.files import write_atomically
from dynamo_lightning.runs.summary import is_headline

PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("mean reward", {"reward": ""}),
    ("policy entropy (nats)", {"entropy": ""}),
    ("gradient norm before clipping", {"grad_norm": ""}),
    (
        "gradient variance relative to equal groups",
        {
            "alloc/predicted_variance_ratio": "predicted",
            "alloc/realised_variance_ratio": "realised",
            "alloc/best_variance_ratio": "best possible",
        },
    ),
    ("rollouts per prompt", {"alloc/n_max": "largest", "alloc/n_mean": "mean", "alloc/n_min": "smallest"}),
    ("advantage factor", {"mod/beta_comp_mean": "compensation", "mod/beta_stab_mean": "stabilisation"}),
    ("mean response length (tokens)", {"completions/mean_length": ""}),
)
"""Pictures in `curves.png` beside the validation metrics: axis label, and legend by metric name."""


def draw_curves(
    path: Path,
    iterations: Sequence[int],
    history: Mapping[str, Sequence[float]],
    validations: Sequence[tuple[int, Mapping[str, float]]],
) -> None:
    """Draws a run's curves as small multiples into one PNG; a picture without any data is left out.

    Noisy curves are drawn faint, with their mean over the last twentieth of the run on top.

    Args:
        path: The PNG.
        iterations: RL iterations finished after each point, `[num_iterations]`.
        history: Values by metric name, each `[num_iterations]`, NaN where there was none.
        validations: For each validation, the iterations finished before it and its metrics by name.
    """
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot: needs no display and keeps no global state

    panels = [(label, {name: text for name, text in lines.items() if name in history}) for label, lines in PANELS]
    panels = [(label, lines) for label, lines in panels if lines]
    scores = sorted({name for _, metrics in validations for name in metrics if is_headline(name)})
    panels[1:1] = [("validation", {name: name.removeprefix("val/") for name in scores})] if scores else []
    if not panels:
        return

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    window = max(1, len(iterations) // 20)
    for axis, (label, lines) in zip(axes, panels, strict=False):
        for index, (name, text) in enumerate(lines.items()):
            color = f"C{index}"
            if name in scores:
                points = [(iteration, metrics[name]) for iteration, metrics in validations if name in metrics]
                axis.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=text)
                ends = [(i, m[f"{name}_low"], m[f"{name}_high"]) for i, m in validations if f"{name}_low" in m]
                if ends:
                    axis.fill_between(*zip(*ends, strict=True), color=color, alpha=0.12, linewidth=0)
                continue
            values = np.asarray(history[name], dtype=float)
            steady = window == 1 or name in ("alloc/n_min", "alloc/n_max", "alloc/n_mean")
            axis.plot(
                iterations, values, color=color, alpha=1 if steady else 0.3, linewidth=1, label=text if steady else None
            )
            if not steady:
                kept = np.isfinite(values)
                sums = np.cumsum(np.pad(np.where(kept, values, 0), (window, 0)))
                counts = np.cumsum(np.pad(kept, (window, 0)))
                total, count = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
                means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
                axis.plot(iterations, means, color=color, linewidth=1.8, label=text)
        if "alloc/predicted_variance_ratio" in lines:
            axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("RL iteration", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if any(lines.values()):
            axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())
