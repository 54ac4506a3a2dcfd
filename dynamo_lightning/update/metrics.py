"""Training metrics of one iteration from its global outcomes; names as in TRL where TRL has them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from dynamo_lightning.allocation.outcomes import group_rewards
from dynamo_lightning.types import Outcome, PromptBatch


def rollout_metrics(batch: PromptBatch, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Rewards and lengths.

    Args:
        batch: The global batch.
        outcomes: Its scored rollouts, at least one.

    Returns:
        `reward` (mean over rollouts), `reward_prompt_mean` (mean over prompts of their group's mean: comparable
        between runs whose group sizes differ), `reward_std` (mean standard deviation within groups),
        `frac_reward_zero_std` (groups without a learning signal), `rewards/{name}/{mean,std}` of each reward by itself,
        `completions/{mean,min,max}_length` in tokens, `completions/clipped_ratio` (cut off by the length limit).
    """
    rewards = [outcome.score.reward for outcome in outcomes]
    groups = [group for group in group_rewards(batch, outcomes) if group]
    lengths = [outcome.response_length for outcome in outcomes]
    metrics = {
        "reward": statistics.fmean(rewards),
        "reward_prompt_mean": statistics.fmean(statistics.fmean(group) for group in groups),
        "reward_std": statistics.fmean(statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups),
        "frac_reward_zero_std": statistics.fmean(max(group) == min(group) for group in groups),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": statistics.fmean(outcome.truncated for outcome in outcomes),
    }
    names = sorted({name for outcome in outcomes for name in outcome.score.components})
    for name in names:
        values = [o.score.components[name] for o in outcomes if name in o.score.components]
        metrics[f"rewards/{name}/mean"] = statistics.fmean(values)
        metrics[f"rewards/{name}/std"] = statistics.pstdev(values)
    return metrics


def allocation_metrics(batch: PromptBatch, min_rollouts: int, max_rollouts: int) -> dict[str, float]:
    """How the budget was allocated, and what was known beforehand."""
    sizes = batch.group_sizes
    return {
        "alloc/n_mean": statistics.fmean(sizes),
        "alloc/n_min": float(min(sizes)),
        "alloc/n_max": float(max(sizes)),
        "alloc/budget": float(sum(sizes)),
        "alloc/frac_at_min": statistics.fmean(size == min_rollouts for size in sizes),
        "alloc/frac_at_max": statistics.fmean(size == max_rollouts for size in sizes),
        "alloc/frac_unseen": statistics.fmean(plan.unseen for plan in batch.plans),
        "alloc/p_hat_mean": statistics.fmean(plan.success_rate for plan in batch.plans),
    }
