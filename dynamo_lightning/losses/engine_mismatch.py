"""Rollouts sampled by another engine: importance weights for what its log-probabilities differ from the policy's.

An engine such as vLLM computes with other kernels, often in lower precision, and possibly with older weights: it
samples from `π_engine`, not from `π_old`. The loss is an expectation over `π_old`, so each token weighs
`π_old(a) / π_engine(a)`, cut where that is large (truncated importance sampling: Yao et al., “Your efficient RL
framework secretly brings you off-policy RL training”, 2025; masked: Liu et al., “When speed kills stability”, 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dynamo_lightning.errors import UserError


@dataclass(frozen=True)
class EngineMismatch:
    """How the difference between the policy's log-probabilities and the sampling engine's is corrected.

    Without effect for a generator that samples from the policy itself. What is cut or masked stays in all denominators.
    """

    level: Literal["token", "sequence"] = "token"
    """Level of the weights: each token by its own ratio, or all tokens of a response by the product of its ratios."""
    method: Literal["truncate", "mask", "off"] = "truncate"
    """Where the ratio exceeds `cap`: `truncate` takes the cap, `mask` takes 0; `off` weighs nothing and only logs."""
    cap: float = 2.0
    """Largest ratio that counts as it is."""

    def __post_init__(self) -> None:
        """Check the range."""
        if self.cap < 1:
            raise UserError(f"model.loss.engine_mismatch.cap must be at least 1, got {self.cap}")

    def weights(self, log_ratio: Tensor) -> Tensor:
        """Importance weight of each token or sequence: `min(r, cap)`, or `r` where it is at most the cap and else 0.

        Args:
            log_ratio: `log r`, nats, `[num_tokens]`.

        Returns:
            `[num_tokens]`, finite.
        """
        if self.method == "off":
            return torch.ones_like(log_ratio)
        truncated = log_ratio.clamp(max=math.log(self.cap)).exp()
        return truncated if self.method == "truncate" else truncated * (log_ratio <= math.log(self.cap))


@dataclass(frozen=True)
class MismatchSummary:
    """One rank's sums and extremes over its tokens, from which the metrics of all ranks are made."""

    num_tokens: int
    difference_sum: float
    """Σ |log π_old − log π_engine|, nats."""
    difference_max: float
    ratio_sum: float
    ratio_min: float
    ratio_max: float
    """Mean of the ratios before they are cut, at the level that is chosen."""
    num_cut: int
    """Tokens whose ratio exceeds the cap."""


def engine_weights(
    old_logprobs: Tensor, engine_logprobs: Tensor, sequence_indices: Tensor, config: EngineMismatch
) -> tuple[Tensor, MismatchSummary]:
    """Importance weights `π_old(a) / π_engine(a)` of sampled tokens, cut as the configuration says.

    Args:
        old_logprobs: Of the trained policy, at the weights that sampled the tokens, nats, `[num_tokens]`.
        engine_logprobs: Of the engine that sampled the tokens, nats, `[num_tokens]`.
        sequence_indices: Which response a token belongs to, `[num_tokens]`, int64 from 0; all tokens of a response.
        config: Level, method and cap.

    Returns:
        Weights, `[num_tokens]`, without gradient, and what is logged.
    """
    difference = (old_logprobs - engine_logprobs).detach()
    log_ratio = difference
    if config.level == "sequence" and len(difference):
        totals = difference.new_zeros(int(sequence_indices.max()) + 1)
        log_ratio = totals.index_add_(0, sequence_indices, difference)[sequence_indices]
    if not len(difference):
        return difference, MismatchSummary(0, 0.0, 0.0, 0.0, math.inf, 0.0, 0)
    ratio = log_ratio.double().clamp(max=700.0).exp()  # a product over a long response may exceed what floats hold
    summary = MismatchSummary(
        num_tokens=len(difference),
        difference_sum=float(difference.double().abs().sum()),
        difference_max=float(difference.abs().max()),
        ratio_sum=float(ratio.sum()),
        ratio_min=float(ratio.min()),
        ratio_max=float(ratio.max()),
        num_cut=int((log_ratio > math.log(config.cap)).sum()),
    )
    return config.weights(log_ratio), summary


def mismatch_metrics(summaries: Sequence[MismatchSummary]) -> Mapping[str, float]:
    """How far engine and policy are apart, over the tokens of all ranks; names as in TRL.

    The ratios are those before the cut: their mean is 1 for an engine that differs by rounding only.
    """
    num_tokens = sum(summary.num_tokens for summary in summaries)
    if num_tokens == 0:
        return {}
    return {
        "sampling/sampling_logp_difference/mean": sum(summary.difference_sum for summary in summaries) / num_tokens,
        "sampling/sampling_logp_difference/max": max(summary.difference_max for summary in summaries),
        "sampling/importance_sampling_ratio/min": min(summary.ratio_min for summary in summaries),
        "sampling/importance_sampling_ratio/mean": sum(summary.ratio_sum for summary in summaries) / num_tokens,
        "sampling/importance_sampling_ratio/max": max(summary.ratio_max for summary in summaries),
        "sampling/frac_cut": sum(summary.num_cut for summary in summaries) / num_tokens,
    }
