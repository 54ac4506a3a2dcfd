"""Measures of the policy and its update: entropy, gradient norm, lengths, numbers that are not finite."""

from __future__ import annotations

import math
from statistics import fmean, median

from dynamo_lightning.callbacks.tripwires.observation import History
from dynamo_lightning.callbacks.tripwires.tripwire import Measurement

SMALLEST_ENTROPY = 1e-3
"""Nats; a policy that begins with less is deterministic, and its relative changes say nothing."""
LOWER_RATE = "Lower the learning rate (optimizer.init_args.lr)"


def entropy_collapse(history: History) -> Measurement | None:
    """Entropy relative to that of the run's first iterations: without entropy all responses of a group are equal.

    A policy that solves a third of its groups is rightly certain: that is success, and `all_solved` watches it.
    """
    start = _first_entropy(history)
    now = history.last("entropy", 3)
    if start is None or not now:
        return None
    solved = history.last("frac_solved", min(10, len(history.recent)))
    is_success = bool(solved) and fmean(solved) >= 1 / 3
    return Measurement(
        1.0 if is_success else median(now) / start,
        f"entropy fell from {start:.3g} nats in the first iterations to {median(now):.3g}: soon the responses of a "
        f"group are all the same. {LOWER_RATE}, keep model.loss.modulation on, or use overlays/clip_higher.yaml or "
        "overlays/entropy_budget.yaml",
    )


def entropy_explosion(history: History) -> Measurement | None:
    """Entropy relative to that of the run's first iterations, if it is 0.3 nats higher: responses turn to noise."""
    start = _first_entropy(history)
    now = history.last("entropy", 3)
    if start is None or not now:
        return None
    is_noticeable = median(now) > start + 0.3
    return Measurement(
        median(now) / start if is_noticeable else 1.0,
        f"entropy rose from {start:.3g} nats in the first iterations to {median(now):.3g}: responses turn to noise. "
        f"{LOWER_RATE} or model.gradient_clip_val, or the weight of an entropy bonus if model.loss has one",
    )


def gradient_norm(history: History) -> Measurement | None:
    """Gradient norm relative to the median of the 20 iterations before; none is judged before there are 10."""
    norms = [o.gradient_norm for o in history.recent if math.isfinite(o.gradient_norm) and o.gradient_norm > 0]
    newest = history.newest.gradient_norm
    before = norms[:-1][-20:]
    if not math.isfinite(newest) or newest <= 0 or len(before) < 10:
        return None
    usual = median(before)
    return Measurement(
        newest / usual,
        f"the gradient norm was {newest:.3g}, {newest / usual:.0f} times the median of the last {len(before)} steps "
        f"({usual:.3g}). {LOWER_RATE}, or clip at a usual norm (model.gradient_clip_val); look at this iteration's "
        "rewards and responses if it comes back",
    )


def not_finite(history: History) -> Measurement | None:
    """Number of values among loss, rewards, entropy and gradient norm that are NaN or infinite."""
    count = history.newest.num_not_finite
    return Measurement(
        count,
        f"{count:.0f} of loss, reward, entropy and gradient norm are NaN or infinite: the policy is lost, or will be. "
        f"Go back to the last checkpoint, and use trainer.precision=bf16-mixed instead of 16-mixed. {LOWER_RATE}",
    )


def length_limit(history: History) -> Measurement | None:
    """Share of responses that the length limit ended: they are not scored for what they would have said."""
    truncated = history.last("frac_truncated", 10)
    if not truncated:
        return None
    return Measurement(
        fmean(truncated),
        f"{fmean(truncated):.0%} of the responses of the last 10 iterations were cut off at "
        "model.sampling.max_response_length. Raise it, end responses where they are done "
        "(model.sampling.stop_strings), or leave them out of the loss (model.loss.mask_truncated=true)",
    )


def _first_entropy(history: History) -> float | None:
    values = history.at_first("entropy")
    start = median(values) if len(values) == len(history.first) and values else 0.0
    return start if start >= SMALLEST_ENTROPY else None
