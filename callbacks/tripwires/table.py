"""All tripwires with their thresholds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

from dynamo_lightning.callbacks.tripwires import data, engine, policy, rewards
from dynamo_lightning.callbacks.tripwires.tripwire import Tripwire
from dynamo_lightning.errors import UserError

TRIPWIRES = (
    Tripwire("not_finite", policy.not_finite, threshold=1, recovery=0, level="error"),
    Tripwire("old_weights", engine.old_weights, threshold=5, recovery=2, level="error"),
    Tripwire("engine_mismatch", engine.engine_mismatch, threshold=0.03, recovery=0.015),
    Tripwire("ratio_tail", engine.ratio_tail, threshold=0.05, recovery=0.02),
    Tripwire("wrong_distribution", engine.wrong_distribution, threshold=0.05, recovery=0.02, level="error"),
    Tripwire("duplicates", engine.duplicates, threshold=0.1, recovery=0.05, level="error"),
    Tripwire("all_solved", rewards.all_solved, threshold=0.95, recovery=0.8),
    Tripwire("all_hopeless", rewards.all_hopeless, threshold=0.95, recovery=0.8),
    Tripwire("no_signal", rewards.no_signal, threshold=0.99, recovery=0.9),
    Tripwire("reward_failures", rewards.reward_failures, threshold=0.01, recovery=0.002),
    Tripwire("reward_follows_length", rewards.reward_follows_length, threshold=0.9, recovery=0.7),
    Tripwire("rewards_disagree", rewards.rewards_disagree, threshold=0.05, recovery=0.0),
    Tripwire("reward_falls", rewards.reward_falls, threshold=0.4, recovery=0.2),
    Tripwire("held_out_falls", rewards.held_out_falls, threshold=0.02, recovery=0.0),
    Tripwire("entropy_collapse", policy.entropy_collapse, threshold=0.1, recovery=0.2),
    Tripwire("entropy_explosion", policy.entropy_explosion, threshold=3, recovery=2),
    Tripwire("gradient_norm", policy.gradient_norm, threshold=10, recovery=3),
    Tripwire("length_limit", policy.length_limit, threshold=0.3, recovery=0.15),
    Tripwire("repeated_prompts", data.repeated_prompts, threshold=1, recovery=0, level="error"),
    Tripwire("skipped_prompts", data.skipped_prompts, threshold=1, recovery=0, level="error"),
    Tripwire("allocation_at_bounds", data.allocation_at_bounds, threshold=0.95, recovery=0.85),
)
NAMES = tuple(tripwire.name for tripwire in TRIPWIRES)


def chosen(leave_out: Collection[str], thresholds: Mapping[str, float]) -> tuple[Tripwire, ...]:
    """The tripwires but those left out, with other thresholds where some are given."""
    return tuple(
        tripwire.at(thresholds[tripwire.name]) if tripwire.name in thresholds else tripwire
        for tripwire in TRIPWIRES
        if tripwire.name not in leave_out
    )


def check_names(option: str, names: Collection[str]) -> None:
    """Refuse names that are no tripwire's.

    Raises:
        UserError: Naming the option, the name and the nearest ones.
    """
    for name in names:
        if name not in NAMES:
            near = get_close_matches(name, NAMES, n=1)
            meant = f", did you mean {near[0]}?" if near else "; they are " + ", ".join(NAMES)
            raise UserError(f"Tripwires.{option}: there is no tripwire {name!r}{meant}")
