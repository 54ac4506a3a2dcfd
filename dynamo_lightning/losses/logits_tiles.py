"""Token statistics and their gradients from tiles of logits, `[tokens of a block, some of the vocabulary]`.

A tile is reduced to running sums over the vocabulary, or turned into its own gradient in place. With z
the logits after softcap and temperature, π = softmax(z), Λ = log π + H, P = Σπ² and M = Σπ²Λ:

    ∂ log π(a) / ∂z = e_a − π
    ∂H / ∂z         = −π ⊙ Λ
    ∂M / ∂z         = π ⊙ ((2π − P) ⊙ Λ + π − P − 2M)

The first follows from log π(a) = z_a − log Σ e^z; the others from ∂π_k/∂z_j = π_k (1[k = j] − π_j) by the product rule.
A softcap c · tanh(y / c) multiplies the gradient by 1 − tanh²(y / c).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# π of a logit this far below the largest is exactly 0 in float32 and float64. It stands in for log π = −∞ of a token
# that a mask has made impossible, whose share π log π is then 0, not NaN.
LOWEST_LOG_PROB = -1000.0


@dataclass(frozen=True)
class Tiling:
    """How logits are made of a product and in which pieces."""

    temperature: float
    softcap: float | None
    dtype: torch.dtype
    """Type of the operands of the matrix products; the statistics are float32, or float64 for float64."""
    block_size: int
    """Tokens of a block."""
    tile_width: int
    """Vocabulary entries of a tile."""

    def tiles(self, vocab_size: int) -> Iterator[slice]:
        """The pieces of the vocabulary."""
        return (
            slice(start, min(start + self.tile_width, vocab_size)) for start in range(0, vocab_size, self.tile_width)
        )

    def blocks(self, num_tokens: int) -> Iterator[slice]:
        """The pieces of the batch."""
        return (
            slice(start, min(start + self.block_size, num_tokens)) for start in range(0, num_tokens, self.block_size)
        )

    def scratch(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Flat memory of three tiles, to be viewed in the shape of each."""
        size = self.block_size * self.tile_width
        first, second, third = torch.empty(3, size, dtype=statistics_dtype(hidden), device=hidden.device)
        return first, second, third


