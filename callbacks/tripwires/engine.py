"""Measures of the engine that samples: its weights, its log-probabilities, its distribution, its random numbers."""

from __future__ import annotations

import math
from statistics import fmean

from dynamo_lightning.callbacks.tripwires.observation import History
from dynamo_lightning.callbacks.tripwires.tripwire import Measurement

ROUNDING = 2e-5
"""Nats; smaller differences of log-probabilities are rounding in float32."""
NUM_DEVIATIONS = 6.0
"""Standard deviations from which on a sum is no chance, in any of thousands of iterations."""


def old_weights(history: History) -> Measurement | None:
    """Growth of the difference between trainer and engine since the run's first iterations.

    Both have the same weights at first. If pushes do not arrive, the engine's log-probabilities of a text stay where
    they were while the policy's move: the difference grows with every optimizer step. The smallest of the last three
    counts, so one odd batch does not.
    """
    start, now = history.at_first("logp_difference"), history.last("logp_difference", 3)
    if not start or not now or len(history.recent) < 4:
        return None
    base = max(min(start), ROUNDING)
    return Measurement(
        min(now) / base,
        f"the log-probabilities of engine and trainer differ by {min(now):.2g} nats on average, by {min(start):.2g} in "
        "the first iterations: the engine's do not follow the policy's, as if pushed weights did not arrive. Look at "
        "the engine's sync (model.generator) and its log; if it is numerics, raise its dtype",
    )


def engine_mismatch(history: History) -> Measurement | None:
    """Mean difference of log-probabilities between trainer and engine, both with the same weights."""
    now = history.last("logp_difference", 3)
    if not now:
        return None
    return Measurement(
        fmean(now),
        f"the log-probabilities of engine and trainer differ by {fmean(now):.2g} nats on average in the last 3 "
        "iterations: they are not the same policy. Compare temperature, dtype and attention kernels "
        "(model.generator, model.policy.attn_implementation); keep model.loss.engine_mismatch at truncate or mask",
    )


def ratio_tail(history: History) -> Measurement | None:
    """Share of tokens whose importance ratio between trainer and engine exceeds its cap."""
    cut = history.last("frac_cut", 3)
    if not cut:
        return None
    return Measurement(
        fmean(cut),
        f"the importance ratio of {fmean(cut):.1%} of the tokens exceeds model.loss.engine_mismatch.cap: what is "
        "sampled is far from what is trained. Lower model.max_staleness or the learning rate; raise the engine's dtype "
        "(model.generator)",
    )


def wrong_distribution(history: History) -> Measurement | None:
    """Surprise of the sampled tokens beyond the policy's entropy, relative to it.

    For tokens drawn from the policy x = −log π − H is 0 on average, whatever came before, so Σx over √Σx² is standard
    normal. Beyond 6 the tokens come from another distribution, such as one of another temperature.
    """
    recent = [observation.surprise for observation in history.recent[-10:]]
    total, squares, entropy = (math.fsum(column) for column in zip(*recent, strict=True))
    if len(recent) < 3 or not squares > 0 or not entropy > 0:
        return None
    is_chance = abs(total) < NUM_DEVIATIONS * math.sqrt(squares)
    kind = "unlikelier" if total > 0 else "likelier"
    return Measurement(
        0.0 if is_chance else abs(total) / entropy,
        f"the sampled tokens are {kind} than the policy's distribution says: −log π is "
        f"{(total + entropy) / entropy:.2f} times the entropy. The engine samples at another temperature or from "
        "other weights: look at its settings (model.generator, model.sampling.temperature)",
    )


def duplicates(history: History) -> Measurement | None:
    """Share of pairs of a group's responses that are identical, beyond what the responses' probabilities explain.

    The chance that another rollout repeats a response of log-probability ℓ is exp ℓ. Short or certain answers repeat
    rightly; more than that are rollouts with the same random numbers.
    """
    recent = [observation.identical_pairs for observation in history.recent[-5:]]
    pairs, identical, expected = (math.fsum(column) for column in zip(*recent, strict=True))
    if len(recent) < 3 or pairs < MIN_PAIRS:
        return None
    return Measurement(
        (identical - expected) / pairs,
        f"{identical / pairs:.0%} of the pairs of one prompt's responses are identical, where their probabilities give "
        f"{expected / pairs:.0%}: the engine repeats itself. Look at how it seeds requests (model.generator)",
    )


MIN_PAIRS = 200
