"""The records that travel through the loop, one page: prompts → allocation → rollouts → rewards → advantages → loss.

All but one are frozen dataclasses. Two rollouts are never matched by position, always by `(prompt_id, sample_index)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """One verifiable problem, ready to be generated from."""

    prompt_id: int
    """Stable 63-bit hash of source, question and answer: the same in every run and whatever the row's position."""
    question: str
    """The problem as the data set states it, before any template."""
    text: str
    """What the policy reads: the question after the chat template or format string."""
    token_ids: tuple[int, ...]
    """`text` as tokens, `[prompt_length]`."""
    answer: str
    """The reference answer that rewards compare with."""
    source: str = ""
    """Name of the data set, as it appears in metric names."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, handed to reward functions as keyword arguments."""
    count: int = 1
    """Number of identical rows that were merged into this prompt."""
    row: int = 0
    """Row of the data set, counting from 0; of merged rows the first."""
    place: str = ""
    """Where the row is, for messages: the file and its line, counting from 1."""
    answers: tuple[str, ...] = ()
    """All accepted reference answers if there are several, `answer` being the first; empty otherwise."""


PilotBaseline = Literal["separate", "cross", "pooled"]
"""Rollouts that the baselines of a pilot and of its commit are made of: those of the same part, of both so that the
gradient stays unbiased, or of both as if they were one group."""


@dataclass(frozen=True)
class GroupPlan:
    """A group of rollouts to sample for one prompt, and what was expected of the prompt when it was planned.

    Example:
        `GroupPlan(prompt, size=6, success_rate=0.3, bernoulli_variance=0.15, unseen=False)`: six rollouts with sample
        indices 0 to 5, which make up all of the prompt's weight in the gradient.
    """

    prompt: Prompt
    size: int
    """Rollouts of the group."""
    share: float = 1.0
    """Share of the prompt's weight in the gradient; below 1 if a pilot and a commit group share the prompt."""
    first_sample_index: int = 0
    """Sample index of the group's first rollout: a commit group counts on from its pilot."""
    success_rate: float = 0.5
    """Expected success rate of the prompt before its rollouts, in [0, 1]."""
    bernoulli_variance: float = 0.25
    """Expected reward variance E[p(1 − p)] of the prompt before its rollouts."""
    unseen: bool = True
    """The prompt had no outcome yet."""
    pilot_baseline: PilotBaseline = "separate"
    """Rollouts that its baselines are made of, if a pilot and a commit group share the prompt."""


class PromptBatch:
    """The global batch of one RL iteration, the same on every rank, with its allocation.

    The one record that is no dataclass: it is what Lightning calls a batch, and Lightning converts batches field by
    field (under `bf16-true`), which copies everything and fails for frozen dataclasses.

    Args:
        iteration: RL iterations finished before this one; never reset between epochs.
        plans: One group for each prompt, `[num_prompts]`.
    """

    def __init__(self, iteration: int, plans: Sequence[GroupPlan]) -> None:
        self.iteration = iteration
        self.plans = tuple(plans)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Prompt of each group, `[num_prompts]`."""
        return tuple(plan.prompt for plan in self.plans)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Rollouts of each group, `[num_prompts]`."""
        return tuple(plan.size for plan in self.plans)


@dataclass(frozen=True)
class RolloutRequest:
    """One response to sample; the seed makes it independent of how requests are batched or spread over ranks."""

    prompt: Prompt
    sample_index: int
    """Position within the prompt's group, 0 … group_size − 1."""
    seed: int
    """63-bit seed from (run seed, iteration, prompt id, sample index)."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled response. Its numbers are numpy arrays; sequences of numbers are converted.

    Example:
        `Rollout(prompt, sample_index=0, token_ids=[52, 2], logprobs=[-0.3, -0.01], text="4", truncated=False)`
    """

    prompt: Prompt
    sample_index: int
    token_ids: IntArray
    """Response tokens with the end-of-sequence token, if it came, `[response_length]`, at least one."""
    logprobs: FloatArray
    """The engine's own log-probability of each response token, nats, float32, `[response_length]`."""
    text: str
    """The decoded response without special tokens."""
    truncated: bool
    """Whether the length limit ended the response instead of an end-of-sequence token."""

    def __post_init__(self) -> None:
        """Convert the numbers."""
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, dtype=np.int32))
        object.__setattr__(self, "logprobs", np.asarray(self.logprobs, dtype=np.float32))

    def __eq__(self, other: object) -> bool:
        """Equality of all fields; `==` of arrays alone would give an array."""
        return (
            isinstance(other, Rollout)
            and (self.prompt, self.key, self.text, self.truncated)
            == (other.prompt, other.key, other.text, other.truncated)
            and np.array_equal(self.token_ids, other.token_ids)
            and np.array_equal(self.logprobs, other.logprobs)
        )

    def __hash__(self) -> int:
        """Hash of the key."""
        return hash(self.key)

    @property
    def key(self) -> tuple[int, int]:
        """What outcomes are joined on: `(prompt_id, sample_index)`."""
        return self.prompt.prompt_id, self.sample_index


@dataclass(frozen=True)
class Score:
    """What the reward made of one rollout."""

    reward: float
    """The total that advantages are computed from; `failure_score` after a failure."""
    components: Mapping[str, float]
    """Each named reward by itself, unweighted; empty after a failure."""
    failure: Literal["timeout", "crash"] | None = None
    """Why the reward could not be computed, if so."""
    message: str = ""
    """The failure in words, for the log."""


