"""The common part of vLLM engines, wherever they run: requests, pushes of weights, and their checks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.distributed import max_over_ranks, stop_together
from dynamo_lightning.engines.engine import NO_STOP, Completion, Engine, Request, Sampler
from dynamo_lightning.engines.stopping import StopConfig, stop_rule
from dynamo_lightning.engines.vllm.client import ServerDown
from dynamo_lightning.engines.vllm.weights import (
    cast_weights,
    checksum,
    compare_checksums,
    fingerprint,
    probe_sequences,
    sequence_logprobs,
)
from dynamo_lightning.errors import RunError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EngineDtype = Literal["auto", "float32", "bfloat16", "float16"]
NUM_PROBES, PROBE_LENGTH = 4, 32


@dataclass
class TokenFilter:
    """Exclusion of unlikely tokens from sampling: the policy is then trained on a distribution that is not its own."""

    top_p: float = 1.0
    """Keep the likeliest tokens up to this total probability; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the likeliest token's probability; 0 keeps all."""
    allow_biased_sampling: bool = False
    """Accept that importance ratios, and with them the gradient, are biased by such a filter."""

    def __post_init__(self) -> None:
        """Refuse a bias that is not asked for."""
        if not 0 < self.top_p <= 1 or self.top_k < 0 or not 0 <= self.min_p <= 1:
            raise UserError(
                "model.generator.token_filter needs top_p in (0, 1], top_k ≥ 0 and min_p in [0, 1], got "
                f"{self.top_p}, {self.top_k} and {self.min_p}"
            )
        if (self.top_p < 1 or self.top_k > 0 or self.min_p > 0) and not self.allow_biased_sampling:
            raise UserError(
                f"model.generator.token_filter: top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p} leave out "
                "tokens that the policy would sample, which biases the importance ratios: set top_p to 1, top_k and "
                "min_p to 0, or accept it by model.generator.token_filter.allow_biased_sampling=true"
            )


@dataclass(frozen=True)
class Output:
    """Response of vLLM to one request."""

    token_ids: tuple[int, ...]
    """`[response_length]`, with the token that ended it."""
    logprobs: tuple[float, ...]
    """`[response_length]`, nats, after temperature and filter."""
    versions: frozenset[str]
    """Versions of the weights that sampled it."""


