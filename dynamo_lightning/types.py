"""The records that travel through the loop, one page: prompts → allocation → rollouts → rewards → advantages → loss.

All but one are frozen dataclasses. Two rollouts are never matched by position, always by `(prompt_id, sample_index)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Key = tuple[int, int]
"""`(prompt_id, sample_index)`."""
Status = Literal["finished", "truncated", "failed"]


@dataclass(frozen=True)
class Prompt:
    """One verifiable problem, ready to be generated from."""

    prompt_id: int
    """Stable 63-bit hash of source, question and answer: the same in every run and whatever the row's position."""
    question: str
    """The problem as the data set states it, before any template."""
    text: str
    """Text that the policy reads: the question after the chat template or format string."""
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
    commit_least: int = 0
    """Rollouts that the prompt's commit group has whatever its pilot shows, the first ones; 0 without a pilot."""
    commit_mean: float = 0.0
    """Mean size of the batch's commit groups, as the budget has it: known before the pilot; 0 without a pilot."""

    @property
    def sample_indices(self) -> range:
        """Sample indices of its rollouts."""
        return range(self.first_sample_index, self.first_sample_index + self.size)

    @property
    def keys(self) -> list[Key]:
        """Keys of its rollouts, `[size]`."""
        return [(self.prompt.prompt_id, index) for index in self.sample_indices]


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
    """One rollout to sample; the seed makes it independent of how requests are batched or spread over ranks."""

    prompt: Prompt
    sample_index: int
    """Position within the prompt's group, 0 … group_size − 1."""
    seed: int
    """63-bit seed from (run seed, iteration, prompt id, sample index)."""

    @property
    def key(self) -> Key:
        """Key of its rollout."""
        return self.prompt.prompt_id, self.sample_index


@dataclass(frozen=True)
class Turn:
    """A span of tokens that the policy sampled in one go.

    Example:
        A response of three tokens, an observation of two and a second response of one: `Turn(0, 3)` and `Turn(5, 6)`.
    """

    start: int
    """Position of its first token in `Rollout.token_ids`."""
    stop: int
    """Position behind its last token."""
    version: int = 0
    """Optimizer steps of the weights that sampled it."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled conversation: of one turn, or of several with what an environment said in between.

    Its numbers are numpy arrays; sequences of numbers are converted. "Response tokens" are those that the policy
    sampled: only they are trained on.

    Example:
        `Rollout(prompt, sample_index=0, token_ids=[52, 2], logprobs=[-0.3, -0.01], text="4")`; with an observation of
        two tokens after the first turn of one: `Rollout(prompt, 0, [52, 7, 8, 2], [-0.3, -0.01], "4",
        loss_mask=[True, False, False, True], turns=(Turn(0, 1), Turn(3, 4)))`
    """

    prompt: Prompt
    sample_index: int
    token_ids: IntArray
    """All tokens after the prompt, with the end-of-sequence tokens that came, `[num_tokens]`, at least one."""
    logprobs: FloatArray
    """The engine's own log-probability of each response token, nats, float32, `[response_length]`."""
    text: str
    """Text that the policy said, decoded without special tokens; several turns are joined by a line break."""
    status: Status = "finished"
    """`truncated` if the length limit ended it, `failed` if its environment raised an exception."""
    loss_mask: BoolArray = None  # type: ignore[assignment]  # an array once it is there
    """True at response tokens, `[num_tokens]`; by default everywhere."""
    turns: tuple[Turn, ...] = ()
    """Spans that were sampled in one go, in order; by default everything is one."""
    environment_reward: float | None = None
    """Sum of what the environment gave, in place of the reward function's; `None` if it gave nothing."""
    failure: str = ""
    """The environment's exception in words, for the log."""
    token_statistics: FloatArray | None = None
    """Statistics of the distribution that each response token was drawn from, `[response_length, num_statistics]`,
    columns as the fields of `TokenStatistics`; `None` if the engine does not give them."""

    def __post_init__(self) -> None:
        """Convert the numbers and fill in the defaults."""
        token_ids = np.asarray(self.token_ids, dtype=np.int32)
        mask = np.ones(len(token_ids), dtype=bool) if self.loss_mask is None else self.loss_mask
        object.__setattr__(self, "token_ids", token_ids)
        object.__setattr__(self, "logprobs", np.asarray(self.logprobs, dtype=np.float32))
        object.__setattr__(self, "loss_mask", np.asarray(mask, dtype=bool))
        object.__setattr__(self, "turns", self.turns or (Turn(0, len(token_ids)),))

    def __eq__(self, other: object) -> bool:
        """Equality of all fields; `==` of arrays alone would give an array."""
        return isinstance(other, Rollout) and all(
            np.array_equal(own, theirs) if isinstance(own, np.ndarray) else own == theirs
            for own, theirs in ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        )

    def __hash__(self) -> int:
        """Hash of the key."""
        return hash(self.key)

    @property
    def key(self) -> Key:
        """Key that outcomes are joined on: `(prompt_id, sample_index)`."""
        return self.prompt.prompt_id, self.sample_index

    @property
    def truncated(self) -> bool:
        """True if the length limit ended it."""
        return self.status == "truncated"

    @property
    def response_length(self) -> int:
        """Number of response tokens."""
        return int(np.count_nonzero(self.loss_mask))

    @property
    def response_ids(self) -> IntArray:
        """The response tokens, `[response_length]`."""
        return self.token_ids[self.loss_mask]


