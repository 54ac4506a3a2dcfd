"""From the record of an RL iteration to the numbers that the tripwires judge."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from dynamo_lightning.allocation.outcomes import group_rewards
from dynamo_lightning.callbacks.tripwires.observation import NAN, Observation
from dynamo_lightning.distributed import gather_objects
from dynamo_lightning.types import IterationRecord, Outcome, Rollout

SAMPLING_DIFFERENCE = "sampling/sampling_logp_difference/mean"
PUSH_DIFFERENCE = "sampling/push_logp_difference"
NOTHING = 0.0, 0.0, 0.0


@dataclass(frozen=True)
class Context:
    """Facts about a run that its numbers are judged by."""

    success_threshold: float = 0.5
    """Rewards from here on are correct."""
    equal_rewards_give_zero: bool = True
    """Groups with equal rewards have advantages of 0."""
    samples_from_policy: bool = True
    """Every token is drawn from the policy's whole distribution."""
    trains_on_all: bool = True
    """The record has every rollout, not a choice by outcomes as dynamic sampling makes."""
    ratio_per_token: bool = True
    """The importance ratio between trainer and engine is that of single tokens, not of whole responses."""


def observe(
    record: IterationRecord, context: Context, num_repeated: float = NAN, num_skipped: float = NAN
) -> Observation:
    """Numbers of one iteration, the same on every rank; called on all of them, and communicates once.

    Args:
        record: The iteration.
        context: The run.
        num_repeated: See `Observation`.
        num_skipped: See `Observation`.
    """
    metrics = record.metrics
    groups = [group for group in group_rewards(record.batch, record.outcomes) if group]
    solved, hopeless = equal_groups(groups, context) if groups else (NAN, NAN)
    is_comparable = context.samples_from_policy and not metrics.get("sampling/staleness", 0.0)
    pairs, sums_of_surprise = _global_sums(record) if is_comparable else (NOTHING, NOTHING)
    if not context.trains_on_all:
        sums_of_surprise = NOTHING
    rewards = [outcome.score.reward for outcome in record.outcomes]
    numbers = [metrics.get("loss", 0.0), record.entropy, *record.gradient_norms]
    is_allocated = metrics.get("alloc/n_min", 0.0) < metrics.get("alloc/n_max", 0.0)
    return Observation(
        iteration=record.batch.iteration + 1,
        reward=fmean(map(fmean, groups)) if groups else NAN,
        components={
            name.removeprefix("rewards/").removesuffix("/mean"): value
            for name, value in metrics.items()
            if name.startswith("rewards/") and name.endswith("/mean")
        },
        entropy=record.entropy,
        gradient_norm=max(record.gradient_norms, default=NAN),
        num_not_finite=float(sum(not math.isfinite(n) for n in numbers) + (not all(map(math.isfinite, rewards)))),
        frac_truncated=fmean(outcome.truncated for outcome in record.outcomes) if record.outcomes else NAN,
        frac_failed=_failed(metrics, record.outcomes),
        frac_solved=solved,
        frac_hopeless=hopeless,
        length_products=length_products(record.outcomes),
        identical_pairs=pairs,
        surprise=sums_of_surprise,
        logp_difference=metrics.get(PUSH_DIFFERENCE, metrics.get(SAMPLING_DIFFERENCE, NAN) if is_comparable else NAN),
        frac_cut=metrics.get("sampling/frac_cut", NAN) if context.ratio_per_token else NAN,
        frac_at_min=metrics.get("alloc/frac_at_min", NAN) if is_allocated else NAN,
        frac_at_max=metrics.get("alloc/frac_at_max", NAN) if is_allocated else NAN,
        num_repeated=num_repeated,
        num_skipped=num_skipped,
    )


def equal_groups(groups: Sequence[Sequence[float]], context: Context) -> tuple[float, float]:
    """Shares of groups whose rewards are equal: of correct ones, and of incorrect ones; NaN if they have a signal."""
    if not context.equal_rewards_give_zero:
        return NAN, NAN
    equal = [group[0] >= context.success_threshold for group in groups if max(group) == min(group)]
    return sum(equal) / len(groups), (len(equal) - sum(equal)) / len(groups)


