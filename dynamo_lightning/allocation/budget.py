"""The rollout budget: how many rollouts a batch gets and how they may be spent."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamo_lightning.allocation.allocate import Cost
from dynamo_lightning.allocation.rules import AllocationRule, RLOORule
from dynamo_lightning.types import PilotBaseline


@dataclass(frozen=True)
class RolloutBudget:
    """The budget of every batch and its bounds; option names are those of the data module.

    Example:
        `RolloutBudget(16, min_rollouts=4, max_rollouts=48).of(num_prompts=64)` is 1,024 rollouts.
    """

    rollouts_per_prompt: int
    """Mean group size."""
    min_rollouts: int
    """Smallest group size, pilot and commit together."""
    max_rollouts: int
    """Largest group size, pilot and commit together."""
    rule: AllocationRule = field(default_factory=RLOORule)
    """Objective that the group sizes minimize."""
    cost: Cost = "rollouts"
    """Unit of the budget."""
    pilot: int = 0
    """Rollouts that every prompt gets before the rest is allocated; 0 allocates all at once."""
    pilot_baseline: PilotBaseline = "separate"
    """Rollouts that the baselines of pilot and commit are made of."""
    accept_skip_bias: bool = False
    """A rule that promises an unbiased gradient may skip prompts all the same."""

    def of(self, num_prompts: int) -> int:
        """Rollouts of a batch of so many prompts, a pilot's included."""
        return self.rollouts_per_prompt * num_prompts
