"""Groups of rollouts: joined from what was planned, sampled and scored, and pilots with their commits as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dynamo_lightning.types import GroupPlan, Outcome, PromptBatch, Rollout, RolloutGroup


def make_groups(
    plans: Sequence[GroupPlan], rollouts: Sequence[Rollout], outcomes: Sequence[Outcome]
) -> tuple[RolloutGroup, ...]:
    """Join rollouts and outcomes to the groups they were planned in, on `(prompt_id, sample_index)`.

    Args:
        plans: The groups, `[num_groups]`; a prompt may have several, with different sample indices.
        rollouts: In any order.
        outcomes: In any order.
    """
    group_of = {key: group for group, plan in enumerate(plans) for key in plan.keys}
    own: list[list[Rollout]] = [[] for _ in plans]
    scored: list[list[Outcome]] = [[] for _ in plans]
    for rollout in rollouts:
        own[group_of[rollout.key]].append(rollout)
    for outcome in sorted(outcomes, key=lambda outcome: outcome.sample_index):
        scored[group_of[outcome.key]].append(outcome)
    return tuple(RolloutGroup(plan, tuple(own[i]), tuple(scored[i])) for i, plan in enumerate(plans))


def whole_batch(iteration: int, plans: Sequence[GroupPlan]) -> PromptBatch:
    """The batch of an iteration's groups, a pilot and a commit group of one prompt taken as one."""
    whole: dict[int, GroupPlan] = {}
    for plan in plans:
        first = whole.setdefault(plan.prompt.prompt_id, replace(plan, share=1.0))
        if first.first_sample_index != plan.first_sample_index:
            whole[plan.prompt.prompt_id] = replace(first, size=first.size + plan.size)
    return PromptBatch(iteration, tuple(whole.values()))
