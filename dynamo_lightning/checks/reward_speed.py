"""Rewards per second, and rewards that run out of time."""

from __future__ import annotations

from dynamo_lightning.checks.case import CheckCase
from dynamo_lightning.checks.result import CheckResult


def check_reward_speed(case: CheckCase) -> CheckResult:
    """Rewards that failed, and how long those of a whole batch take."""
    scoring, total = case.model.collector.scorer.config, len(case.scores)
    failed = [score for score in case.scores if score.failure is not None]
    timeouts = sum(score.failure == "timeout" for score in failed)
    rate = total / max(case.seconds, 1e-9)
    budget = case.datamodule.allocator.budget.of(case.datamodule.prompts_per_batch)
    numbers = {"per_second": rate, "failed": len(failed), "timeouts": timeouts, "responses": total}
    if failed:
        share = len(failed) / total
        remedy = (
            f"raise model.scoring.time_limit={scoring.time_limit:g} or make the reward faster"
            if timeouts
            else "correct model.reward"
        )
        return CheckResult(
            "scoring",
            "error" if share > scoring.max_failure_share else "warning",
            f"{len(failed)} of {total} rewards failed, {timeouts} by running out of time (model.scoring."
            f"max_failure_share={scoring.max_failure_share:g}): {remedy}; the first: {failed[0].message}",
            numbers,
        )
    return CheckResult(
        "scoring",
        "ok",
        f"{rate:,.0f} rewards/s with model.scoring.num_workers={scoring.num_workers}: "
        f"{budget / rate:.1f} s for a batch of {budget} rollouts",
        numbers,
    )
