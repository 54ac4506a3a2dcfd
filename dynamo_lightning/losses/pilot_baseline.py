"""The baseline of a pilot's rollouts under score-weighted baselines: all that may be used of the commit and of history.

The pilot decides the commit's size m. Its gradient stays unbiased as long as the baseline's mean, once the pilot is
known, does not depend on m: then `E[b Σ_pilot s] = E[b | pilot] E[Σ s] = 0`. A weighted mean over the whole commit is a
ratio whose mean depends on m; so does a prior that counts against m. Allowed are the plain mean of all commit rewards,
any function of a *fixed* number of commit rollouts, and what was known before, each in a share that is fixed before.

Weighting L rollouts, the commit's least, in place of all m gives up (m − L)/m of the commit, which costs more than the
weights give. Hence the plain mean of all is kept, and those L only say how far the weighted mean is from the plain one:

    b = α μ + (1 − α) (r̄ + r̃_L − r̄_L),   α = ν/(ν + m̄)

with μ the prior's mean and ν the rollouts it counts as (history), r̄ the plain mean of all commit rewards, r̃_L and r̄_L
the weighted and the plain mean of the first L of them, and m̄ the mean commit size of the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_lightning.losses.advantages import group_sums, weighted_leave_one_out


def pilot_baselines(
    rewards: Tensor,
    weights: Tensor,
    prompts: Tensor,
    is_pilot: Tensor,
    is_certain: Tensor,
    commit_mean: float,
    prior_means: Tensor | None = None,
    prior_rollouts: Tensor | None = None,
) -> Tensor:
    """Baselines b of pilot rollouts, see above.

    Where the first L rollouts are all dropped, or weigh nothing, their correction is 0. Where the whole commit is, the
    prior's mean is the baseline, and without a prior the mean of the other pilot rollouts.

    Args:
        rewards: `[num_rollouts]`, float64.
        weights: w, not negative, `[num_rollouts]`, float64.
        prompts: Number of each rollout's prompt, `[num_rollouts]`, int64.
        is_pilot: `[num_rollouts]`, bool.
        is_certain: The first L rollouts of each commit, L being the same whatever the pilot shows, `[num_rollouts]`,
            bool.
        commit_mean: m̄, fixed before the pilot.
        prior_means: μ of each rollout's prompt, known before the pilot, `[num_rollouts]`, float64.
        prior_rollouts: ν, likewise, at least 0.

    Returns:
        `[num_rollouts]`, float64; meaningless at commit rollouts.
    """
    num_prompts = int(prompts.max()) + 1 if len(prompts) else 0
    commit, certain = (~is_pilot).to(rewards.dtype), is_certain.to(rewards.dtype)

    def total(values: Tensor) -> Tensor:
        return group_sums(values, prompts, num_prompts)[prompts]

    def mean(of: Tensor) -> tuple[Tensor, Tensor]:
        weight = total(of)
        return total(of * rewards) / torch.where(weight > 0, weight, 1.0), weight > 0

    (plain, has_commit), (plain_first, _) = mean(commit), mean(certain)
    weighted_first, has_weight = mean(certain * weights)
    baselines = plain + torch.where(has_weight, weighted_first - plain_first, 0.0)
    # Within each part, so that the pilot's rollouts have each other where there is nothing else.
    alone = weighted_leave_one_out(rewards, torch.ones_like(rewards), 2 * prompts + is_pilot.long(), 2 * num_prompts)
    baselines = torch.where(has_commit, baselines, alone)
    if prior_means is None or prior_rollouts is None:
        return baselines
    counted = torch.where(has_commit, commit_mean, 0.0)
    share = prior_rollouts / torch.where(prior_rollouts + counted > 0, prior_rollouts + counted, 1.0)
    return share * prior_means + (1 - share) * baselines
