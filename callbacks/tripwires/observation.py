"""Numbers of RL iterations that the tripwires judge: plain values, so that they fit into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NAN = math.nan


@dataclass(frozen=True)
class Observation:
    """One RL iteration of the global batch; NaN stands for what was not measured or cannot be judged."""

    iteration: int
    """RL iterations finished after it."""
    reward: float = NAN
    """Mean over prompts of their group's mean reward."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Mean of each named reward by itself, unweighted."""
    entropy: float = NAN
    """Mean policy entropy, nats."""
    gradient_norm: float = NAN
    """Largest of the optimizer steps, before clipping; NaN without a step."""
    num_not_finite: float = 0.0
    """How many of loss, rewards, entropy and gradient norms are not finite."""
    frac_truncated: float = NAN
    """Share of responses that the length limit ended."""
    frac_failed: float = NAN
    """Share of rewards that timed out or crashed."""
    frac_solved: float = NAN
    """Share of groups whose rewards are equal and at least the success threshold; NaN if the loss learns from equal
    rewards."""
    frac_hopeless: float = NAN
    """Share of groups whose rewards are equal and below the success threshold; NaN as above."""
    length_products: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Within groups of differing rewards: number of rollouts, Σ(reward − mean)(length − mean), Σ(reward − mean)²,
    Σ(length − mean)²."""
    identical_pairs: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Pairs of rollouts of one group: all, those with the same tokens, and how many of these their probabilities lead
    one to expect."""
    surprise: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Over response tokens: Σx, Σx² and ΣH, with H the policy's entropy and x = −log π_engine − H, nats."""
    logp_difference: float = NAN
    """Mean |log π_trainer − log π_engine| with the same weights on both sides, nats."""
    frac_cut: float = NAN
    """Share of tokens whose importance ratio π_trainer / π_engine exceeds its cap."""
    frac_at_min: float = NAN
    """Share of prompts with the smallest allowed group; NaN if nothing could be allocated."""
    frac_at_max: float = NAN
    """Share of prompts with the largest allowed group; NaN as above."""
    num_repeated: float = NAN
    """Prompts that the stream gave although the run, or what it was resumed from, had trained on them in this pass."""
    num_skipped: float = NAN
    """Prompts that the stream left out."""


@dataclass(frozen=True)
class Validation:
    """Success rates on held-out prompts at one point of a run."""

    iteration: int
    """RL iterations finished before it."""
    reward: float
    """Mean training reward of the iterations since the validation before; NaN without any."""
    estimates: Mapping[str, tuple[float, float, float]]
    """By metric name value, low and high end of its 95 % interval."""


@dataclass(frozen=True)
class History:
    """All that a tripwire may look at."""

    first: Sequence[Observation]
    """The first iterations of the run, at most three."""
    recent: Sequence[Observation]
    """The last iterations, the newest last, at most `NUM_RECENT`."""
    validations: Sequence[Validation] = ()
    """By iteration."""

    @property
    def newest(self) -> Observation:
        """The iteration that has just ended."""
        return self.recent[-1]

    def last(self, name: str, count: int) -> list[float]:
        """Values of a field in the last `count` iterations; empty if there are fewer, or one is not known."""
        values = [float(getattr(observation, name)) for observation in self.recent[-count:]]
        return values if len(values) == count and all(map(math.isfinite, values)) else []

    def at_first(self, name: str) -> list[float]:
        """Finite values of a field in the first iterations of the run."""
        values = (float(getattr(observation, name)) for observation in self.first)
        return [value for value in values if math.isfinite(value)]


NUM_FIRST = 3
NUM_RECENT = 30
