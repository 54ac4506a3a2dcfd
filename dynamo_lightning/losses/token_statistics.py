"""Log-probability, entropy and Σπ²Λ of every response token, from hidden states, a chunk of logits at a time.

The logits of a batch (`[num_tokens, vocab_size]`) are the largest tensor of a training step. They are never held whole:
each chunk's logits are reduced to three numbers per token and recomputed in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class TokenStatistics:
    """What the loss needs to know of the policy's distribution π at each response token."""

    logprobs: Tensor
    """log π(a) of the sampled token a, `[num_tokens]`, nats."""
    entropy: Tensor
    """H = −Σ_k π_k log π_k over the vocabulary, `[num_tokens]`, nats."""
    squared_prob_lambda: Tensor
    """Σ_k π_k² Λ_k with Λ_k = log π_k + H, over the vocabulary, `[num_tokens]`."""

    def detach(self) -> TokenStatistics:
        """The same numbers without their graph."""
        return TokenStatistics(self.logprobs.detach(), self.entropy.detach(), self.squared_prob_lambda.detach())


def statistics_from_logits(
    logits: Tensor, targets: Tensor, entropy_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The three statistics from whole logits.

    `Σπ²Λ = Σ π² log π + H Σ π²`, an expectation over the vocabulary (arXiv 2602.19208 puts a mean over the sampled
    tokens of the sequence in its place).

    Args:
        logits: `[num_tokens, vocab_size]`, already divided by the temperature.
        targets: Sampled tokens, `[num_tokens]`.
        entropy_gradient: Whether entropies and Σπ²Λ carry gradients as well; log-probabilities always do.

    Returns:
        log-probabilities, entropies and Σπ²Λ, each `[num_tokens]`, in float32 (float64 for float64 logits).
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    all_logprobs = functional.log_softmax(logits, dim=-1)
    logprobs = all_logprobs.gather(-1, targets[:, None]).squeeze(-1)
    if not entropy_gradient:
        all_logprobs = all_logprobs.detach()
    probs = all_logprobs.exp()
    # A token that a mask has made impossible has log π = −∞ and π = 0; its share π log π is 0, not NaN.
    weighted = torch.where(probs > 0, probs * all_logprobs, 0.0)
    entropy = -weighted.sum(-1)
    squared_prob_lambda = (probs * weighted).sum(-1) + entropy * probs.square().sum(-1)
    return logprobs, entropy, squared_prob_lambda


def token_statistics(
    hidden_states: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    head_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy_gradient: bool = True,
    chunk_size: int = 1024,
) -> TokenStatistics:
    """The three statistics from hidden states, in chunks of tokens.

    Args:
        hidden_states: Input of the vocabulary head at each response token, `[num_tokens, hidden_size]`.
        head_weight: `[vocab_size, hidden_size]`.
        targets: Sampled tokens, `[num_tokens]`.
        head_bias: `[vocab_size]`, if the head has one.
        temperature: Divides the logits, as it did when the tokens were sampled.
        softcap: `c` of models that pass logits through `c · tanh(logits / c)`.
        entropy_gradient: Whether entropies and Σπ²Λ carry gradients as well; where they only enter detached factors,
            their graph would be memory and time for nothing.
        chunk_size: Tokens whose logits are held at the same time.

    Returns:
        The statistics, differentiable with respect to hidden states, weight and bias.
    """

    def chunk_statistics(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(hidden, head_weight, head_bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return statistics_from_logits(logits / temperature, target, entropy_gradient)

    chunks = []
    for hidden, target in zip(hidden_states.split(chunk_size), targets.split(chunk_size), strict=True):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(chunk_statistics, hidden, target, use_reentrant=False))
        else:
            chunks.append(chunk_statistics(hidden, target))
    return TokenStatistics(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
