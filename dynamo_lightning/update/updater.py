"""The policy updater: from rollouts with advantages to a better policy, in one or several optimizer steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynamo_lightning.distributed import sum_over_ranks
from dynamo_lightning.policy.dropout import set_training_mode
from dynamo_lightning.types import RolloutBatch
from dynamo_lightning.update.clipping import GradientClipping
from dynamo_lightning.update.experience import Experience, prepare_experience
from dynamo_lightning.update.logprobs import all_statistics
from dynamo_lightning.update.plan import row_indices
from dynamo_lightning.update.probe import mean_probe_entropy
from dynamo_lightning.update.sampling_check import (
    LogpDifference,
    check_difference,
    difference_metrics,
    global_difference,
)
from dynamo_lightning.update.settings import UpdateSettings
from dynamo_lightning.update.steps import TrainedPolicy, accumulate_gradient, add_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class UpdateResult:
    """Result of the optimizer steps of one iteration."""

    metrics: Mapping[str, float]
    """Those of the experience, and means over the optimizer steps; each a global sum over a global denominator."""
    gradient_norms: tuple[float, ...]
    """Norm at each step, before clipping; empty if no rollout had a gradient."""


class PolicyUpdater:
    """Trains a policy on a batch of rollouts: `prepare` before the first optimizer step, then `step`.

    Args:
        settings: The loss and the other options.
    """

    def __init__(self, settings: UpdateSettings) -> None:
        self.settings = settings
        self.clipping = GradientClipping(settings.gradient_clip_val)
        """Called by the optimizer right before its step, as Lightning's `on_before_optimizer_step` is."""

    def prepare(
        self,
        policy: PreTrainedModel,
        batch: RolloutBatch,
        reference: AbstractContextManager[PreTrainedModel] | None = None,
        logp_tolerance: float | None = None,
    ) -> Experience:
        """Compute what has to be known of the batch before the first optimizer step; see `prepare_experience`."""
        set_training_mode(policy)
        return prepare_experience(policy, batch, self.settings, reference, logp_tolerance)

    def step(self, trained: TrainedPolicy, experience: Experience) -> UpdateResult:
        """Take the optimizer steps of one iteration.

        A mini-batch in which no advantage differs from 0 makes no step, unless a part of the loss does not vanish with
        it (an entropy or KL term, KL-Cov): not even weight decay moves the policy then. The learning rate schedule
        advances all the same.

        Raises:
            RunError: If a log-probability is not finite, or those of sampling and of training differ by more than the
                experience's tolerance, on all ranks.
        """
        set_training_mode(trained.policy)
        gradient_norms: list[float] = []
        sums: dict[str, Tensor] = {}
        num_steps = 0
        num_overflows = 0
        difference = experience.difference if experience.plan.compares_beforehand else None
        for step in experience.plan.steps:
            if not step.is_skipped:
                trained.optimizer.zero_grad()
                shares, own = accumulate_gradient(
                    trained,
                    experience,
                    step,
                    self.settings,
                    has_moved=bool(gradient_norms),
                    measures_difference=difference is None,
                )
                add_metrics(sums, shares)
                num_steps += 1
                if difference is None:  # the only step also computes the log-probabilities of its tokens
                    difference = checked_difference(trained.policy, experience, own)
                trained.optimizer.step()
                if math.isfinite(self.clipping.norm):
                    gradient_norms.append(self.clipping.norm)
                else:
                    num_overflows += 1
            if trained.scheduler is not None:
                advance(trained.scheduler, has_stepped=bool(gradient_norms))
        means = {name: total / num_steps for name, total in sum_over_ranks(as_floats(sums)).items()}
        if difference is None:
            difference = checked_difference(trained.policy, experience, LogpDifference())
        entropy = experience.entropy + means.pop("entropy", 0.0)
        if experience.probe is not None and experience.probe_entropy is not None:
            indices = row_indices(experience.probe)
            batch, settings = experience.batch, self.settings
            after = all_statistics(trained.policy, batch, indices, settings.config, settings.temperature)
            change = mean_probe_entropy(after, batch, experience.probe) - experience.probe_entropy
            means["probe/entropy_change"] = change
        if trained.scaler is not None:
            means["frac_overflow"] = num_overflows / max(1, num_steps)
        metrics = {**experience.metrics, **means, **difference_metrics(difference), "entropy": entropy}
        return UpdateResult(metrics, tuple(gradient_norms))


def as_floats(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers of scalar tensors, read from the device together."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}


def checked_difference(policy: PreTrainedModel, experience: Experience, own: LogpDifference) -> LogpDifference:
    """Difference of the log-probabilities of sampling and of training over all tokens and ranks.

    Args:
        policy: The policy.
        experience: With the difference of the tokens that are not trained on.
        own: That of this rank's tokens in the update.

    Raises:
        RunError: If it is larger than the run may go on with, on all ranks.
    """
    difference = global_difference(experience.difference + own)
    check_difference(difference, experience.logp_tolerance, policy)
    return difference


def advance(scheduler: Any, *, has_stepped: bool) -> None:
    """Advance the learning rate schedule.

    Before the first optimizer step PyTorch warns that the two are called in the wrong order; here the order is right,
    and no rollout had a gradient so far.
    """
    with warnings.catch_warnings():
        if not has_stepped:
            warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
        scheduler.step()
