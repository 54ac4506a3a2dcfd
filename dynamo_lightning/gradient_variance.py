"""How much the policy gradient of a prompt varies from one set of rollouts to the next, measured on its rollouts.

With leave-one-out advantages, prompt i's gradient is the sample covariance of reward r and score s = ∇ log π(rollout):

    ĝ_i = (1/n) Σ_j (r_j − mean of the others) s_j = mean over pairs of h(x, x'),   h(x, x') = ½(r − r')(s − s'),

a U-statistic, so that its variance (the trace of its covariance) is known for every group size n (Hoeffding, 1948):

    Var ĝ_i = [4(n − 2)ζ₁ + 2ζ₂]/(n(n − 1)),
    ζ₁ = E⟨h₁₂, h₁₃⟩ − ‖∇J_i‖²,   ζ₂ = E‖h₁₂‖² − ‖∇J_i‖²,   ‖∇J_i‖² = E⟨h₁₂, h₃₄⟩.

The allocation's own model, a_i/(n − 1) with a_i ∝ p_i(1 − p_i), is the case of rewards that do not depend on scores
(then ζ₁ = ζ₂/4 and ∇J_i = 0) and scores that vary equally for all prompts. Here nothing of the kind is assumed.

A score is as long as the policy has parameters. Only inner products of scores matter, and random projections keep them
on average: rank-one ones of the vocabulary head's gradient, which need a forward pass only, or a sketch of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.token_statistics import MAX_LOGITS_BYTES
from dynamo_lightning.policy.packing import MicroBatches, make_micro_batch
from dynamo_lightning.policy.reading import head_inputs, token_layout, vocabulary_head
from dynamo_lightning.types import Rollout
from dynamo_lightning.update.config import UpdateConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# --- the variance from rewards and scores -----------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelMoments:
    """Mean inner products of the kernel h = ½(r − r')(s − s') of two pairs of a prompt's rollouts."""

    same: float
    """E‖h₁₂‖²: both pairs are the same one."""
    overlapping: float
    """E⟨h₁₂, h₁₃⟩: they share a rollout."""
    disjoint: float
    """E⟨h₁₂, h₃₄⟩ = ‖∇J‖²: they share none."""

    @property
    def zeta1(self) -> float:
        """ζ₁, the variance of the kernel's projection on one rollout."""
        return self.overlapping - self.disjoint

    @property
    def zeta2(self) -> float:
        """ζ₂, the variance of the kernel."""
        return self.same - self.disjoint

    def variance(self, group_size: float) -> float:
        """Variance of the leave-one-out gradient of `n` rollouts, `[4(n − 2)ζ₁ + 2ζ₂]/(n(n − 1))`.

        Args:
            group_size: n, at least 2; not necessarily whole, to compare with a mean group size.

        Raises:
            UserError: If the group is smaller than 2: it has no leave-one-out gradient.
        """
        n = group_size
        if n < 2:
            raise UserError(f"a group of {n:g} rollouts has no leave-one-out gradient, at least 2 are needed")
        return (4 * (n - 2) * self.zeta1 + 2 * self.zeta2) / (n * (n - 1))


def leave_one_out_gradient(rewards: ArrayLike, scores: ArrayLike, counts: ArrayLike | None = None) -> FloatArray:
    """Return `(1/n) Σ_j (r_j − mean of the others) s_j = Σ_j (r_j − r̄) s_j/(n − 1)`, `[num_dimensions]`.

    Args:
        rewards: `[num_distinct]`.
        scores: `[num_distinct, num_dimensions]`.
        counts: How often each occurred, `[num_distinct]`; once each by default. `n` is their sum.

    Raises:
        UserError: If there are fewer than 2 rollouts.
    """
    r, s, c, n = _checked(rewards, scores, counts, at_least=2)
    return (c * (r - (c * r).sum() / n)) @ s / (n - 1)