def length_products(outcomes: Sequence[Outcome]) -> tuple[float, float, float, float]:
    """Sums of which the correlation of reward and response length within groups is made.

    Args:
        outcomes: All ranks'.

    Returns:
        `Observation.length_products`.
    """
    groups: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.prompt_id].append((outcome.score.reward, outcome.response_length))
    sums = np.zeros(4)
    for group in groups.values():
        values = np.array(group, dtype=np.float64)
        reward, length = (values - values.mean(axis=0)).T
        if reward.any():
            sums += len(group), reward @ length, reward @ reward, length @ length
    return tuple(map(float, sums))  # type: ignore[return-value]  # four of them


def identical_pairs(
    prompt_ids: Sequence[int], checksums: Sequence[int], logprobs: Sequence[float]
) -> tuple[float, float, float]:
    """Pairs of rollouts of one prompt: all, identical ones, and how many identical ones are to be expected.

    Args:
        prompt_ids: `[num_rollouts]`.
        checksums: Of the tokens, `[num_rollouts]`.
        logprobs: Of the whole responses, nats, `[num_rollouts]`.
    """
    groups: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for prompt_id, checksum, logprob in zip(prompt_ids, checksums, logprobs, strict=True):
        groups[prompt_id].append((checksum, logprob))
    pairs = identical = 0
    expected = 0.0
    for group in groups.values():
        pairs += math.comb(len(group), 2)
        counts: dict[int, int] = defaultdict(int)
        for checksum, logprob in group:
            identical += counts[checksum]
            counts[checksum] += 1
            expected += (len(group) - 1) / 2 * math.exp(min(logprob, 0.0))
    return float(pairs), float(identical), expected


def surprise(rollouts: Sequence[Rollout], entropy: torch.Tensor | None) -> tuple[float, float, float]:
    """Sums over this rank's response tokens, see `Observation.surprise`; zeros unless all entropies are known.

    Those that are known may have been chosen by their outcome (groups with a signal), which makes them no sample of the
    policy's distribution.

    Args:
        rollouts: `[num_rollouts]`.
        entropy: Of the policy at the tokens of these rollouts, nats, `[num_tokens]`, NaN where it is not known.
    """
    if entropy is None or not rollouts:
        return NOTHING
    logprobs = np.concatenate([rollout.logprobs for rollout in rollouts]).astype(np.float64)
    values = entropy.detach().to("cpu", torch.float64).numpy()
    if len(values) != len(logprobs) or not np.isfinite(values).all():
        return NOTHING
    excess = -logprobs - values
    return float(excess.sum()), float(excess @ excess), float(values.sum())


def _global_sums(record: IterationRecord) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """`identical_pairs` and `surprise` over the rollouts of all ranks."""
    rollouts = record.rollouts
    own = (
        [rollout.prompt.prompt_id for rollout in rollouts],
        [zlib.crc32(rollout.token_ids.tobytes()) for rollout in rollouts],
        [float(rollout.logprobs.sum(dtype=np.float64)) for rollout in rollouts],
        surprise(rollouts, record.token_values.get("entropy")),
    )
    parts = gather_objects([own])
    pairs = identical_pairs(*([value for part in parts for value in part[column]] for column in range(3)))  # type: ignore[arg-type]
    if any(part[0] and not part[3][1] for part in parts):  # a rank has rollouts whose entropies are not known
        return pairs, NOTHING
    total, squares, entropy = (math.fsum(column) for column in zip(*(part[3] for part in parts), strict=True))
    return pairs, (total, squares, entropy)


def _failed(metrics: Mapping[str, float], outcomes: Sequence[Outcome]) -> float:
    """Share of failed rewards, dropped rollouts included."""
    if "rewards/frac_timeout" in metrics:
        return metrics["rewards/frac_timeout"] + metrics.get("rewards/frac_crash", 0.0)
    return fmean(outcome.score.failure is not None for outcome in outcomes) if outcomes else NAN