class VLLMEngine(Engine):
    """Samples with a vLLM engine that has a copy of the weights.

    Each rollout is a request of its own with its own seed, so that it depends neither on its neighbours nor on the
    number of processes; the engine's prefix cache computes a prompt once for its whole group.

    Args:
        max_model_len: Tokens of prompt and response together that the engine has room for; `null` takes the model's
            limit.
        dtype: Type the engine computes in; `auto` is that of the trainer: its mixed precision, or the policy's own.
        token_filter: Exclusion of unlikely tokens.
        max_logprob_difference: Largest mean difference between engine and policy on a few random sequences after a
            push, nats; `null` is 1e-4 for float32 and 0.2 for shorter types.
    """

    uses_external_engine = True

    def __init__(
        self,
        max_model_len: int | None,
        dtype: EngineDtype,
        token_filter: TokenFilter,
        max_logprob_difference: float | None,
    ) -> None:
        if max_model_len is not None and max_model_len < 2:
            raise UserError(f"model.generator.max_model_len must be at least 2, got {max_model_len}")
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.token_filter = token_filter
        self.max_logprob_difference = max_logprob_difference
        self._synced: tuple[Any, ...] | None = None
        """Version and fingerprint of the weights that the engine has; `None` if it has none or sleeps."""

    # --- abstract: by kind of engine ----------------------------------------------------------------------------------

    @abstractmethod
    def start(self, policy: PreTrainedModel, dtype: torch.dtype) -> None:
        """Start or reach the engine, if that has not been done.

        Raises:
            RunError: If there is none; names the option to change.
        """

    def label(self, version: int) -> str:
        """Name of the weights' version within the engine."""
        return str(version)

    @abstractmethod
    def push(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        """Load the weights, forget everything cached of older ones, and label the engine with the version."""

    @abstractmethod
    def engine_state(self) -> list[Mapping[str, Any]]:
        """`weight_checksums` of every worker, with the engine's `version`."""

    @abstractmethod
    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities of given sequences by every engine, `[count, length − 1]` each, float32."""

    @abstractmethod
    def complete(self, requests: Sequence[Request], params: Mapping[str, Any], version: str) -> list[Output]:
        """Sample the requests, in order, with vLLM's sampling parameters and each request's seed and `max_tokens`."""

    # --- weights ------------------------------------------------------------------------------------------------------

    @override
    def sync(self, policy: PreTrainedModel, version: int) -> None:
        state = (version, fingerprint(policy))
        if state == self._synced:
            return
        self._synced = None
        dtype = self.engine_dtype(policy)
        with together():
            self.start(policy, dtype)
        label, expected = self.label(version), dict[str, int]()

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name, value in cast_weights(policy, dtype):
                expected[name] = checksum(value)
                yield name, value

        sequences = probe_sequences(policy, version, NUM_PROBES, min(PROBE_LENGTH, self.context_length - 1))
        logprobs = sequence_logprobs(policy, sequences)
        source = weights()
        with together():
            try:
                self.push(source, label)
            finally:
                for _ in source:  # a sharded policy is gathered on all ranks, whichever of them push or fail
                    pass
        with together():
            self.check_weights(expected, label)
            self.check_logprobs(sequences, logprobs, label, dtype)
        self._synced = state
        self.synced_version = version

    @override
    def engine_dtype(self, policy: PreTrainedModel) -> torch.dtype:
        """The type that the engine computes in."""
        return super().engine_dtype(policy) if self.dtype == "auto" else getattr(torch, self.dtype)

    @property
    @override
    def samples_from_policy(self) -> bool:
        """True without a token filter."""
        return self.token_filter.top_p == 1 and self.token_filter.top_k == 0 and self.token_filter.min_p == 0

    def check_weights(self, expected: Mapping[str, int], version: str) -> None:
        """Compare what the engine holds with what was sent.

        Raises:
            RunError: Names the version and the parameters that differ.
        """
        states = self.engine_state()
        stale = {state["version"] for state in states} - {version}
        if stale:
            raise RunError(f"weights of version {version} were pushed, but an engine has version {sorted(stale)[0]}")
        for state in states:
            resident = {name: int(value) for name, value in state["checksums"].items()}
            different, compared = compare_checksums(expected, resident, state["packed"], state["copies"])
            if different or not compared:
                named = f"parameters that differ: {', '.join(different[:5])}" if compared else "no name is the policy's"
                raise RunError(
                    f"the vLLM engine does not hold the policy's weights of version {version} after the push "
                    f"({len(different)} of {compared} comparable parameters; {named}): training would go on with "
                    "stale rollouts, so it stops here; the last checkpoint is intact"
                )

    def check_logprobs(
        self, sequences: Sequence[Sequence[int]], expected: Tensor, version: str, dtype: torch.dtype
    ) -> None:
        """Compare log-probabilities of a few sequences with the policy's: packed copies that stayed behind show there.

        Raises:
            RunError: If they differ by more than allowed.
        """
        limit = self.max_logprob_difference or (1e-4 if dtype == torch.float32 else 0.2)
        for values in self.score(sequences):
            self.push_difference = difference = float((values - expected).abs().mean())
            if not difference <= limit:
                raise RunError(
                    f"after the push of version {version} the vLLM engine's log-probabilities differ from the policy's "
                    f"by {difference:.2e} on average (at most {limit:.0e} is allowed): it computes with other weights, "
                    "or model.generator.dtype is too coarse for model.generator.max_logprob_difference"
                )

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its response may have together; known once the engine has started."""
        assert self.max_model_len is not None
        return self.max_model_len

    @override
    def settings(self) -> dict[str, Any]:
        return {"dtype": self.dtype, **asdict(self.token_filter)}

    # --- rollouts -----------------------------------------------------------------------------------------------------

    @override
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

        Raises:
            UserError: If a request with its response may not fit.
            RunError: If the engine has not been given the policy's weights as they are, or samples from others.
        """
        longest = max(len(request.token_ids) + request.max_tokens for request in requests)
        return self.begin(policy, tokenizer, longest=longest, temperature=temperature, stop=stop)(requests)

    @override
    def begin(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        longest: int,
        temperature: float,
        stop: StopConfig = NO_STOP,
    ) -> Sampler:
        """Check what `generate` needs, and prepare the sampling, which runs without the policy.

        Args and errors are those of `generate`.
        """
        if self._synced is None or self._synced[1] != fingerprint(policy):
            raise RunError("the policy has changed since its weights were pushed to vLLM: call sync() first")
        longest = max_over_ranks(longest, policy.device)
        if longest > self.context_length:
            raise UserError(
                f"a prompt with its response may need {longest} tokens, but model.generator.max_model_len is "
                f"{self.context_length}: raise it, or lower data.max_prompt_length or "
                "model.sampling.max_response_length"
            )
        rule = stop_rule(policy, tokenizer, stop)
        params = self.sampling_params(rule.token_ids, temperature)
        number = self._synced[0]
        version = self.label(number)

        def sample(requests: Sequence[Request]) -> list[Completion]:
            outputs = self.complete(requests, params, version)
            check_outputs(outputs, version)
            completions = []
            for output in outputs:
                # The engine has no tokenizer: what follows a stop string that is no token of its own is cut off here.
                end = rule.response_length(output.token_ids, tokenizer)
                tokens = np.array(output.token_ids[:end], dtype=np.int32)
                logprobs = np.array(output.logprobs[:end], dtype=np.float32)
                completions.append(Completion(tokens, logprobs, end is not None, number))
            return completions

        return sample

    def sampling_params(self, stop_ids: Sequence[int], temperature: float) -> dict[str, Any]:
        """Sampling parameters as vLLM has them, but for those of each request."""
        return {
            "temperature": temperature,
            "top_p": self.token_filter.top_p,
            "top_k": self.token_filter.top_k,
            "min_p": self.token_filter.min_p,
            "logprobs": 0,  # of the sampled token only
            # Which tokens end a response is for the policy's configuration to say, not for the engine's own reading.
            "ignore_eos": True,
            "stop_token_ids": list(stop_ids),
            "detokenize": False,
        }


@contextmanager
def plain_precision() -> Iterator[None]:
    """Out of the trainer's precision context: an engine decides by itself what it computes in."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def together() -> Iterator[None]:
    """In plain precision, on all ranks: what goes wrong on any of them is raised on all."""
    message = ""
    try:
        with plain_precision():
            yield
    except (RuntimeError, ServerDown) as error:
        message = str(error)
    stop_together(message)


def check_outputs(outputs: Sequence[Output], version: str) -> None:
    """Check that the right weights sampled every response, and that its log-probabilities are numbers.

    Raises:
        RunError: Otherwise.
    """
    for output in outputs:
        if output.versions != {version}:
            raise RunError(
                f"vLLM sampled a response from weights of version {', '.join(sorted(output.versions))} instead of "
                f"{version}: something else updates the engine"
            )
        if not output.token_ids or not all(math.isfinite(value) for value in output.logprobs):
            raise RunError("vLLM returned a response without tokens, or log-probabilities that are not finite")