@dataclass(frozen=True)
class Score:
    """Reward of one rollout."""

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
    """Tokens that the policy sampled."""
    truncated: bool
    """The length limit ended it."""
    num_observed: int = 0
    """Tokens that its environment said."""

    @property
    def key(self) -> Key:
        """`(prompt_id, sample_index)`."""
        return self.prompt_id, self.sample_index

    @property
    def num_tokens(self) -> int:
        """All tokens after the prompt."""
        return self.response_length + self.num_observed


@dataclass(frozen=True)
class RolloutGroup:
    """A planned group with what became of it.

    Example:
        `RolloutGroup(GroupPlan(prompt, size=2), rollouts=(r0,), outcomes=(o0, o1))`: the second of its two rollouts is
        another rank's.
    """

    plan: GroupPlan
    rollouts: tuple[Rollout, ...]
    """Those that this rank has, in any order."""
    outcomes: tuple[Outcome, ...]
    """All ranks' outcomes, by sample index; without those whose failed reward drops the rollout."""


@dataclass(frozen=True)
class Collected:
    """Rollouts of an iteration that will be trained on."""

    iteration: int
    """RL iterations finished before this one."""
    groups: tuple[RolloutGroup, ...]
    """One of each prompt, or with a pilot all pilot groups and then all commit groups. This rank's rollouts in them
    are about as many tokens as the others'."""
    filler: Rollout
    """Any rollout sampled on this rank."""
    num_tokens: int
    """Prompt and response tokens of everything that was sampled, all ranks, also of what is not trained on."""
    metrics: Mapping[str, float]
    """Failed rewards, staleness, and how dynamic sampling went."""

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """All ranks' outcomes, by position of the prompt and sample index."""
        position: dict[int, int] = {}
        for group in self.groups:
            position.setdefault(group.plan.prompt.prompt_id, len(position))
        found = (outcome for group in self.groups for outcome in group.outcomes)
        return tuple(sorted(found, key=lambda outcome: (position[outcome.prompt_id], outcome.sample_index)))


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
    is_certain: Tensor | None = None
    """Commit rollouts that there are whatever the pilot shows, `GroupPlan.commit_least` each, `[num_rollouts]`, bool;
    given with `is_pilot`."""
    commit_mean: float = 0.0
    """`GroupPlan.commit_mean`."""


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
        return torch.tensor([rollout.response_length for rollout in self.rollouts], dtype=torch.int64)

    @property
    def token_rollouts(self) -> Tensor:
        """Which rollout each response token belongs to, `[num_tokens]`, int64."""
        return torch.arange(len(self.rollouts)).repeat_interleave(self.response_lengths)


@dataclass(frozen=True)
class IterationRecord:
    """Record of one RL iteration; `training_step` returns it as `outputs["record"]` for callbacks to read."""

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
    token_values: Mapping[str, Tensor] = field(default_factory=dict)
    """By name values of the response tokens of this rank's rollouts that have an outcome, `[num_tokens]` each:
    `advantage` after modulation, and `entropy` before the update (nats, NaN where it was not computed)."""
    trained: RolloutBatch | None = None
    """This rank's rollouts with the advantages that they were trained with."""
