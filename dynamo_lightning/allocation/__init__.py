"""Where rollouts go: running estimates of each prompt's reward variance, and exact shares of the budget."""

from dynamo_lightning.allocation.allocate import (
    allocate_rollouts,
    best_variance_ratio,
    leave_one_out_variance,
    sample_bernoulli_variance,
    variance_ratio,
)
from dynamo_lightning.allocation.estimators import BetaPosterior, PaperBernoulli, VarianceEstimator
from dynamo_lightning.allocation.rules import (
    AllocationRule,
    MarginalGainRule,
    NeymanRule,
    ProportionalRule,
    RLOORule,
    UniformRule,
)
from dynamo_lightning.allocation.statistics import Estimate, PromptStatistics

__all__ = [
    "AllocationRule",
    "BetaPosterior",
    "Estimate",
    "MarginalGainRule",
    "NeymanRule",
    "PaperBernoulli",
    "PromptStatistics",
    "ProportionalRule",
    "RLOORule",
    "UniformRule",
    "VarianceEstimator",
    "allocate_rollouts",
    "best_variance_ratio",
    "leave_one_out_variance",
    "sample_bernoulli_variance",
    "variance_ratio",
]
