"""The interface of engines: token ids in, token ids with their log-probabilities out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from dynamo_lightning.engines.renamed import warn_once
from dynamo_lightning.engines.stopping import StopConfig
from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.types import FloatArray, IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_STOP = StopConfig()


@dataclass
class SamplingConfig:
    """Options of sampling."""

    max_response_length: int = 1024
    """Tokens after which a response is cut off."""
    temperature: float = 1.0
    """Divides the logits in training rollouts, and in the loss likewise."""
    stop_strings: list[str] = field(default_factory=list)
    """Strings that end a response, such as `<|im_end|>`, besides the end-of-sequence tokens; their tokens belong to the
    response and are trained on."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Further tokens that end a response, likewise."""
    logp_tolerance: float | None = None
    """Largest mean difference, in nats, between the log-probabilities that sampled the responses and those of the
    update; beyond it the run stops. `null` is 1e-3 in float32 and 0.05 in shorter types. Rollouts of older weights
    (`max_staleness`) and of a `token_filter` are not compared."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_response_length < 1:
            raise UserError(f"model.sampling.max_response_length must be at least 1, got {self.max_response_length}")
        if self.temperature <= 0:
            raise UserError(f"model.sampling.temperature must be positive, got {self.temperature}")
        if self.logp_tolerance is not None and not self.logp_tolerance > 0:
            raise UserError(f"model.sampling.logp_tolerance must be positive or null, got {self.logp_tolerance}")
        self.stop_options()

    def stop_options(self) -> dict[str, StopConfig]:
        """The argument `stop` of an engine; none if only end-of-sequence tokens end a response."""
        stop = StopConfig(tuple(self.stop_strings), tuple(self.stop_token_ids))
        return {} if stop == StopConfig() else {"stop": stop}


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Example:
        `Request((5, 6, 7), seed=11, max_tokens=64)`
    """

    token_ids: Sequence[int]
    """The prompt, and of a conversation everything that followed, `[num_tokens]`."""
    seed: int
    """63 bits; the response is a function of the weights, the tokens and the seed."""
    max_tokens: int
    """Tokens after which the response is cut off, at least 1."""


@dataclass(frozen=True, eq=False)
class Completion:
    """The response to a request.

    Example:
        `Completion([8, 2], [-0.7, -0.1], finished=True, version=3)`
    """

    token_ids: IntArray
    """`[response_length]`, with the token that ended it; at least one."""
    logprobs: FloatArray
    """Log-probability that each token was drawn with, nats, `[response_length]`."""
    finished: bool
    """False if `max_tokens` ended it."""
    version: int
    """Optimizer steps of the weights that sampled it."""
    token_statistics: FloatArray | None = None
    """As `Rollout.token_statistics`, if they were asked for, `[response_length, num_statistics]`."""

    def __post_init__(self) -> None:
        """Convert the numbers."""
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, dtype=np.int32))
        object.__setattr__(self, "logprobs", np.asarray(self.logprobs, dtype=np.float32))


Sampler = Callable[[Sequence[Request]], list[Completion]]
"""Samples requests, in their order."""


