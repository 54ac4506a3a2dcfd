"""Two autograd functions that never hold `[num_tokens, vocab_size]` logits.

`StatisticsFunction` gives the statistics to any loss and makes the logits again in the backward pass: four matrix
products of the head. `LossFunction` holds one block's logits until the loss of its tokens is known, and makes their
gradient at once: three. The second needs a loss that is a sum over tokens, each block's share computed by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynamo_lightning.errors import RunError
from dynamo_lightning.losses.logits_tiles import (
    RunningSums,
    TileStatistics,
    Tiling,
    Upstream,
    gradient_tile,
    logits_tile,
    product,
    shaped,
    statistics_dtype,
)

BlockLoss = Callable[[tuple[Tensor, Tensor, Tensor, Tensor], slice], Tensor]
"""The share of the loss of a block: from its log-probabilities, entropies, Σπ²Λ and Σπ², and its place in the batch."""


class StatisticsFunction(torch.autograd.Function):
    """Hidden states, weight and bias to log-probabilities, entropies, Σπ²Λ and, without gradient, Σπ²."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tiling: Tiling,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reduce the logits to running sums, vocabulary tile by vocabulary tile."""
        with torch.autocast(hidden.device.type, enabled=False):
            sums = RunningSums(targets, statistics_dtype(hidden))
            memory, *scratch = tiling.scratch(hidden)
            operand = hidden.to(tiling.dtype)
            for tile in tiling.tiles(len(weight)):
                weight_tile = weight[tile].to(tiling.dtype)
                for tokens in tiling.blocks(len(hidden)):
                    out = shaped(memory, len(targets[tokens]), len(weight_tile))
                    logits_tile(operand[tokens], weight_tile, None if bias is None else bias[tile], tiling, out)
                    sums.add(out, tokens, tile, (scratch[0], scratch[1]))
            statistics = sums.finish()
        saved = (getattr(statistics, name) for name in statistics.__dataclass_fields__ if name != "logprobs")
        ctx.save_for_backward(hidden, weight, bias, targets, *saved)
        ctx.tiling = tiling
        ctx.set_materialize_grads(False)
        without_gradient = [statistics.squared_probs]
        if not entropy_gradient:
            without_gradient += [statistics.entropy, statistics.squared_prob_lambda]
        ctx.mark_non_differentiable(*without_gradient)
        return statistics.logprobs, statistics.entropy, statistics.squared_prob_lambda, statistics.squared_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Make each tile again, and its gradient in its place."""
        hidden, weight, bias, targets, entropy, squared_prob_lambda, squared_probs, log_normaliser = ctx.saved_tensors
        statistics = TileStatistics(entropy, entropy, squared_prob_lambda, squared_probs, log_normaliser)
        tiling: Tiling = ctx.tiling
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = entropy.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            grad_hidden = torch.zeros_like(hidden, dtype=dtype) if needs_hidden else None
            grad_weight = unfilled_gradient(weight, weight.dtype, hidden) if needs_weight else None
            grad_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if needs_bias else None
            memory, *scratch = tiling.scratch(hidden)
            operand = hidden.to(tiling.dtype)
            for tile in tiling.tiles(len(weight)):
                weight_tile = weight[tile].to(tiling.dtype)
                # The whole gradient of this piece of the weight: summed in full precision, rounded once.
                sum_weight = None
                if grad_weight is not None:
                    same = grad_weight.dtype == dtype
                    sum_weight = grad_weight[tile] if same else unfilled_gradient(weight_tile, dtype, hidden)
                for tokens in tiling.blocks(len(hidden)):
                    out = shaped(memory, len(targets[tokens]), len(weight_tile))
                    logits_tile(operand[tokens], weight_tile, None if bias is None else bias[tile], tiling, out)
                    add_gradients(
                        gradient_tile(
                            out,
                            targets[tokens],
                            statistics[tokens],
                            block_of(upstream[:3], tokens),
                            tile,
                            tiling,
                            (scratch[0], scratch[1]),
                        ),
                        operand[tokens],
                        weight_tile,
                        None if grad_hidden is None else grad_hidden[tokens],
                        sum_weight,
                        None if grad_bias is None else grad_bias[tile],
                        first=tokens.start == 0,
                    )
                if grad_weight is not None and sum_weight is not None and grad_weight.dtype != dtype:
                    grad_weight[tile] = sum_weight
        return rounded(grad_hidden, hidden), grad_weight, rounded(grad_bias, bias), None, None, None


class LossFunction(torch.autograd.Function):
    """Hidden states, weight and bias to a loss whose gradient is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tiling: Tiling,
        block_loss: BlockLoss,
        entropy_gradient: bool,
    ) -> Tensor:
        """For each block: logits, statistics, loss, derivative of the loss, gradient of the logits in their place."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = statistics_dtype(hidden)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if needs_hidden else None
        grad_weight = unfilled_gradient(weight, dtype, hidden) if needs_weight else None
        first = True
        grad_bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if needs_bias else None
        row = torch.empty(tiling.block_size * len(weight), dtype=dtype, device=hidden.device)
        _, *scratch = tiling.scratch(hidden)
        operand = hidden.to(tiling.dtype)
        for tokens in tiling.blocks(len(hidden)):
            block = targets[tokens]
            tiles = []
            with torch.autocast(hidden.device.type, enabled=False):
                sums = RunningSums(block, dtype)
                for tile in tiling.tiles(len(weight)):
                    weight_tile = weight[tile].to(tiling.dtype)
                    out = shaped(row[len(block) * tile.start :], len(block), len(weight_tile))
                    logits_tile(operand[tokens], weight_tile, None if bias is None else bias[tile], tiling, out)
                    sums.add(out, slice(None), tile, (scratch[0], scratch[1]))
                    tiles.append((tile, out))
            statistics = sums.finish()
            value, upstream = loss_and_derivatives(statistics, tokens, block_loss, entropy_gradient)
            total += value
            if not any(ctx.needs_input_grad) or all(part is None for part in upstream):
                continue
            with torch.autocast(hidden.device.type, enabled=False):
                for tile, out in tiles:
                    add_gradients(
                        gradient_tile(out, block, statistics, upstream, tile, tiling, (scratch[0], scratch[1])),
                        operand[tokens],
                        weight[tile].to(tiling.dtype),
                        None if grad_hidden is None else grad_hidden[tokens],
                        None if grad_weight is None else grad_weight[tile],
                        None if grad_bias is None else grad_bias[tile],
                        first=first,
                    )
            first = False
        if grad_weight is not None and first:
            grad_weight.zero_()
        ctx.gradients = rounded(grad_hidden, hidden), rounded(grad_weight, weight), rounded(grad_bias, bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients and give them away, so that they are never held twice."""
        if ctx.gradients is None:
            raise RunError("the gradient of a fused loss can be taken once: it is given away, not copied")
        gradients, ctx.gradients = ctx.gradients, None
        if upstream != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return *gradients, None, None, None, None


