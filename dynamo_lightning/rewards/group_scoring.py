"""Rewards of whole groups over several processes: a group's rollouts are gathered before it is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dynamo_lightning.distributed import gather_objects, rank, stop_together, world_size
from dynamo_lightning.errors import RunError
from dynamo_lightning.rewards.scorer import RewardScorer
from dynamo_lightning.types import Key, Rollout, Score


def complete_groups(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The groups of all ranks' rollouts, the same on every rank: by prompt id, each by sample index."""
    # Log-probabilities are no part of a reward, and there are as many as tokens.
    light = gather_objects([replace(r, logprobs=r.logprobs[:0], token_statistics=None) for r in rollouts])
    groups: dict[int, list[Rollout]] = {}
    for rollout in sorted(light, key=lambda rollout: rollout.key):
        groups.setdefault(rollout.prompt.prompt_id, []).append(rollout)
    return list(groups.values())


def score_complete_groups(scorer: RewardScorer, rollouts: Sequence[Rollout]) -> list[Score]:
    """The scores of this rank's rollouts, each computed with its whole group; called on all ranks at once.

    Args:
        scorer: Scores the groups that fall to this rank.
        rollouts: Sampled on this rank, `[num_rollouts]`.

    Returns:
        `[num_rollouts]`.
    """
    own = complete_groups(rollouts)[rank() :: world_size()]
    scored: list[list[Score]] = []
    message = ""
    try:
        scored = scorer.score_groups(own)
    except RunError as error:  # raised on all ranks, which would wait for this one
        message = str(error)
    stop_together(message)
    pairs = [
        (rollout.key, score)
        for group, scores in zip(own, scored, strict=True)
        for rollout, score in zip(group, scores, strict=True)
    ]
    found: dict[Key, Score] = dict(gather_objects(pairs))
    return [found[rollout.key] for rollout in rollouts]
