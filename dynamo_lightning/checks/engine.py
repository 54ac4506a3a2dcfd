"""The engine against the policy: log-probabilities, and tokens that are drawn as often as they are likely.

An engine that samples at another temperature may still report the right log-probabilities of its tokens. It is found by
their mean: of tokens drawn from a distribution, `−log π` is on average its entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamo_lightning.checks.case import CheckCase
from dynamo_lightning.checks.result import CheckResult
from dynamo_lightning.policy.logits import own_logits
from dynamo_lightning.types import Rollout
from dynamo_lightning.update.sampling_check import FULL_PRECISION_TOLERANCE, HALF_PRECISION_TOLERANCE, is_exact

MAX_ROLLOUTS = 64
MAX_TOKENS = 512
LARGEST_DEVIATION = 5.0
"""Standard deviations of the mean surprise from the entropy; by chance once in two million checks."""
SMALLEST_SPREAD = 1e-3
"""Standard deviation of −log π, nats, below which a policy is so certain that no temperature shows."""


@dataclass(frozen=True)
class Agreement:
    """Sampled tokens under the policy's own distribution."""

    difference: float
    """Mean `|log π_policy − log π_engine|`, nats."""
    deviation: float
    """Sum of `log π + H` over tokens, in its standard deviations; positive if tokens are likelier than they should."""
    num_tokens: int


@torch.no_grad()
def agreement(case: CheckCase, rollouts: tuple[Rollout, ...]) -> Agreement:
    """Compare sampled tokens with the policy's own logits, sequence by sequence."""
    total = surprise = variance = 0.0
    count = 0
    for rollout in rollouts:
        kept = min(len(rollout.token_ids), MAX_TOKENS)
        sequence = [*rollout.prompt.token_ids, *rollout.token_ids[:kept].tolist()]
        start = len(rollout.prompt.token_ids) - 1
        logits = own_logits(case.policy, sequence)[start : start + kept].float() / case.model.sampling.temperature
        mask = torch.from_numpy(rollout.loss_mask[:kept]).to(logits.device)
        logprobs = logits.log_softmax(-1)[mask]
        targets = torch.from_numpy(rollout.token_ids[:kept]).to(logits.device).long()[mask]
        chosen = logprobs.gather(1, targets[:, None]).squeeze(1).double()
        given = torch.from_numpy(rollout.logprobs[: len(chosen)]).to(chosen)
        probs = logprobs.exp()
        mean = (probs * logprobs.nan_to_num(neginf=0.0)).sum(-1).double()
        square = (probs * logprobs.nan_to_num(neginf=0.0).square()).sum(-1).double()
        total += float((chosen - given).abs().sum())
        surprise += float((chosen - mean).sum())
        variance += float((square - mean.square()).clamp(min=0).sum())
        count += len(chosen)
    spread = (variance / max(1, count)) ** 0.5
    deviation = surprise / variance**0.5 if spread > SMALLEST_SPREAD else 0.0
    return Agreement(total / max(1, count), deviation, count)


def check_engine(case: CheckCase) -> CheckResult:
    """The engine's log-probabilities, and the temperature that its tokens show, against the policy's."""
    generator, sampling = case.model.collector.generator, case.model.sampling
    if not generator.samples_from_policy:
        return CheckResult("engine", "ok", "model.generator.token_filter samples from a part of the distribution only")
    case.policy.eval()
    found = agreement(case, case.rollouts[:MAX_ROLLOUTS])
    default = FULL_PRECISION_TOLERANCE if is_exact(generator, case.policy) else HALF_PRECISION_TOLERANCE
    tolerance = sampling.logp_tolerance or default
    numbers = {
        "mean_difference": found.difference,
        "tolerance": tolerance,
        "deviation": found.deviation,
        "tokens": found.num_tokens,
    }
    message = f"{type(generator).__name__}'s log-probabilities differ from the policy's by {found.difference:.1e} nats"
    if not found.difference <= tolerance:
        return CheckResult(
            "engine",
            "error",
            f"{message} on average (model.sampling.logp_tolerance allows {tolerance:g}): the engine has another "
            "temperature, other weights or another precision than the policy; see model.generator",
            numbers,
        )
    if abs(found.deviation) > LARGEST_DEVIATION:
        direction = "likelier" if found.deviation > 0 else "less likely"
        return CheckResult(
            "engine",
            "error",
            f"the engine's tokens are {direction} than tokens drawn at model.sampling.temperature="
            f"{sampling.temperature:g} ({abs(found.deviation):.0f} standard deviations): it samples at another "
            "temperature or filters tokens; see model.generator",
            numbers,
        )
    return CheckResult("engine", "ok", f"{message} on average, over {found.num_tokens:,} tokens", numbers)