def statistics_dtype(hidden: Tensor) -> torch.dtype:
    """Float32, or float64 for float64 hidden states."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def shaped(memory: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """The beginning of flat memory as a contiguous matrix, `[num_rows, num_columns]`."""
    return memory[: num_rows * num_columns].view(num_rows, num_columns)


def product(left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """`out = left @ right`, or `out += left @ right`, rounded to the type of `out` only where the device can."""
    if left.dtype == out.dtype:
        return out.addmm_(left, right) if accumulate else torch.mm(left, right, out=out)
    if left.device.type == "cuda" and out.dtype == torch.float32:
        result = torch.mm(left, right, out_dtype=torch.float32)
    else:
        result = torch.mm(left, right)
    return out.add_(result) if accumulate else out.copy_(result)


def logits_tile(hidden: Tensor, weight: Tensor, bias: Tensor | None, tiling: Tiling, out: Tensor) -> Tensor:
    """Logits of a block of tokens and a piece of the vocabulary, after softcap and temperature, in `out`."""
    product(hidden, weight.T, out)
    if bias is not None:
        out.add_(bias)
    if tiling.softcap is not None:
        return out.div_(tiling.softcap).tanh_().mul_(tiling.softcap / tiling.temperature)
    return out if tiling.temperature == 1.0 else out.div_(tiling.temperature)


class RunningSums:
    """Sums over the vocabulary of each token, relative to the largest logit so far; `[num_tokens]` each.

    With `d = z − max z`: `Σ e^d`, `Σ e^d d`, `Σ e^2d`, `Σ e^2d d`. A larger maximum rescales them.
    """

    def __init__(self, targets: Tensor, dtype: torch.dtype) -> None:
        def filled(value: float) -> Tensor:
            return torch.full(targets.shape, value, dtype=dtype, device=targets.device)

        self.targets = targets
        self.maximum = filled(-1e30)  # finite, so that no difference of two maxima is NaN
        self.target_logits = filled(-torch.inf)
        self.exp, self.exp_d, self.square, self.square_d = filled(0.0), filled(0.0), filled(0.0), filled(0.0)

    def add(self, logits: Tensor, tokens: slice, tile: slice, scratch: tuple[Tensor, Tensor]) -> None:
        """Take in a tile, which stays as it is."""
        local = self.targets[tokens] - tile.start
        inside = (local >= 0) & (local < logits.shape[1])
        found = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        target_logits = self.target_logits[tokens]
        target_logits.copy_(torch.where(inside, found, target_logits))

        previous = self.maximum[tokens]
        maximum = torch.maximum(previous, logits.amax(1))
        shift = previous - maximum
        scale, square_scale = shift.exp(), (2 * shift).exp()
        exp, exp_d, square, square_d = (sums[tokens] for sums in (self.exp, self.exp_d, self.square, self.square_d))
        exp_d.add_(shift * exp).mul_(scale)
        square_d.add_(shift * square).mul_(square_scale)
        exp.mul_(scale)
        square.mul_(square_scale)
        previous.copy_(maximum)

        first, second = (shaped(memory, *logits.shape) for memory in scratch)
        d = torch.sub(logits, maximum[:, None], out=first).clamp_(min=LOWEST_LOG_PROB)
        e = torch.exp(d, out=second)
        exp += e.sum(1)
        weighted = d.mul_(e)
        exp_d += weighted.sum(1)
        square_d += weighted.mul_(e).sum(1)
        square += e.mul_(e).sum(1)

    def finish(self) -> TileStatistics:
        """The statistics, once every tile is in."""
        log_exp = self.exp.log()
        squared_probs = self.square / self.exp.square()
        entropy = log_exp - self.exp_d / self.exp
        squared_log = self.square_d / self.exp.square() - log_exp * squared_probs  # Σ π² log π
        return TileStatistics(
            logprobs=(self.target_logits - self.maximum) - log_exp,
            entropy=entropy,
            squared_prob_lambda=squared_log + entropy * squared_probs,
            squared_probs=squared_probs,
            log_normaliser=self.maximum + log_exp,
        )


@dataclass(frozen=True)
class TileStatistics:
    """The statistics of `TokenStatistics` and what else the backward pass needs, `[num_tokens]` each."""

    logprobs: Tensor
    entropy: Tensor
    squared_prob_lambda: Tensor
    squared_probs: Tensor
    """P = Σπ²."""
    log_normaliser: Tensor
    """log Σ e^z."""

    def __getitem__(self, tokens: slice) -> TileStatistics:
        """Those of a block."""
        return TileStatistics(*(getattr(self, name)[tokens] for name in self.__dataclass_fields__))


Upstream = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Derivatives of the loss by log-probabilities, entropies and Σπ²Λ, `[num_tokens]` each, or None where it has none."""


def gradient_tile(
    logits: Tensor,
    targets: Tensor,
    statistics: TileStatistics,
    upstream: Upstream,
    tile: slice,
    tiling: Tiling,
    scratch: tuple[Tensor, Tensor],
) -> Tensor:
    """Turn a tile of logits into the derivative of the loss by the head's product, in place."""
    by_logprobs, by_entropy, by_lambda = (
        None if part is None else part[:, None] / tiling.temperature for part in upstream
    )
    probs, slope = (shaped(memory, *logits.shape) for memory in scratch)
    if tiling.softcap is not None:
        torch.mul(logits, tiling.temperature / tiling.softcap, out=slope).square_().neg_().add_(1.0)
    log_probs = logits.sub_(statistics.log_normaliser[:, None])
    if by_entropy is None and by_lambda is None:
        gradient = log_probs.exp_().mul_(0.0 if by_logprobs is None else -by_logprobs)
    else:
        log_probs.clamp_(min=LOWEST_LOG_PROB)
        torch.exp(log_probs, out=probs)
        factor = torch.zeros_like(statistics.entropy)[:, None]  # of Λ
        if by_entropy is not None:
            factor = factor - by_entropy
        lambdas = log_probs.add_(statistics.entropy[:, None])
        if by_lambda is None:
            gradient = lambdas.mul_(factor)
        else:
            squared, expected = statistics.squared_probs[:, None], statistics.squared_prob_lambda[:, None]
            gradient = lambdas.mul_(factor + by_lambda * (2 * probs - squared))
            gradient.add_(by_lambda * (probs - squared - 2 * expected))
        if by_logprobs is not None:
            gradient.sub_(by_logprobs)
        gradient.mul_(probs)
    if by_logprobs is not None:
        local = targets[:, None] - tile.start
        inside = (local >= 0) & (local < logits.shape[1])
        gradient.scatter_add_(1, local.clamp(0, logits.shape[1] - 1), torch.where(inside, by_logprobs, 0.0))
    return gradient if tiling.softcap is None else gradient.mul_(slope)