class Engine(ABC):
    """Samples responses from the policy."""

    uses_external_engine: ClassVar[bool] = False
    """True if another program samples, with a copy of the weights: its log-probabilities differ from the policy's then,
    and the loss corrects for it."""

    works_ahead: ClassVar[bool] = False
    """Asynchronous sampling: `begin` is implemented, and sampling needs neither the policy nor its device, so that it
    runs while the policy is trained."""

    gives_statistics: ClassVar[bool] = False
    """True if the engine can give `token_statistics`: it is the policy itself that samples."""

    push_difference: float | None = None
    """Mean difference of log-probabilities between engine and policy on fixed sequences after the last push, nats: the
    mismatch of two programs with the same weights. `None` if nothing was pushed."""

    synced_version: int = 0
    """Optimizer steps of the weights that sample: those of the last `sync`."""

    offload_optimizer: bool = False
    """True if the optimizer's state is in host memory from `sync` to `rest`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Accept `separate_engine`, the name of `uses_external_engine` in 0.1, from an engine of the user's own."""
        super().__init_subclass__(**kwargs)
        if "separate_engine" in vars(cls):
            warn_once(f"{cls.__qualname__}.separate_engine", "uses_external_engine")
            cls.uses_external_engine = bool(vars(cls)["separate_engine"])

    def sync(self, policy: PreTrainedModel, version: int) -> None:  # noqa: B027  # most engines need none
        """Push the policy's weights to the engine and check that they arrived; nothing to do for the policy itself.

        Called before training rollouts and before every evaluation, on all ranks at once, with the precision context of
        training; an engine that has these weights already returns.

        Args:
            policy: The current policy.
            version: Optimizer steps so far.

        Raises:
            RunError: If the engine does not have the policy's weights afterwards.
        """

    def rest(self) -> None:  # noqa: B027
        """Release memory until the next `sync`: nothing is sampled before; called on all ranks at once."""

    def close(self) -> None:  # noqa: B027
        """Shut down; called at the end of `fit`, `validate`, `test` and `predict`."""

    @property
    def samples_from_policy(self) -> bool:
        """True if every token is drawn from the policy's whole distribution: log-probabilities are comparable."""
        return True

    def engine_dtype(self, policy: PreTrainedModel) -> torch.dtype:
        """Data type of sampling: that of the trainer's mixed precision, or the policy's own."""
        kind = policy.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else policy.dtype

    def settings(self) -> dict[str, Any]:
        """Settings besides weights, prompt, seed, length limit and temperature that determine responses."""
        return {}

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Positions of the requests that one call of `generate` gets, batch after batch; by default it gets all.

        Responses of a batch are scored while the next one is sampled; every rank makes equally many batches.

        Args:
            lengths: Tokens that each request begins with, `[num_requests]`.
        """
        return [list(range(len(lengths)))]

    def begin(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        longest: int,
        temperature: float,
        stop: StopConfig = NO_STOP,
    ) -> Sampler:
        """Prepare asynchronous sampling.

        Args:
            policy: The current policy.
            tokenizer: Decodes the responses to find stop strings.
            longest: Tokens that a request and its response may have together.
            temperature: As in `generate`.
            stop: As in `generate`.

        Returns:
            A function that samples from the current weights, in any thread, without the policy and without other ranks.
        """
        raise NotImplementedError

    @abstractmethod
    def generate(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        *,
        temperature: float,
        stop: StopConfig = NO_STOP,
        with_statistics: bool = False,
    ) -> list[Completion]:
        """Sample one response for each request.

        The result of a request depends on its tokens and seed alone, not on the other requests.

        Args:
            policy: The current policy.
            tokenizer: Decodes the responses to find stop strings.
            requests: `[num_requests]`; every rank passes equally many.
            temperature: Divides the logits; 0 takes the likeliest token each time.
            stop: Ends of a response besides end-of-sequence tokens.
            with_statistics: Give `token_statistics`; only asked of an engine that `gives_statistics`.

        Returns:
            `[num_requests]`, in the order of the requests.
        """


def check_completions(requests: Sequence[Request], completions: Sequence[Completion], engine: Engine) -> None:
    """Check that an engine answered what it was asked.

    Raises:
        RunError: Naming the engine and what is wrong.
    """
    name = f"the engine {type(engine).__name__} (model.generator)"
    if len(completions) != len(requests):
        raise RunError(f"{name} returned {len(completions)} responses to {len(requests)} requests")
    for request, completion in zip(requests, completions, strict=True):
        length = len(completion.token_ids)
        if not 1 <= length <= request.max_tokens:
            raise RunError(
                f"{name} returned a response of {length} tokens where 1 to {request.max_tokens} were asked for: a "
                "response does not repeat the tokens of its request"
            )
        if len(completion.logprobs) != length or not np.isfinite(completion.logprobs).all():
            raise RunError(
                f"{name} returned {length} tokens with {len(completion.logprobs)} log-probabilities, which must be as "
                "many, and finite"
            )
        if completion.token_ids.min() < 0:
            raise RunError(f"{name} returned a negative token id, {completion.token_ids.min()}")