def kernel_moments(rewards: ArrayLike, scores: ArrayLike, counts: ArrayLike | None = None) -> KernelMoments:
    """Return unbiased estimates of a prompt's moments: means over all pairs of pairs of distinct rollouts.

    With `v_i = Σ_j h_ij`, `P = Σ_ij ‖h_ij‖²` and `Q = Σ_i ‖v_i‖² − P`, the sums over ordered pairs of pairs that
    coincide, share one rollout and share none are `P`, `Q` and `‖Σ_i v_i‖² − 4Q − 2P`. All of them come from a few
    sums over rollouts, in time and memory `O(n d)`.

    Args:
        rewards: `[num_distinct]`.
        scores: `[num_distinct, num_dimensions]`.
        counts: How often each occurred, `[num_distinct]`; once each by default. Short responses repeat a lot.

    Raises:
        UserError: If there are fewer than 4 rollouts, from which ‖∇J‖² cannot be told.
    """
    r, s, c, n = _checked(rewards, scores, counts, at_least=4)
    # The kernel sees differences only; centred numbers lose fewer digits in the sums below.
    r, s = r - (c * r).sum() / n, s - (c @ s) / n
    squares = (s**2).sum(1)
    # Σ_j c_j h_ij = ½[n r_i s_i + Σ c r s]: the sums of r and of s are 0.
    v = (n * r[:, None] * s + (c * r) @ s) / 2
    # ¼(r_i − r_j)²(q_i − 2 s_i·s_j + q_j) summed over j, with q = ‖s‖².
    r_squared = (c * r**2).sum()
    pairs = r**2 * (n * squares + (c * squares).sum()) + r_squared * squares
    pairs += (c * r**2 * squares).sum() - 2 * s @ ((c * r**2) @ s)
    pairs += -2 * r * (c * r * squares).sum() + 4 * r * (s @ ((c * r) @ s))
    same = float((c * pairs).sum() / 4)
    overlapping = float((c * (v**2).sum(1)).sum()) - same
    disjoint = float(((c @ v) ** 2).sum()) - 4 * overlapping - 2 * same
    return KernelMoments(
        same / (n * (n - 1)),
        overlapping / (n * (n - 1) * (n - 2)),
        disjoint / (n * (n - 1) * (n - 2) * (n - 3)),
    )


def _checked(
    rewards: ArrayLike, scores: ArrayLike, counts: ArrayLike | None, at_least: int
) -> tuple[FloatArray, FloatArray, FloatArray, float]:
    """Return all in float64 with the number of rollouts."""
    r, s = np.asarray(rewards, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    c = np.ones(len(r)) if counts is None else np.asarray(counts, dtype=np.float64)
    if s.ndim != 2 or not len(r) == len(s) == len(c):
        raise UserError(f"rewards, scores and counts differ in length: {r.shape}, {s.shape}, {c.shape}")
    n = float(c.sum())
    if n < at_least:
        raise UserError(f"{n:g} rollouts are too few, at least {at_least} are needed")
    return r, s, c, n


def group_variances(rewards: ArrayLike, scores: ArrayLike, sizes: Sequence[float]) -> list[float]:
    """Return the variance of a prompt's leave-one-out gradient with each of these group sizes, from one small group.

    Four rollouts or more give an unbiased estimate, which may be negative. Two or three cannot tell ‖∇J‖²; for them,
    reward and score are taken as independent: `E‖h₁₂‖²/(size − 1)`. That is too much by no more than a share of
    2p(1 − p) or so: little where an allocation gives so few rollouts.

    Args:
        rewards: `[num_rollouts]`, at least 2.
        scores: `[num_rollouts, num_dimensions]`.
        sizes: Group sizes that are asked about, at least 2 each.
    """
    r, s, _, n = _checked(rewards, scores, None, at_least=2)
    if n >= 4:
        moments = kernel_moments(r, s)
        return [moments.variance(size) for size in sizes]
    h = (r[:, None] - r)[..., None] * (s[:, None] - s) / 2
    return [float((h**2).sum() / (n * (n - 1)) / (size - 1)) for size in sizes]


# --- projected scores -------------------------------------------------------------------------------------------------


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
    spare: Rollout,
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
        spare: Any rollout; stands in on a rank that runs out of micro-batches before others do.
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
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts], dtype=torch.int64)
    rollout_of_token = torch.arange(len(rollouts)).repeat_interleave(lengths).to(policy.device)
    budget = config.max_tokens_per_micro_batch
    everything, layout = range(len(rollouts)), token_layout(policy)
    for micro_batch, counts in MicroBatches(rollouts, everything, spare, budget, policy.device, layout):
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
