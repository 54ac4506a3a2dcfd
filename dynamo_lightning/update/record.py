"""The record of a finished iteration, with all of its metrics."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_lightning.allocation.groups import whole_batch
from dynamo_lightning.types import Collected, IterationRecord
from dynamo_lightning.update.experience import Experience
from dynamo_lightning.update.metrics import allocation_metrics, rollout_metrics
from dynamo_lightning.update.updater import UpdateResult


def iteration_record(
    collected: Collected,
    experience: Experience,
    result: UpdateResult,
    *,
    size_limits: tuple[int, int],
    seconds: Mapping[str, float],
) -> IterationRecord:
    """Everything that callbacks and loggers read of an iteration.

    Args:
        collected: Rollouts and outcomes.
        experience: For the factors of the modulation and the values of the tokens.
        result: Metrics of the update.
        size_limits: Smallest and largest allowed size of a group.
        seconds: Wall-clock seconds of each phase.
    """
    batch = whole_batch(collected.iteration, [group.plan for group in collected.groups])
    outcomes = collected.outcomes
    metrics = {
        **rollout_metrics(batch, outcomes),
        **collected.metrics,
        **allocation_metrics(batch, *size_limits),
        **result.metrics,
        **{f"timing_s/{phase}": value for phase, value in seconds.items()},
    }
    if result.gradient_norms:
        metrics["grad_norm"] = sum(result.gradient_norms) / len(result.gradient_norms)
    token_values = {"advantage": experience.modulated.advantages}
    if experience.token_entropy is not None:
        token_values["entropy"] = experience.token_entropy
    return IterationRecord(
        batch=batch,
        outcomes=outcomes,
        rollouts=experience.batch.rollouts,
        entropy=metrics["entropy"],
        gradient_norms=result.gradient_norms,
        num_tokens=collected.num_tokens,
        factors=experience.modulated.factors,
        seconds=dict(seconds),
        metrics=metrics,
        token_values=token_values,
        trained=experience.batch,
    )
