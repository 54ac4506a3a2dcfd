"""Sentences on the numbers of one or several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_lightning.runs.comparison import Comparison, arms_of, compare_arms
from dynamo_lightning.runs.history import RunHistory
from dynamo_lightning.runs.summary import is_headline

SIGNIFICANT = 0.05
"""Largest adjusted p-value that is called a difference."""
_OF_EACH_RUN = ("name", "ckpt_path", "trainer.logger.", "trainer.default_root_dir")
"""Options that say where a run is written, not what it does."""


def comparisons_of(runs: Sequence[RunHistory]) -> list[Comparison]:
    """Paired differences of the last validations, each arm against the first; empty if runs have no counts."""
    summaries = {run.folder: run.summary for run in runs if run.summary is not None}
    if len(summaries) < len(runs):
        return []
    arms = arms_of(summaries)
    names = {name for run in summaries.values() for x in ("before", "after") for name in run[x] or {}}
    return compare_arms(arms, sorted(filter(is_headline, names)))


def verdict(comparison: Comparison) -> str:
    """A paired difference in a sentence: which is better and by how much, or that the data does not show it."""
    result = comparison.result
    later, first = comparison.arms.split(" − ")
    p_value = comparison.adjusted_p_value
    # Both must agree: an interval that contains 0 shows nothing, whatever the test says.
    if p_value > SIGNIFICANT or result.low <= 0 <= result.high:
        return (
            f"The data does not show whether {later} or {first} is better at {comparison.metric}: the difference "
            f"{result.difference:+.3f} has the 95 % interval {result.low:+.3f} to {result.high:+.3f} over "
            f"{result.num_problems} problems (p = {p_value:.2g}, adjusted)."
        )
    better, worse = (later, first) if result.difference > 0 else (first, later)
    low, high = sorted((abs(result.low), abs(result.high)))
    return (
        f"{better} is better than {worse} at {comparison.metric} by {abs(result.difference):.3f}, 95 % interval "
        f"{low:.3f} to {high:.3f} over {result.num_problems} problems (p = {p_value:.2g}, adjusted)."
    )


def differing_options(runs: Sequence[RunHistory]) -> list[tuple[str, list[str]]]:
    """Options of the configs that are not the same in all runs, each with its value in every run, `–` where unset."""
    options: list[Mapping[str, str]] = [run.options for run in runs]
    names = sorted({name for of_run in options for name in of_run})
    rows = [(name, [of_run.get(name, "–") for of_run in options]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1 and not name.startswith(_OF_EACH_RUN)]


def left_out(runs: Sequence[RunHistory]) -> list[str]:
    """Sentences about what a page does not show, for files that are missing or torn, and for what never happened."""
    several = len(runs) > 1
    sentences = [f"{run.label}: {reason}." if several else f"{reason}." for run in runs for reason in run.unreadable]
    quiet = {
        "completions/clipped_ratio": "No response was cut off by the length limit.",
        "clip_ratio/region_mean": "No importance ratio was clipped.",
        "rewards/frac_timeout": "No reward timed out.",
        "rewards/frac_crash": "No reward crashed.",
    }
    for name, sentence in quiet.items():
        values: list[Any] = [value for run in runs for value in run.metrics.get(name, ())]
        if values and not any(value > 0 for value in values):
            sentences.append(sentence)
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]
