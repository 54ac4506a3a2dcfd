"""Log-probability, entropy, Σπ²Λ and Σπ² of every response token, from hidden states, a piece of the logits at a time.

The logits of a batch (`[num_tokens, vocab_size]`) are the largest tensor of a training step. They are never held whole.
`token_statistics` serves any loss; `chunked_loss` is faster where each token's loss is known from its own statistics.
The arithmetic is in `logits_tiles.py` and `fused_statistics.py`; `statistics_from_logits` is the plain reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.fused_statistics import LossFunction, StatisticsFunction
from dynamo_lightning.losses.logits_tiles import Tiling, statistics_dtype

MAX_LOGITS_BYTES = 80 * 2**20
"""Default bound on the memory of the logits held at once, with the scratch memory they are worked on in."""
TILE_WIDTHS = {"cpu": 2048, "cuda": 8192}
"""Vocabulary entries worked on at once, where the bound allows, by device: on a CPU a tile should stay in its cache."""


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of the policy's distribution π at each response token."""

    logprobs: Tensor
    """log π(a) of the sampled token a, `[num_tokens]`, nats."""
    entropy: Tensor
    """H = −Σ_k π_k log π_k over the vocabulary, `[num_tokens]`, nats."""
    squared_prob_lambda: Tensor
    """Σ_k π_k² Λ_k with Λ_k = log π_k + H, over the vocabulary, `[num_tokens]`."""
    squared_probs: Tensor | None = None
    """Σ_k π_k² over the vocabulary, `[num_tokens]`, in (0, 1], never with gradient; `None` only where a caller that has
    no use for it left it out."""

    def detach(self) -> TokenStatistics:
        """The same numbers without their graph."""
        squared_probs = None if self.squared_probs is None else self.squared_probs.detach()
        return TokenStatistics(
            self.logprobs.detach(), self.entropy.detach(), self.squared_prob_lambda.detach(), squared_probs
        )

    def squared_logit_gradient(self) -> Tensor:
        """`‖∇_z log π(a)‖² = 1 − 2π(a) + Σ_k π_k²` of each token, `[num_tokens]`, in [0, 2].

        As `(1 − π(a))² + (Σ_k π_k² − π(a)²)`, which does not cancel where π(a) is all but 1.

        Raises:
            ValueError: If Σπ² was left out.
        """
        if self.squared_probs is None:
            raise ValueError("these token statistics were made without squared_probs")
        others = (self.squared_probs - (2.0 * self.logprobs).exp()).clamp(min=0.0)
        return torch.expm1(self.logprobs).square() + others


def columns_of(statistics: TokenStatistics) -> tuple[Tensor, ...]:
    """The statistics in the order of their fields, `[num_tokens]` each; without Σπ² if it was left out."""
    values = (getattr(statistics, field.name) for field in fields(statistics))
    return tuple(value for value in values if value is not None)


