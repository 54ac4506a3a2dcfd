"""Measures of the prompts and of their allocation."""

from __future__ import annotations

import math
from statistics import fmean

from dynamo_lightning.callbacks.tripwires.observation import History
from dynamo_lightning.callbacks.tripwires.tripwire import Measurement

LOST_PLACE = (
    "the stream does not go on where the checkpoint or the last iteration left it. Resume with the options of the run "
    "(data.train, data.prompts_per_batch), and keep the position in the state of a data module of your own"
)


def repeated_prompts(history: History) -> Measurement | None:
    """Prompts that come again before the pass over the data is over, as after a resume that lost its place."""
    count = history.newest.num_repeated
    if not math.isfinite(count):
        return None
    return Measurement(
        count,
        f"{count:.0f} prompts of this batch were trained on before in this pass: {LOST_PLACE}",
    )


def skipped_prompts(history: History) -> Measurement | None:
    """Prompts that are left out between one iteration and the next."""
    count = history.newest.num_skipped
    if not math.isfinite(count):
        return None
    return Measurement(
        count,
        f"{count:.0f} prompts were skipped before this batch: {LOST_PLACE}",
    )


def allocation_at_bounds(history: History) -> Measurement | None:
    """Share of prompts whose group has the smallest or the largest allowed size: bounds decide, not variances."""
    smallest, largest = history.last("frac_at_min", 10), history.last("frac_at_max", 10)
    if not smallest or not largest:
        return None
    share = fmean(smallest) + fmean(largest)
    return Measurement(
        share,
        f"in the last 10 iterations {fmean(smallest):.0%} of the groups had data.min_rollouts and {fmean(largest):.0%} "
        "data.max_rollouts: the bounds decide on the group sizes, not the expected variances. Lower data.min_rollouts, "
        "raise data.max_rollouts, or choose prompts of more similar difficulty (data.train)",
    )
