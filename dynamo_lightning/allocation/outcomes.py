"""Outcomes of a batch by prompt."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_lightning.types import Outcome, PromptBatch


def group_rewards(batch: PromptBatch, outcomes: Sequence[Outcome]) -> list[list[float]]:
    """Rewards of each prompt's rollouts, joined by prompt id: a list for each of the batch's prompts."""
    groups: dict[int, list[float]] = {prompt.prompt_id: [] for prompt in batch.prompts}
    for outcome in outcomes:
        groups[outcome.prompt_id].append(outcome.score.reward)
    return list(groups.values())
