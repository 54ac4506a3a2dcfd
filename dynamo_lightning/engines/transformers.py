"""Rollouts by transformers' own `generate`: no engine to install, exact log-probabilities, right for small models.

It is called for a few tokens at a time, and goes on without the responses that have ended.

Sampling is done by adding Gumbel noise to the log-probabilities and taking the largest (the Gumbel-max trick). The
noise of each token comes from a counter-based generator keyed by the request's seed, the position and the token, so a
response does not depend on its neighbours in the batch, on the rank or on any generator's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.distributed import max_over_ranks, world_size
from dynamo_lightning.engines.engine import NO_STOP, Completion, Engine, Request
from dynamo_lightning.engines.stopping import StopConfig, StopRule, stop_rule
from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.token_statistics import distribution_statistics
from dynamo_lightning.policy.sharding import unwrapped
from dynamo_lightning.types import FloatArray

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

SEGMENT_LENGTH = 16
"""Tokens after which responses that have ended are left out of the batch; they would cost as much as the others."""
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""SplitMix64's increment: 2⁶⁴ divided by the golden ratio."""


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift of 64-bit integers; torch's own is arithmetic."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _as_int64(value: int) -> int:
    """The lowest 64 bits of an unsigned number, as torch's signed integer."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit integers whose output passes as random (Steele et al., 2014)."""
    values = (values ^ _shift_right(values, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    values = (values ^ _shift_right(values, 27)) * _as_int64(0x94D049BB133111EB)
    return values ^ _shift_right(values, 31)


def gumbel_noise(seeds: Tensor, position: int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, a pure function of seed, position and token.

    Args:
        seeds: `[num_sequences]`, int64.
        position: Position of the token within the response.
        vocab_size: Number of tokens.

    Returns:
        `[num_sequences, vocab_size]`, float64: in float32 the noise would end at 16.6, and tokens rarer than 6e-8 could
        never be drawn.
    """
    rows = _mix(seeds + _as_int64(GOLDEN_GAMMA * (position + 1)))
    tokens = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=seeds.device) * _as_int64(GOLDEN_GAMMA)
    bits = _mix(_mix(rows[:, None] + tokens[None, :]))
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


class GumbelSampler:
    """A logits processor after which the largest score is a sample; keeps the log-probability of each.

    Args:
        seeds: Seed of each sequence, `[num_sequences]`, int64.
        prompt_length: Padded length of the prompts.
        temperature: Divides the logits; 0 takes the likeliest token, with its log-probability at temperature 1.
        with_statistics: Keep the statistics of the distributions too.
    """

    def __init__(self, seeds: Tensor, prompt_length: int, temperature: float, with_statistics: bool = False) -> None:
        self.seeds = seeds
        self.with_statistics = with_statistics
        self.statistics: list[Tensor] = []
        """`[num_sequences, num_statistics]` of each token, columns as the fields of `TokenStatistics`."""
        self.prompt_length = prompt_length
        self.temperature = temperature
        self.sampled_logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy scores, `[num_sequences, vocab_size]`, whose arg-max is the sampled token."""
        logprobs = torch.log_softmax(scores.float() / (self.temperature or 1.0), dim=-1)
        if self.temperature == 0:
            self.keep(logprobs, logprobs.amax(-1))
            return logprobs
        noise = gumbel_noise(self.seeds, input_ids.shape[1] - self.prompt_length, scores.shape[-1])
        noisy = logprobs + noise
        self.keep(logprobs, logprobs.gather(-1, noisy.argmax(-1, keepdim=True)).squeeze(-1))
        return noisy

    def keep(self, logprobs: Tensor, sampled: Tensor) -> None:
        """Keep what is known of the next token: log-probabilities of the vocabulary and of the sampled one."""
        self.sampled_logprobs.append(sampled)
        if self.with_statistics:
            self.statistics.append(torch.stack([sampled, *distribution_statistics(logprobs)], dim=-1))


class TransformersEngine(Engine):
    """Samples with transformers' `generate`.

    Args:
        batch_size: Responses generated side by side; prompts of similar length go together.
    """

    gives_statistics = True

    def __init__(self, batch_size: int = 128) -> None:
        if batch_size < 1:
            raise UserError(f"model.generator.batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size

    @override
    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    @torch.no_grad()
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
        rule = stop_rule(policy, tokenizer, stop)
        sampled: dict[int, Completion] = {}
        for chosen in self.batches([len(request.token_ids) for request in requests]):
            own = [requests[i] for i in chosen]
            completions = _generate_batch(
                policy, tokenizer, own, temperature, rule, self.synced_version, with_statistics
            )
            sampled.update(zip(chosen, completions, strict=True))
        return [sampled[i] for i in range(len(requests))]


def _generate_batch(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    temperature: float,
    rule: StopRule,
    version: int,
    with_statistics: bool,
) -> list[Completion]:
    """Responses side by side, prompts padded on the left; every few tokens those that have ended are left out."""
    prompt_length = max(len(request.token_ids) for request in requests)
    longest = max_over_ranks(max(request.max_tokens for request in requests), policy.device)
    prompts = torch.full((len(requests), prompt_length), tokenizer.pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(prompts)
    for row, request in enumerate(requests):
        length = len(request.token_ids)
        prompts[row, prompt_length - length :] = torch.tensor(request.token_ids)
        attention_mask[row, prompt_length - length :] = 1
    prompts, attention_mask = prompts.to(policy.device), attention_mask.to(policy.device)
    seeds = torch.tensor([request.seed for request in requests], dtype=torch.int64, device=policy.device)
    responses: list[list[int]] = [[] for _ in requests]
    logprobs: list[list[float]] = [[] for _ in requests]
    statistics: list[list[FloatArray]] = [[] for _ in requests]
    ended = [False] * len(requests)
    running = list(range(len(requests)))
    sequences, cache = prompts, None
    for start in range(0, longest, SEGMENT_LENGTH):
        sampler = GumbelSampler(seeds[running or [0]], prompt_length, temperature, with_statistics)
        num_new = min(SEGMENT_LENGTH, longest - start)
        longer, cache = _continue(policy, sequences, attention_mask, cache, sampler, num_new, rule.token_ids, tokenizer)
        new_tokens = longer[:, sequences.shape[1] :].tolist()
        new_logprobs = torch.stack(sampler.sampled_logprobs, dim=1).tolist()
        new_statistics = torch.stack(sampler.statistics, dim=1).cpu().numpy() if with_statistics else None
        unfinished = []
        for position, row in enumerate(running):
            responses[row] += new_tokens[position]
            logprobs[row] += new_logprobs[position]
            if new_statistics is not None:
                statistics[row].append(new_statistics[position])
            limit = requests[row].max_tokens
            end = rule.response_length(responses[row][:limit], tokenizer)
            ended[row] = end is not None
            if end is None and len(responses[row]) < limit:
                unfinished.append(position)
            kept = limit if end is None else end
            responses[row], logprobs[row] = responses[row][:kept], logprobs[row][:kept]
        if not max_over_ranks(len(unfinished), policy.device):
            break
        running = [running[position] for position in unfinished]
        if running:
            sequences = longer[unfinished]
            added = attention_mask.new_ones(len(unfinished), longer.shape[1] - attention_mask.shape[1])
            attention_mask = torch.cat([attention_mask[unfinished], added], dim=1)
            cache = _select_rows(cache, unfinished)
        else:  # a sharded policy runs on all ranks or on none: this one goes along with the others
            sequences, attention_mask, cache = prompts[:1], torch.ones_like(prompts[:1]), None
    return [
        Completion(
            np.array(tokens, dtype=np.int32),
            np.array(values, dtype=np.float32),
            end,
            version,
            np.concatenate(parts)[: len(tokens)] if with_statistics else None,
        )
        for tokens, values, end, parts in zip(responses, logprobs, ended, statistics, strict=True)
    ]


def _continue(
    policy: PreTrainedModel,
    sequences: Tensor,
    attention_mask: Tensor,
    cache: Cache | None,
    sampler: GumbelSampler,
    num_new: int,
    stop_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Tensor, Cache | None]:
    """Up to so many more tokens for each sequence, `[num_sequences, longer]`, and the cache of keys and values."""
    from transformers import GenerationConfig, LogitsProcessorList

    # A layer compiled for updates would be compiled again and again for the growing cache.
    with torch.compiler.set_stance("force_eager"), unwrapped(policy) as model:
        own_config = model.generation_config
        # `generate` fills whatever a given config leaves open from the model's own (Qwen's has a repetition penalty and
        # top-k): the policy would not be what is sampled from. So the model's own is put aside.
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=num_new,
            eos_token_id=list(stop_ids),
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )
        try:
            output = model.generate(  # type: ignore[operator]  # a mixin's method that mypy takes for a buffer
                input_ids=sequences,
                attention_mask=attention_mask,
                **({} if cache is None else {"past_key_values": cache}),
                logits_processor=LogitsProcessorList([sampler]),
                synced_gpus=world_size() > 1,
            )
        finally:
            model.generation_config = own_config
    return output.sequences, output.get("past_key_values")


def _select_rows(cache: Cache | None, rows: Sequence[int]) -> Cache | None:
    """Only these rows of a cache; none, so that the sequences are read again, if it is of a kind that has no rows."""
    from transformers import cache_utils

    own_kind = type(cache).__module__ != cache_utils.__name__  # a model's own, with states that need not follow
    if cache is None or own_kind or not all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
        return None
    cache.batch_select_indices(torch.tensor(rows))
    has_other_rows = any(state.ndim > 1 and state.shape[0] != len(rows) for state in _states(cache))
    return None if has_other_rows else cache


def _states(cache: Cache) -> Iterator[Tensor]:
    """Every tensor in the layers of a cache."""
    for value in (value for layer in cache.layers for value in vars(layer).values()):
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(part, Tensor):
                yield part
