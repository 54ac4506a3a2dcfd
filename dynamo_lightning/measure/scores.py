"""Scores of rollouts: gradients of their log-probability, by forward passes or for small policies whole, projected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dynamo_lightning.losses.token_statistics import MAX_LOGITS_BYTES
from dynamo_lightning.policy.forward import head_inputs, token_layout, vocabulary_head
from dynamo_lightning.policy.packing import MicroBatches, make_micro_batch
from dynamo_lightning.types import Rollout
from dynamo_lightning.update.config import UpdateConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HeadProjection:
    """Random rank-one matrices u_k v_kᵀ that scores of the vocabulary head are projected on."""

    vocab: Tensor
    """The u_k, ±1, `[vocab_size, num_projections]`."""
    hidden: Tensor
    """The v_k, ±1/√num_projections, `[hidden_size, num_projections]`: so projections keep inner products on average."""

    @classmethod
    def draw(
        cls, vocab_size: int, hidden_size: int, num_projections: int, seed: int, device: torch.device | str = "cpu"
    ) -> HeadProjection:
        """Draw random signs, the same for a seed on every machine."""
        generator = torch.Generator().manual_seed(seed)
        u, v = (
            torch.randint(0, 2, (size, num_projections), generator=generator).float().mul_(2).sub_(1).to(device)
            for size in (vocab_size, hidden_size)
        )
        return cls(u, v / num_projections**0.5)


def project_head_scores(
    hidden_states: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    projection: HeadProjection,
    *,
    head_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> Tensor:
    """Project each token's gradient of log π(a) with respect to the vocabulary head's weight W.

    `⟨∇_W log π(a), u_k v_kᵀ⟩ = (u_k[a] − Σ_v π_v u_kv)(v_k·h)/temperature`: no gradient is formed, and no more than a
    chunk of logits held. With a soft cap c, `u_kv` counts times its slope `1 − tanh²(logit_v/c)`.

    Args:
        hidden_states: Input h of the head at each response token, `[num_tokens, hidden_size]`.
        head_weight: W, `[vocab_size, hidden_size]`.
        targets: Sampled tokens a, `[num_tokens]`.
        projection: The u_k and v_k.
        head_bias: `[vocab_size]`, if the head has one.
        temperature: Divides the logits, as it did when the tokens were sampled.
        softcap: `c` of models that pass logits through `c · tanh(logits / c)`.
        max_logits_bytes: Bound on the memory of the logits held at once and of what they are worked on in.

    Returns:
        `[num_tokens, num_projections]`, float32; a rollout's score is the sum over its tokens.
    """
    chunks = []
    # Logits, their slopes, probabilities and a product, float32.
    chunk_size = max(1, max_logits_bytes // (4 * 4 * len(head_weight)))
    for hidden, target in zip(hidden_states.split(chunk_size), targets.split(chunk_size), strict=True):
        logits = functional.linear(hidden, head_weight, head_bias).float()
        slope = torch.ones_like(logits)
        if softcap is not None:
            squashed = torch.tanh(logits / softcap)
            logits, slope = softcap * squashed, 1 - squashed.square()
        probs = torch.softmax(logits / temperature, dim=-1)
        sampled = projection.vocab[target] * slope.gather(-1, target[:, None])
        errors = sampled - (probs * slope) @ projection.vocab
        chunks.append(errors * (hidden.float() @ projection.hidden) / temperature)
    return torch.cat(chunks) if chunks else projection.hidden.new_zeros(0, projection.hidden.shape[1])


@torch.no_grad()
def head_scores(
    policy: PreTrainedModel,
    rollouts: Sequence[Rollout],
    filler: Rollout,
    config: UpdateConfig,
    *,
    temperature: float,
    num_projections: int,
    seed: int,
) -> Tensor:
    """Projected score of each rollout with respect to the vocabulary head, by forward passes alone.

    Every rank makes equally many forward passes, as FSDP demands.

    Args:
        policy: The policy.
        rollouts: Of this rank, `[num_rollouts]`; may be none.
        filler: Any rollout; stands in on a rank that runs out of micro-batches before others do.
        config: The token budgets.
        temperature: Divides the logits.
        num_projections: Length of a projected score.
        seed: Of the projection, the same on all ranks.

    Returns:
        `[num_rollouts, num_projections]`, float32.

    Raises:
        UserError: If the vocabulary head is not a linear layer.
    """
    layer = vocabulary_head(policy)
    projection = HeadProjection.draw(layer.out_features, layer.in_features, num_projections, seed, policy.device)
    scores = torch.zeros(len(rollouts), num_projections, device=policy.device)
    lengths = torch.tensor([rollout.response_length for rollout in rollouts], dtype=torch.int64)
    rollout_of_token = torch.arange(len(rollouts)).repeat_interleave(lengths).to(policy.device)
    budget = config.max_tokens_per_micro_batch
    everything, layout = range(len(rollouts)), token_layout(policy)
    for micro_batch, counts in MicroBatches(rollouts, everything, filler, budget, policy.device, layout):
        hidden_states, head = head_inputs(policy, micro_batch, temperature)
        if counts:
            tokens = project_head_scores(
                hidden_states,
                targets=micro_batch.targets,
                projection=projection,
                max_logits_bytes=config.max_logits_bytes,
                **head,
            )
            scores.index_add_(0, rollout_of_token[micro_batch.token_indices], tokens)
    return scores


@torch.no_grad()
def parameter_scores(
    policy: PreTrainedModel,
    rollouts: Sequence[Rollout],
    *,
    temperature: float,
    num_dimensions: int,
    seed: int,
    batch_size: int = 32,
) -> Tensor:
    """Sketched gradient of each rollout's log-probability with respect to *all* parameters, for small policies.

    The gradients of a batch are formed side by side (`torch.func.vmap`) and each is sketched: every parameter has a
    random sign and one of the dimensions to be added to, which keeps inner products on average (Charikar et al., 2002).

    Args:
        policy: The policy, unsharded, with `attn_implementation: eager`; `batch_size` gradients are held at once.
        rollouts: `[num_rollouts]`.
        temperature: Divides the logits.
        num_dimensions: Length of a sketched score.
        seed: Of the sketch.
        batch_size: Rollouts whose gradients are held at the same time.

    Returns:
        `[num_rollouts, num_dimensions]`, float32, on the CPU.
    """
    parameters = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    num_parameters = sum(parameter.numel() for parameter in parameters.values())
    bucket = torch.randint(0, num_dimensions, (num_parameters,), generator=generator).to(policy.device)
    sign = torch.randint(0, 2, (num_parameters,), generator=generator).float().mul_(2).sub_(1).to(policy.device)

    def log_probability(values: dict[str, Tensor], ids: Tensor, is_response: Tensor) -> Tensor:
        position_ids = torch.arange(len(ids), device=ids.device)[None]
        inputs = {"input_ids": ids[None], "position_ids": position_ids, "use_cache": False}
        logits = torch.func.functional_call(policy, values, (), inputs).logits[0, :-1].float() / temperature
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, ids[1:, None]).squeeze(-1)
        return (logprobs * is_response).sum()

    gradients = torch.func.vmap(torch.func.grad(log_probability), in_dims=(None, 0, 0))
    scores = torch.zeros(len(rollouts), num_dimensions)
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt.token_ids) + len(rollouts[i].token_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [make_micro_batch(rollouts, [i], policy.device) for i in chosen]
        length = max(row.input_ids.shape[1] for row in rows)
        # Padding on the right: attention is causal, so no token of the rollout ever sees it.
        ids = torch.zeros(len(rows), length, dtype=torch.int64, device=policy.device)
        is_response = torch.zeros(len(rows), length - 1, device=policy.device)
        for number, row in enumerate(rows):
            ids[number, : row.input_ids.shape[1]] = row.input_ids[0]
            is_response[number, row.predictor_positions] = 1
        parts = gradients(parameters, ids, is_response)
        flat = torch.cat([parts[name].flatten(1).float() for name in parameters], dim=1)
        sketched = torch.zeros(len(rows), num_dimensions, device=policy.device).index_add_(1, bucket, flat * sign)
        scores[chosen] = sketched.cpu()
    return scores
