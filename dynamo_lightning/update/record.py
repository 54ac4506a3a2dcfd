"""The record of a finished iteration, with all of its metrics."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_lightning.training_metrics import allocation_metrics, rollout_metrics
from dynamo_lightning.types import Collected, IterationRecord, merge_parts
from dynamo_lightning.update.experience import Experience
from dynamo_lightning.update.updater import UpdateResult


def iteration_record(
    collected: Collected,
    experience: Experience,
    result: UpdateResult,
    *,
    staleness: Mapping[str, float],
    size_limits: tuple[int, int],
    seconds: Mapping[str, float],
) -> IterationRecord:
    """Everything that callbacks and loggers read of an iteration.

    Args:
        collected: Rollouts and outcomes.
        experience: For the factors of the modulation.
        result: Metrics of the update.
        staleness: Metrics of the age of the weights that sampled the rollouts.
        size_limits: Smallest and largest allowed size of a group.
        seconds: Wall-clock seconds of each phase.
    """
    batch = merge_parts(collected.parts)
    metrics = {
        **rollout_metrics(batch, collected.outcomes),
        **collected.metrics,
        **staleness,
        **allocation_metrics(batch, *size_limits),
        **result.metrics,
        **{f"timing_s/{phase}": value for phase, value in seconds.items()},
    }
    if result.gradient_norms:
        metrics["grad_norm"] = sum(result.gradient_norms) / len(result.gradient_norms)
    return IterationRecord(
        batch=batch,
        outcomes=collected.outcomes,
        rollouts=collected.rollouts,
        entropy=metrics["entropy"],
        gradient_norms=result.gradient_norms,
        num_tokens=collected.num_tokens,
        factors=experience.modulated.factors,
        seconds=dict(seconds),
        metrics=metrics,
        trained=experience.batch,
    )
