"""The baseline of least gradient variance: rewards weighted by squared score norms, with earlier rewards as a prior.

The variance of `(r − b) s` with score `s = ∇ log π(rollout)` is least for `b* = E[‖s‖² r] / E[‖s‖²]` (Greensmith,
Bartlett and Baxter, 2004, JMLR 5), not for the mean reward. ‖s‖² of a whole policy takes a backward pass for every
rollout. Its place takes `w = Σ_t ‖∇_z log π(a_t)‖² = Σ_t (1 − 2π(a_t) + Σ_k π_k²)`, the squared gradient by the logits,
which the forward pass over the rollouts gives with the log-probabilities.

Departures from verl's optimal token baseline, which sums over the whole group: the rollout itself is left out, so that
the gradient stays unbiased whatever the weights are, although they depend on the sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.advantages import (
    Advantage,
    cross_leave_one_out,
    has_equal_rewards,
    prompt_indices,
    weighted_leave_one_out,
)
from dynamo_lightning.losses.baseline_history import BaselineHistory
from dynamo_lightning.losses.pilot_baseline import pilot_baselines
from dynamo_lightning.losses.weights import Aggregation, LengthNormalisation
from dynamo_lightning.types import GroupedRewards


def rollout_score_norms(
    squared_gradients: Tensor,
    token_rollouts: Tensor,
    response_lengths: Tensor,
    aggregation: Aggregation,
    length_normalisation: LengthNormalisation,
) -> Tensor:
    """Squared score norm w of each rollout, up to a factor that all share, `[num_rollouts]`, float64.

    `Σ_t q_t`, and `Σ_t q_t / T²` where a rollout's token sum is divided by its own length T.

    Args:
        squared_gradients: `q = ‖∇_z log π(a)‖²` of each token, `[num_tokens]`.
        token_rollouts: Rollout of each token, `[num_tokens]`, int64.
        response_lengths: T, `[num_rollouts]`, int64.
        aggregation: How the loss weighs rollouts; under `token_mean` no length is divided by.
        length_normalisation: How a rollout's weight is spread over its tokens.
    """
    norms = torch.zeros(len(response_lengths), dtype=torch.float64, device=squared_gradients.device)
    norms.index_add_(0, token_rollouts.to(norms.device), squared_gradients.double())
    if aggregation != "token_mean" and length_normalisation == "response_length":
        norms = norms / response_lengths.to(norms.device).double().square()
    return norms


class OptimalBaseline(Advantage):
    """`A_i = r_i − b_i` with `b_i = (Σ_{j≠i} w_j r_j + v m) / (Σ_{j≠i} w_j + v)` over the group.

    The prior's mean m and weight v come from earlier iterations, see `BaselineHistory`: the prompt's own rewards and
    those of all prompts. Both are known before the rollouts, so the gradient is unbiased with and without them.

    Without a prior (`half_life: null`, or nothing seen yet) groups behave as under `RLOO`: a group whose rewards are
    all equal gets exactly 0, a group of one too. Where the others' weights add up to 0 (all their tokens had
    probability 1) their plain mean is the baseline.

    With a prior **every** rollout has a signal, in groups of one and of equal rewards too: a prompt that was always
    answered wrong before and is wrong again has an advantage near 0, one that is suddenly right a large one. Nothing
    is skipped in the updates then, which costs a forward and a backward pass for each rollout of such groups. Group
    sizes down to 1 are allowed (`data.rule: OptimalBaselineRule` with `baseline: history`, `data.min_rollouts: 1`).

    With a pilot whose baselines are shared (`data.pilot_baseline: cross`) commit rollouts are compared with every other
    rollout and the prior, weighted; pilot rollouts with what their gradient stays unbiased with, see `pilot_baseline`.

    Weights are taken before modulation: the baseline is that of the raw policy gradient.

    Args:
        half_life: RL iterations after which an earlier reward counts half; `null` remembers nothing.
        population_rollouts: Rollouts that the rewards of all prompts count as in the prior of one; 0 uses the prompt's
            own rewards alone. Without effect if `half_life` is `null`.

    Raises:
        UserError: If `half_life` is not positive, or `population_rollouts` negative or not finite.
    """

    needs_score_norms = True
    is_unbiased = True

    def __init__(self, half_life: float | None = None, population_rollouts: float = 4.0) -> None:
        if half_life is not None and not half_life > 0:
            raise UserError(
                f"model.loss.advantage.half_life={half_life} must be a positive number of RL iterations, or null"
            )
        if not (population_rollouts >= 0 and math.isfinite(population_rollouts)):
            raise UserError(
                f"model.loss.advantage.population_rollouts={population_rollouts} must be a finite number of rollouts, "
                "at least 0"
            )
        self.half_life = half_life
        self.population_rollouts = population_rollouts
        self.history = None if half_life is None else BaselineHistory(half_life, population_rollouts)
        self.equal_rewards_give_zero = self.history is None  # type: ignore[misc]

    @override
    def of(self, scored: GroupedRewards, score_norms: Tensor | None = None) -> Tensor:
        """Advantages; a call for a new iteration adds its rewards to the history afterwards."""
        assert score_norms is not None
        rewards, weights = scored.rewards.double(), score_norms.double().cpu()
        means, strengths, counts = None, None, None
        if self.history is not None:
            means, strengths = self.history.prior(scored.prompt_ids, scored.iteration)
            counts = self.history.prior_rollouts(scored.prompt_ids, scored.iteration)
        if scored.is_pilot is None:
            groups, num_groups = scored.group_indices, _count(scored.group_indices)
            baselines = weighted_leave_one_out(rewards, weights, groups, num_groups, means, strengths)
        else:
            groups = prompt_indices(scored.prompt_ids)
            num_groups = _count(groups)
            baselines = cross_leave_one_out(rewards, groups, scored.is_pilot, weights, means, strengths)
            if scored.is_certain is not None:
                of_pilot = pilot_baselines(
                    rewards, weights, groups, scored.is_pilot, scored.is_certain, scored.commit_mean, means, counts
                )
                baselines = torch.where(scored.is_pilot, of_pilot, baselines)
        without_prior = torch.ones_like(groups, dtype=torch.bool) if strengths is None else strengths == 0
        equal = has_equal_rewards(rewards, groups, num_groups)[groups]
        advantages = (rewards - baselines).masked_fill(equal & without_prior, 0.0)
        if self.history is not None:
            self.history.observe(rewards, weights, scored.prompt_ids, scored.iteration)
        return advantages.float()

    @override
    def advantages(self, rewards: Tensor, group_indices: Tensor, num_groups: int) -> Tensor:
        """With equal weights and no prior: leave-one-out."""
        return rewards - weighted_leave_one_out(rewards, torch.ones_like(rewards), group_indices, num_groups)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.history is None else self.history.state_dict()

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self.history is not None and state_dict:
            self.history.load_state_dict(state_dict)


def _count(indices: Tensor) -> int:
    return int(indices.max()) + 1 if len(indices) else 0
