"""Shows what the allocation of rollouts buys: the gradient estimator's variance relative to equal groups.

With leave-one-out advantages prompt i adds about a_i/(n_i − 1) to the variance, a_i = p_i(1 − p_i) the variance of its
reward and n_i its group size. Ratios below 1 are a gain; uniform allocation gives 1.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from dynamo_lightning.allocation.allocate import best_variance_ratio, sample_bernoulli_variance, variance_ratio
from dynamo_lightning.types import IterationRecord


def variance_ratios(record: IterationRecord, success_threshold: float = 0.5) -> dict[str, float]:
    """The iteration's variance relative to equal groups, Σ a_i/(n_i − 1) over Σ a_i/(n̄ − 1), three ways.

    Groups with fewer than two rollouts have no leave-one-out advantage and are left out.

    Args:
        record: The iteration.
        success_threshold: A rollout with at least this reward is a success.

    Returns:
        By metric name, each only if defined (two or more groups' worth of rollouts and some variance):

        - `alloc/predicted_variance_ratio`: a_i as expected before the rollouts, n_i as allocated;
        - `alloc/best_variance_ratio`: 1/(1 + CV²(√a)) of the same a_i, what no allocation without bounds can beat;
        - `alloc/realised_variance_ratio`: a_i = k(n − k)/(n(n − 1)) from the group's own k successes in the n rollouts
          that came back, which is unbiased for p(1 − p) but noisy: average it over iterations.
    """
    ratios = {}
    variances, sizes = np.array(record.batch.bernoulli_variances), np.array(record.batch.group_sizes)
    kept = sizes >= 2
    if variances[kept].sum() > 0:
        ratios["alloc/predicted_variance_ratio"] = variance_ratio(variances[kept], sizes[kept])
        ratios["alloc/best_variance_ratio"] = best_variance_ratio(variances[kept])

    groups: dict[int, list[bool]] = defaultdict(list)
    for outcome in record.outcomes:
        groups[outcome.prompt_id].append(outcome.score.reward >= success_threshold)
    counts = np.array([len(group) for group in groups.values() if len(group) >= 2])
    successes = np.array([sum(group) for group in groups.values() if len(group) >= 2])
    if len(counts):
        realised = sample_bernoulli_variance(successes, counts)
        if realised.sum() > 0:
            ratios["alloc/realised_variance_ratio"] = variance_ratio(realised, counts)
    return {name: float(ratio) for name, ratio in ratios.items()}


class VarianceReductionMonitor(Callback):
    """Logs `alloc/{predicted,best,realised}_variance_ratio`, see `variance_ratios`; the first in the progress bar too.

    An iteration in which a ratio is undefined (all groups all right or all wrong) does not log it.

    Args:
        success_threshold: A rollout with at least this reward is a success; the data module's own threshold.
    """

    def __init__(self, success_threshold: float = 0.5) -> None:
        self.success_threshold = success_threshold

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the iteration's ratios."""
        for name, ratio in variance_ratios(outputs["record"], self.success_threshold).items():
            shown = name == "alloc/predicted_variance_ratio"
            pl_module.log(name, ratio, on_step=True, on_epoch=False, prog_bar=shown)
