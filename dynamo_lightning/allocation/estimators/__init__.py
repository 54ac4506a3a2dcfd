"""Estimators of a prompt's reward variance p(1 − p) from its outcomes: one per file, all stateless.

Departures from the paper's code (arXiv 2602.19208): by default old outcomes count less than new ones, and a prompt with
few outcomes, or none, leans on what all prompts have shown.
"""

from dynamo_lightning.allocation.estimators.arcsine_kalman import ArcsineKalman
from dynamo_lightning.allocation.estimators.base import VarianceEstimator
from dynamo_lightning.allocation.estimators.beta_posterior import BetaPosterior
from dynamo_lightning.allocation.estimators.logit_filter import LogitFilter
from dynamo_lightning.allocation.estimators.paper_bernoulli import PaperBernoulli

__all__ = ["ArcsineKalman", "BetaPosterior", "LogitFilter", "PaperBernoulli", "VarianceEstimator"]