def statistics_from_logits(
    logits: Tensor, targets: Tensor, entropy_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four statistics from whole logits.

    `Σπ²Λ = Σ π² log π + H Σ π²`, an expectation over the vocabulary (arXiv 2602.19208 puts a mean over the sampled
    tokens of the sequence in its place).

    Args:
        logits: `[num_tokens, vocab_size]`, already divided by the temperature.
        targets: Sampled tokens, `[num_tokens]`.
        entropy_gradient: Entropies and Σπ²Λ carry gradients as well; log-probabilities always do.

    Returns:
        log-probabilities, entropies, Σπ²Λ and Σπ² (without gradient), each `[num_tokens]`, in float32 (float64 for
        float64 logits).
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    all_logprobs = functional.log_softmax(logits, dim=-1)
    logprobs = all_logprobs.gather(-1, targets[:, None]).squeeze(-1)
    if not entropy_gradient:
        all_logprobs = all_logprobs.detach()
    return logprobs, *distribution_statistics(all_logprobs)


def distribution_statistics(all_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropies, Σπ²Λ and Σπ² (without gradient), `[num_tokens]` each, from log-probabilities of the vocabulary.

    Args:
        all_logprobs: `[num_tokens, vocab_size]`, nats.
    """
    probs = all_logprobs.exp()
    # A token that a mask has made impossible has log π = −∞ and π = 0; its share π log π is 0, not NaN.
    weighted = torch.where(probs > 0, probs * all_logprobs, 0.0)
    entropy = -weighted.sum(-1)
    squared_probs = probs.square().sum(-1)
    squared_prob_lambda = (probs * weighted).sum(-1) + entropy * squared_probs
    return entropy, squared_prob_lambda, squared_probs.detach()


def token_statistics(
    hidden_states: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    head_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = True,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> TokenStatistics:
    """The four statistics from hidden states, for any loss.

    The logits are made in tiles of some tokens and some of the vocabulary, and again in the backward pass: four matrix
    products of the head. Under autocast the products take its type, the statistics stay float32.

    Args:
        hidden_states: Input of the vocabulary head at each response token, `[num_tokens, hidden_size]`.
        head_weight: `[vocab_size, hidden_size]`.
        targets: Sampled tokens, `[num_tokens]`.
        head_bias: `[vocab_size]`, if the head has one.
        temperature: Divides the logits, as it did when the tokens were sampled.
        softcap: `c` of models that pass logits through `c · tanh(logits / c)`.
        entropy_gradient: Entropies and Σπ²Λ carry gradients as well; where they only enter detached factors,
            their gradient would be time for nothing.
        max_logits_bytes: Bound on the memory of the logits held at once and of what they are worked on in; at least
            one token's are held.

    Returns:
        The statistics, differentiable with respect to hidden states, weight and bias.

    Raises:
        UserError: If the bound is not positive.
    """
    tiling = make_tiling(hidden_states, head_weight, temperature, softcap, max_logits_bytes, whole_rows=False)
    return TokenStatistics(
        *StatisticsFunction.apply(hidden_states, head_weight, head_bias, targets, tiling, entropy_gradient)
    )


def chunked_loss(
    hidden_states: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    token_loss: Callable[[TokenStatistics, slice], Tensor],
    *,
    head_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = False,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> Tensor:
    """A loss that is a sum over tokens, with each chunk's gradient made while its logits are at hand.

    Three matrix products of the head. Equal to `token_loss(token_statistics(...), slice(0, num_tokens))` for every
    loss whose shares add up; not for one that couples tokens of different chunks (GSPO's sequence ratio, normalisers
    over the micro-batch). Only hidden states, weight and bias get gradients, and only once (no `retain_graph`); they
    are made in the forward pass and scaled by what reaches the backward pass. In float16 that would be too late to
    keep small ones from vanishing: there the statistics are computed first, as for any loss.

    Args:
        hidden_states: As in `token_statistics`, like all that is not named here.
        head_weight: `[vocab_size, hidden_size]`.
        targets: Sampled tokens, `[num_tokens]`.
        token_loss: Gives a chunk's share of the loss, a scalar, from the chunk's statistics and the slice of
            `0..num_tokens` that it is; called once for each chunk, in order.
        head_bias: `[vocab_size]`, if the head has one.
        temperature: Divides the logits.
        softcap: `c` of `c · tanh(logits / c)`.
        entropy_gradient: The loss is differentiated through entropies and Σπ²Λ as well.
        max_logits_bytes: Bound on the memory of a chunk.

    Returns:
        The loss, a scalar.

    Raises:
        UserError: If the bound is not positive.
    """

    def block_loss(parts: tuple[Tensor, Tensor, Tensor, Tensor], tokens: slice) -> Tensor:
        return token_loss(TokenStatistics(*parts), tokens)

    tiling = make_tiling(hidden_states, head_weight, temperature, softcap, max_logits_bytes, whole_rows=True)
    if tiling.dtype == torch.float16:
        statistics = token_statistics(
            hidden_states,
            head_weight,
            targets,
            head_bias=head_bias,
            temperature=temperature,
            softcap=softcap,
            entropy_gradient=entropy_gradient,
            max_logits_bytes=max_logits_bytes,
        )
        return token_loss(statistics, slice(0, len(targets)))
    if not torch.is_grad_enabled():
        hidden_states, head_weight = hidden_states.detach(), head_weight.detach()
        head_bias = None if head_bias is None else head_bias.detach()
    return LossFunction.apply(hidden_states, head_weight, head_bias, targets, tiling, block_loss, entropy_gradient)


def make_tiling(
    hidden_states: Tensor,
    head_weight: Tensor,
    temperature: float,
    softcap: float | None,
    max_logits_bytes: int,
    *,
    whole_rows: bool,
) -> Tiling:
    """The largest pieces that fit the memory bound.

    Args:
        hidden_states: `[num_tokens, hidden_size]`.
        head_weight: `[vocab_size, hidden_size]`.
        temperature: Divides the logits.
        softcap: `c` of `c · tanh(logits / c)`.
        max_logits_bytes: The bound.
        whole_rows: A token's logits are held whole, instead of a tile of them.

    Raises:
        UserError: If the bound is not positive.
    """
    if max_logits_bytes < 1:
        raise UserError(f"max_logits_bytes must be at least 1, got {max_logits_bytes}")
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    vocab_size, entries = len(head_weight), max_logits_bytes // statistics_dtype(hidden_states).itemsize
    num_tokens = max(1, len(hidden_states))
    # Two tiles of scratch memory beside the tile, or the row of tiles, of logits.
    tile_width = max(1, min(TILE_WIDTHS.get(device, 8192), vocab_size, entries // 3))
    per_token = vocab_size + 2 * tile_width if whole_rows else 3 * tile_width
    block_size = max(1, min(num_tokens, entries // per_token))
    num_blocks = -(-num_tokens // block_size)  # of equal size, as far as they go
    return Tiling(temperature, softcap, dtype, -(-num_tokens // num_blocks), tile_width)
