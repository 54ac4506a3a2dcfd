"""Rollouts of each prompt against its success rate, one picture for each iteration, for a slider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_lightning.runs.history import RunHistory

MAX_FRAMES = 60
MAX_GROUPS = 400
"""Groups in a picture."""


def group_frames(run: RunHistory, kept: Mapping[int, set[str]]) -> list[dict[str, Any]]:
    """Pictures of a run, by iteration.

    Args:
        run: The run; without `groups.jsonl` it has none.
        kept: By iteration the prompt ids, as text, whose responses the page has; they are among the groups shown.

    Returns:
        For each picture `iteration`, `prompt_ids` as text, `expected` (success rate expected before the rollouts),
        `observed` (of the rollouts), `sizes`, `num_groups` (with those that are not shown).
    """
    rows = {int(row["iteration"]): row for row in run.groups}
    frames = []
    for iteration in _spread(sorted(rows), sorted(rows.keys() & kept.keys())):
        row = rows[iteration]
        prompt_ids = [str(prompt_id) for prompt_id in row["prompt_ids"]]
        with_responses = kept.get(iteration, set())
        # those with responses first; a stable sort keeps the batch's random order of the others
        order = sorted(range(len(prompt_ids)), key=lambda i: prompt_ids[i] not in with_responses)[:MAX_GROUPS]
        frames.append(
            {
                "iteration": iteration,
                "prompt_ids": [prompt_ids[i] for i in order],
                "expected": [row["expected"][i] for i in order],
                "observed": [round(row["successes"][i] / max(row["sizes"][i], 1), 4) for i in order],
                "sizes": [row["sizes"][i] for i in order],
                "num_groups": len(prompt_ids),
            }
        )
    return frames


def _spread(iterations: Sequence[int], preferred: Sequence[int]) -> list[int]:
    """At most `MAX_FRAMES` iterations over the whole run, with the first and last, preferred ones before others."""

    def evenly(values: Sequence[int], number: int) -> set[int]:
        if len(values) <= number:
            return set(values)
        return {values[round(i * (len(values) - 1) / (number - 1))] for i in range(number)}

    chosen = evenly(preferred, MAX_FRAMES // 2)
    return sorted(chosen | evenly(iterations, MAX_FRAMES - len(chosen)))
