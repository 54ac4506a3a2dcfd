"""Dynamic sampling: further prompts until enough groups have non-zero advantages (DAPO, arXiv 2503.14476).

A group whose responses are all correct or all incorrect has no gradient; DAPO samples other prompts in its place, so
that every update trains on equally many groups. Unlike its code, which stops the run when it has tried often enough, an
iteration continues here with the groups that it has found. Wasted rollouts are not hidden: the statistics of
prompts see every outcome, and throughput counts every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_lightning.errors import UserError
from dynamo_lightning.types import GroupPlan, Outcome, PromptBatch


@dataclass
class DynamicSamplingConfig:
    """Options of the search for groups with non-zero advantages."""

    max_rounds: int = 10
    """Times that prompts are sampled in one iteration at most, the first time included."""
    component: str | None = None
    """Name of the reward that must differ within a group, such as `math`; `null` is the total, which shaping makes
    differ between responses that are all correct."""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.max_rounds < 1:
            raise UserError(f"model.dynamic_sampling.max_rounds must be at least 1, got {self.max_rounds}")


class DynamicSampling:
    """The groups of one iteration that are kept, and the number still missing; the same on every rank.

    Args:
        num_prompts: Groups to find: the prompts of the iteration's own batch.
        config: When to stop.
    """

    def __init__(self, num_prompts: int, config: DynamicSamplingConfig) -> None:
        self.num_prompts = num_prompts
        self.config = config
        self.num_rounds = 0
        """Rounds so far."""
        self.num_sampled = 0
        """Prompts sampled so far."""
        self._first_round: tuple[int, ...] = ()
        self._found: list[int] = []

    def add(self, batch: PromptBatch, outcomes: Sequence[Outcome]) -> None:
        """Add a round.

        Args:
            batch: Its prompts: none that a round before had.
            outcomes: All their outcomes, of all ranks, in any order.
        """
        values: dict[int, set[float]] = {prompt.prompt_id: set() for prompt in batch.prompts}
        for outcome in outcomes:
            values[outcome.prompt_id].add(self._value(outcome))
        if self.num_rounds == 0:
            self._first_round = tuple(values)
        self._found += [prompt_id for prompt_id, different in values.items() if len(different) > 1]
        self.num_rounds += 1
        self.num_sampled += len(batch.prompts)

    @property
    def num_missing(self) -> int:
        """Number of prompts to sample next: one for each missing group; 0 after `max_rounds`."""
        if self.num_rounds >= self.config.max_rounds:
            return 0
        return max(0, self.num_prompts - len(self._found))

    @property
    def kept(self) -> tuple[int, ...]:
        """Prompt ids of the groups to train on, in the order they were sampled.

        If no group has a non-zero advantage, those of the first round: an iteration without a gradient, but logged.
        """
        return tuple(self._found[: self.num_prompts]) or self._first_round

    def choose(self, plans: Sequence[GroupPlan]) -> list[GroupPlan]:
        """The groups of `kept` prompts, in that order.

        Args:
            plans: Groups of all prompts, one of each.
        """
        by_prompt = {plan.prompt.prompt_id: plan for plan in plans}
        return [by_prompt[prompt_id] for prompt_id in self.kept if prompt_id in by_prompt]

    def metrics(self) -> dict[str, float]:
        """Rounds, and the share of sampled prompts that is trained on."""
        return {
            "dynamic_sampling/rounds": float(self.num_rounds),
            "dynamic_sampling/frac_kept": len(self.kept) / self.num_sampled,
        }

    def _value(self, outcome: Outcome) -> float:
        """Value that must differ; a failed reward has no components, only its total."""
        if self.config.component is None or not outcome.score.components:
            return outcome.score.reward
        if self.config.component not in outcome.score.components:
            raise UserError(
                f"model.dynamic_sampling.component={self.config.component!r} is no reward of this run: "
                f"{sorted(outcome.score.components)}"
            )
        return outcome.score.components[self.config.component]