def unfilled_gradient(weight: Tensor, dtype: torch.dtype, hidden: Tensor) -> Tensor:
    """Memory for the gradient of the weight, which the first block fills; zeros if there are no tokens."""
    return torch.empty_like(weight, dtype=dtype) if len(hidden) else torch.zeros_like(weight, dtype=dtype)


def add_gradients(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    *,
    first: bool,
) -> None:
    """Add a tile's share, from the derivative of the loss by its logits, to those gradients that are wanted.

    The first share of the weight's is written instead of added: filling a gigabyte with zeros takes time.
    """
    operand = gradient.to(hidden.dtype)
    if grad_hidden is not None:
        product(operand, weight, grad_hidden, accumulate=True)
    if grad_weight is not None:
        product(operand.T, hidden, grad_weight, accumulate=not first)
    if grad_bias is not None:
        grad_bias += gradient.sum(0)


def loss_and_derivatives(
    statistics: TileStatistics, tokens: slice, block_loss: BlockLoss, entropy_gradient: bool
) -> tuple[Tensor, Upstream]:
    """A block's loss and its derivatives by the statistics, None where it does not depend on one."""
    leaves = [statistics.logprobs, statistics.entropy, statistics.squared_prob_lambda]
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_(i == 0 or entropy_gradient) for i, leaf in enumerate(leaves)]
        value = block_loss((leaves[0], leaves[1], leaves[2], statistics.squared_probs.detach()), tokens)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if not value.requires_grad:
            return value, (None, None, None)
        found = torch.autograd.grad(value, wanted, allow_unused=True)
    derivatives = (*found, None, None)
    return value.detach(), (derivatives[0], derivatives[1], derivatives[2])


def block_of(upstream: tuple[Tensor | None, ...], tokens: slice) -> Upstream:
    """A block's share of the derivatives."""
    logprobs, entropy, squared_prob_lambda = (None if part is None else part[tokens] for part in upstream)
    return logprobs, entropy, squared_prob_lambda


def rounded(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient in the type of what it is of."""
    return gradient if gradient is None or like is None else gradient.to(like.dtype)
