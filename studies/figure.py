"""The figure of a study: validation curves over generated tokens, a panel for each learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.design import Study


def draw(study: Study, results: dict[tuple[str, float, int], dict[str, Any]], path: Path) -> None:
    """Write one thin line for each run; a run ends at the target.

    Args:
        study: Gives arms, rates and target.
        results: By arm, learning rate and seed.
        path: Its suffix is the format.
    """
    rates = sorted({rate for _, rate, _ in results})
    figure = Figure(figsize=(4 * max(len(rates), 1), 3.6), layout="constrained")
    axes = figure.subplots(1, max(len(rates), 1), sharey=True, squeeze=False)[0]
    for axis, rate in zip(axes, rates, strict=False):
        for number, arm in enumerate(study.arms):
            runs = [result for (name, its_rate, _), result in results.items() if (name, its_rate) == (arm.name, rate)]
            for position, result in enumerate(runs):
                curve = result["curve"]
                label = arm.name if position == 0 else None
                axis.plot(curve["tokens"], curve["value"], color=f"C{number}", linewidth=1, label=label)
        axis.axhline(study.target, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=f"learning rate {rate:.0e}", xlabel="generated tokens")
        axis.legend(fontsize=7)
    axes[0].set_ylabel(study.metric)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
