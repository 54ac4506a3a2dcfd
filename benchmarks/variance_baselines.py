"""Arms of `benchmarks/gradient_variance.py` with the variance-minimizing baseline, with and without a history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynamo_lightning.allocation import AllocationRule, NeymanRule, OptimalBaselineRule, UniformRule
from dynamo_lightning.losses.advantages import weighted_leave_one_out
from dynamo_lightning.policy.forward import response_statistics, token_layout
from dynamo_lightning.policy.packing import MicroBatches
from dynamo_lightning.types import Rollout
from dynamo_lightning.update.config import UpdateConfig


@dataclass(frozen=True)
class BaselineArm:
    """Sizes and baseline of an arm."""

    rule: AllocationRule
    """Shares the budget out by the expected p(1 − p) of `LogitFilter`; `UniformRule` gives equal groups."""
    uses_history: bool
    """The baseline has the history of the uniform run as its prior."""


BASELINE_ARMS = {
    "optimal_baseline": BaselineArm(OptimalBaselineRule("group"), uses_history=False),
    "optimal_baseline_history": BaselineArm(OptimalBaselineRule("history"), uses_history=True),
    "optimal_baseline_uniform": BaselineArm(UniformRule(), uses_history=False),
    "history_uniform": BaselineArm(UniformRule(), uses_history=True),
    "history_oracle": BaselineArm(NeymanRule(), uses_history=True),
}
"""The last is told each prompt's p(1 − p) of the reference instead of the filter's."""


@torch.no_grad()
def score_norms(policy: Any, rollouts: list[Rollout], updates: UpdateConfig) -> np.ndarray:
    """Squared logit gradient `Σ_t (1 − 2π(a_t) + Σ_k π_k²)` of each rollout at temperature 1, `[num_rollouts]`."""
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts])
    rollout_of_token = torch.arange(len(rollouts)).repeat_interleave(lengths)
    norms = torch.zeros(len(rollouts), dtype=torch.float64)
    rows = MicroBatches(
        rollouts,
        range(len(rollouts)),
        rollouts[0],
        updates.max_tokens_per_micro_batch,
        policy.device,
        token_layout(policy),
    )
    for micro_batch, counts in rows:
        if counts:
            squared = response_statistics(policy, micro_batch, temperature=1.0).squared_logit_gradient()
            norms.index_add_(0, rollout_of_token[micro_batch.token_indices], squared.double())
    return norms.numpy()


def baseline_advantages(
    rewards: np.ndarray, norms: np.ndarray, groups: np.ndarray, prior: tuple[np.ndarray, np.ndarray] | None
) -> torch.Tensor:
    """`r − b` of the library's weighted leave-one-out baselines, `[num_rollouts]`, float64.

    Args:
        rewards: `[num_rollouts]`.
        norms: w, `[num_rollouts]`.
        groups: Group of each rollout, `[num_rollouts]`.
        prior: Mean and weight of the prior of each rollout's prompt, `[num_rollouts]` each.
    """
    means, weights = (None, None) if prior is None else (torch.from_numpy(part) for part in prior)
    r = torch.from_numpy(rewards).double()
    num_groups = int(groups.max()) + 1
    return r - weighted_leave_one_out(r, torch.from_numpy(norms), torch.from_numpy(groups), num_groups, means, weights)