@dataclass(frozen=True)
class Outcome:
    """The small part of a scored rollout that every rank needs to know of every other rank's rollouts."""

    prompt_id: int
    sample_index: int
    score: Score
    response_length: int
    """Tokens."""
    truncated: bool

    @property
    def key(self) -> tuple[int, int]:
        """`(prompt_id, sample_index)`."""
        return self.prompt_id, self.sample_index


def merge_parts(parts: Sequence[PromptBatch]) -> PromptBatch:
    """One batch of the parts of an iteration, a pilot and its commit: each prompt's groups as one."""
    sizes: dict[int, int] = {}
    for plan in (plan for part in parts for plan in part.plans):
        sizes[plan.prompt.prompt_id] = sizes.get(plan.prompt.prompt_id, 0) + plan.size
    whole = (replace(plan, size=sizes[plan.prompt.prompt_id], share=1.0) for plan in parts[0].plans)
    return PromptBatch(parts[0].iteration, tuple(whole))


@dataclass(frozen=True)
class Collected:
    """What an iteration sampled and will be trained on."""

    parts: tuple[PromptBatch, ...]
    """One, or the pilot and the commit part; the same prompts in the same order."""
    rollouts: tuple[Rollout, ...]
    """This rank's share of the rollouts of these prompts, about as many tokens as the others'."""
    outcomes: tuple[Outcome, ...]
    """All ranks' outcomes of these prompts; without those whose failed reward drops the rollout."""
    filler: Rollout
    """Any rollout sampled on this rank."""
    num_tokens: int
    """Prompt and response tokens of everything that was sampled, all ranks, also of what is not trained on."""
    metrics: Mapping[str, float]
    """Failed rewards, and how dynamic sampling went."""


@dataclass(frozen=True)
class GroupedRewards:
    """Rewards of the whole batch, all ranks, in the same order on every rank: all that advantages are made of."""

    rewards: Tensor
    """`[num_rollouts]`, float32."""
    group_indices: Tensor
    """Group of each rollout, `[num_rollouts]`, int64."""
    prompt_ids: Tensor
    """Prompt of each rollout, `[num_rollouts]`, int64."""
    own_rows: Tensor
    """Positions of this rank's rollouts, `[num_rollouts on this rank]`, int64."""
    iteration: int = 0
    """RL iterations finished before this one."""
    is_pilot: Tensor | None = None
    """Rollouts of pilots, `[num_rollouts]`, bool, where pilot and commit share baselines; else `None`."""


@dataclass(frozen=True)
class RolloutBatch:
    """This rank's scored rollouts with their advantages: all that the policy update needs."""

    rollouts: tuple[Rollout, ...]
    """`[num_rollouts]` on this rank."""
    advantages: Tensor
    """Raw advantage of each rollout, `[num_rollouts]`, float32."""
    group_indices: Tensor
    """Group of each rollout, `[num_rollouts]`, int64."""
    group_prompts: Tensor
    """Position of each group's prompt in the batch, `[num_groups]`, int64; one group for each prompt, or two
    with a pilot."""
    group_shares: Tensor
    """Share of its prompt's weight in the gradient that the group has, `[num_groups]`, float64."""
    group_sizes: Tensor
    """Scored rollouts of each group, all ranks, `[num_groups]`, int64."""
    group_tokens: Tensor
    """Response tokens of each group, all ranks, `[num_groups]`, int64."""
    group_has_signal: Tensor
    """Groups of which a rollout, on any rank, has an advantage other than 0, `[num_groups]`, bool."""
    filler: Rollout
    """Any rollout sampled on this rank: with weight 0 it keeps a rank in step that has fewer micro-batches."""
    iteration: int = 0
    """RL iterations finished before this one: with the rollout's key it seeds whatever the loss draws at random."""
    rewards: GroupedRewards | None = None
    """Given if the advantages need a pass of the policy and are still to be made of them; the ones above are 0 then."""

    @property
    def response_lengths(self) -> Tensor:
        """Response tokens of each rollout, `[num_rollouts]`, int64."""
        return torch.tensor([len(rollout.token_ids) for rollout in self.rollouts], dtype=torch.int64)

    @property
    def token_rollouts(self) -> Tensor:
        """Which rollout each response token belongs to, `[num_tokens]`, int64."""
        return torch.arange(len(self.rollouts)).repeat_interleave(self.response_lengths)


@dataclass(frozen=True)
class IterationRecord:
    """What one RL iteration did; `training_step` returns it as `outputs["record"]` for callbacks to read."""

    batch: PromptBatch
    outcomes: tuple[Outcome, ...]
    """Every rollout of the global batch, sorted by prompt and sample index; dropped rollouts are not in it."""
    rollouts: tuple[Rollout, ...]
    """This rank's rollouts."""
    entropy: float
    """Mean policy entropy over all response tokens before the update, nats."""
    gradient_norms: tuple[float, ...]
    """Total gradient norm of each optimizer step, before clipping; empty if no rollout had a gradient."""
    num_tokens: int
    """Prompt and response tokens of the global batch."""
    factors: Mapping[str, Tensor]
    """By name the modulation factors of this rank's response tokens, `[num_tokens]` each."""
    seconds: Mapping[str, float]
    """Wall-clock seconds of each phase: generate, reward, logprobs, update."""
    metrics: Mapping[str, float]
    """Everything logged in this iteration, by metric name."""
    trained: RolloutBatch | None = None
    """This rank's rollouts with the advantages that they were trained with."""
