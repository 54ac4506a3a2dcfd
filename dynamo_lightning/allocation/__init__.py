"""Where rollouts go: running estimates of each prompt's reward variance, and exact shares of the budget."""

from dynamo_lightning.allocation.allocate import Cost, allocate_rollouts
from dynamo_lightning.allocation.allocator import Allocator
from dynamo_lightning.allocation.budget import RolloutBudget
from dynamo_lightning.allocation.estimators import (
    ArcsineKalman,
    BetaPosterior,
    LogitFilter,
    PaperBernoulli,
    VarianceEstimator,
)
from dynamo_lightning.allocation.gvm_rule import GVMRule
from dynamo_lightning.allocation.optimal_baseline_rule import OptimalBaselineRule
from dynamo_lightning.allocation.pilot import allocate_commit, pilot_weights
from dynamo_lightning.allocation.pilot_commit_rule import PilotCommitRule
from dynamo_lightning.allocation.records import AllocationProblem, Estimate
from dynamo_lightning.allocation.reinforce_ada_rule import ReinforceAdaRule
from dynamo_lightning.allocation.rules import (
    AllocationRule,
    MarginalGainRule,
    NeymanRule,
    ProportionalRule,
    RLOORule,
    SignalRule,
    UniformRule,
)
from dynamo_lightning.allocation.score_ratio_rule import ScoreRatioRule
from dynamo_lightning.allocation.statistics import PromptStatistics
from dynamo_lightning.allocation.variance import (
    best_variance_ratio,
    leave_one_out_variance,
    sample_bernoulli_variance,
    variance_ratio,
)

__all__ = [
    "AllocationProblem",
    "AllocationRule",
    "Allocator",
    "ArcsineKalman",
    "BetaPosterior",
    "Cost",
    "Estimate",
    "GVMRule",
    "LogitFilter",
    "MarginalGainRule",
    "NeymanRule",
    "OptimalBaselineRule",
    "PaperBernoulli",
    "PilotCommitRule",
    "PromptStatistics",
    "ProportionalRule",
    "RLOORule",
    "ReinforceAdaRule",
    "RolloutBudget",
    "ScoreRatioRule",
    "SignalRule",
    "UniformRule",
    "VarianceEstimator",
    "allocate_commit",
    "allocate_rollouts",
    "best_variance_ratio",
    "leave_one_out_variance",
    "pilot_weights",
    "sample_bernoulli_variance",
    "variance_ratio",
]
