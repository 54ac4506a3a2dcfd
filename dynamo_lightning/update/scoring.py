"""The scoring pass: what has to be known of a whole batch before the policy learns from any of it.

It runs the policy over the rollouts without gradient. That gives `old_logprobs`, the entropies and the modulated token
advantages, whose normalisers need the whole batch. A single update of plain advantages needs nothing of it beforehand:
it has the same policy's statistics itself, so that only rollouts are scored that it leaves out, for their entropies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynamo_lightning.distributed import derive_seed, gather_objects, gather_values, run_seed, sum_over_ranks
from dynamo_lightning.errors import RunError
from dynamo_lightning.losses.engine_mismatch import engine_weights, mismatch_metrics
from dynamo_lightning.losses.modulation import ModulatedAdvantages
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.losses.token_statistics import TokenStatistics
from dynamo_lightning.policy.packing import MicroBatches
from dynamo_lightning.policy.reading import response_statistics, token_layout
from dynamo_lightning.types import RolloutBatch
from dynamo_lightning.update.config import UpdateConfig
from dynamo_lightning.update.sampling_check import LogpDifference, check_difference, global_difference, sampled_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Experience:
    """Scored rollouts with all that is known of their tokens before the first update."""

    batch: RolloutBatch
    old_logprobs: Tensor | None
    """log π_old of this rank's response tokens, `[num_tokens]`, at the policy that sampled them; `None` if the only
    update starts from that policy and needs not be told."""
    modulated: ModulatedAdvantages
    """Final advantages of this rank's response tokens, `[num_tokens]`; raw ones if the modulation is recomputed."""
    reference_logprobs: Tensor | None
    """log π_ref of this rank's response tokens, `[num_tokens]`; only with a KL term."""
    metrics: Mapping[str, float]
    """Global means over all response tokens."""
    entropy: float
    """What the scored tokens add to the mean entropy of all response tokens, all ranks, nats: all of it, or without
    `old_logprobs` only what the update leaves out."""
    token_selection: Tensor | None = None
    """The penalty's `token_selection` of this rank's response tokens, `[num_tokens]`; only if it selects some."""
    engine_weights: Tensor | None = None
    """Importance weights of this rank's response tokens, `[num_tokens]`; only if another engine sampled them."""
    difference: LogpDifference = field(default_factory=LogpDifference)
    """Between sampled and scored log-probabilities: of all tokens and ranks, or without `old_logprobs` only of this
    rank's tokens that the update leaves out."""
    logp_tolerance: float | None = None
    """Largest mean difference that an update starts with; `None` checks nothing."""
    modulation_inputs: ModulationInputs | None = None
    """What the modulation was computed from; only if it has candidates for later steps."""


@torch.no_grad()
def all_statistics(
    policy: PreTrainedModel, batch: RolloutBatch, indices: Sequence[int], config: UpdateConfig, temperature: float
) -> TokenStatistics:
    """Statistics of all response tokens of this rank's rollouts, `[num_tokens]` each, without gradient.

    Float32, or float64 for a float64 policy; 0 for rollouts that are not among the chosen.
    """
    num_tokens = int(batch.response_lengths.sum())
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    columns = [torch.zeros(num_tokens, dtype=dtype, device=policy.device) for _ in range(3)]
    budget = config.max_tokens_per_micro_batch
    layout = token_layout(policy)
    for micro_batch, counts in MicroBatches(batch.rollouts, indices, batch.spare, budget, policy.device, layout):
        statistics = response_statistics(
            policy, micro_batch, temperature=temperature, max_logits_bytes=config.max_logits_bytes
        )
        if counts:
            parts = (statistics.logprobs, statistics.entropy, statistics.squared_prob_lambda)
            for column, part in zip(columns, parts, strict=True):
                column[micro_batch.token_indices] = part.to(dtype)
    return TokenStatistics(*columns)


def check_finite(batch: RolloutBatch, logprobs: Tensor) -> None:
    """Stop, on every rank, if a log-probability is NaN or infinite.

    Args:
        batch: This rank's rollouts.
        logprobs: Of their response tokens, `[num_tokens]`.

    Raises:
        RunError: Names the prompts.
    """
    parts = logprobs.split(batch.response_lengths.tolist())
    prompt_ids = (
        {
            rollout.prompt.prompt_id
            for rollout, part in zip(batch.rollouts, parts, strict=True)
            if not torch.isfinite(part).all()
        }
        if not torch.isfinite(logprobs).all()
        else set()
    )
    count = int(sum_over_ranks({"prompts": float(len(prompt_ids))})["prompts"])
    if count:
        named = ", ".join(map(str, sorted(prompt_ids)[:10])) or "on other processes"
        raise RunError(
            f"the policy's log-probabilities of responses to {count} prompts are not finite (prompt ids {named}) at "
            f"iteration {batch.iteration}: training stops before the policy is lost; the last checkpoint is intact"
        )


def token_keys(batch: RolloutBatch, device: torch.device) -> Tensor:
    """A random number for each response token of this rank, `[num_tokens]`, int64, from 0.

    A pure function of run seed, iteration, prompt, sample index and position: the same on whichever rank and in
    whichever micro-batch the token is.
    """
    numbers = [np.zeros(0, dtype=np.uint64)]
    for rollout in batch.rollouts:
        seed = derive_seed(run_seed(), "tokens", batch.iteration, *rollout.key)
        numbers.append(np.random.Philox(key=seed).random_raw(len(rollout.token_ids)))
    return torch.from_numpy((np.concatenate(numbers) >> np.uint64(1)).astype(np.int64)).to(device)


def is_needed_beforehand(loss: PolicyLoss, config: UpdateConfig, separate_engine: bool) -> bool:
    """Whether the (first) update needs statistics of the policy that sampled the tokens before it begins.

    It does if there are several updates, if advantages are modulated, marked or weighed by them. Otherwise the ratio is
    1, with the gradient of log π.
    """
    several_updates = config.num_epochs > 1 or config.num_mini_batches > 1
    modulated = loss.modulation is not None and not loss.modulation.is_recomputed()
    return several_updates or modulated or loss.penalty is not None or separate_engine


def passes_per_rollout(loss: PolicyLoss, config: UpdateConfig, separate_engine: bool) -> tuple[int, int]:
    """What a rollout costs from scoring to the last update, in forward passes; a backward pass counts as two.

    Returns:
        That of a rollout whose group teaches something, and of one whose group has equal rewards.
    """
    teaching = int(is_needed_beforehand(loss, config, separate_engine)) + 3 * config.num_epochs
    is_skipped = loss.vanishes_without_advantage and loss.advantage.equal_rewards_give_zero
    return teaching, 1 if is_skipped else teaching


def learnt_from(batch: RolloutBatch, loss: PolicyLoss) -> Tensor:
    """Which of this rank's rollouts the loss has a gradient for, `[num_rollouts]`, bool."""
    chosen = batch.advantages != 0 if loss.vanishes_without_advantage else torch.ones_like(batch.advantages).bool()
    if loss.mask_truncated:
        chosen = chosen & ~torch.tensor([rollout.truncated for rollout in batch.rollouts], dtype=torch.bool)
    return chosen


def scoring_pass(
    policy: PreTrainedModel,
    reference: AbstractContextManager[PreTrainedModel] | None,
    batch: RolloutBatch,
    loss: PolicyLoss,
    config: UpdateConfig,
    temperature: float,
    separate_engine: bool = False,
    logp_tolerance: float | None = None,
) -> Experience:
    """Run the policy, and the reference if there is one, over the rollouts; modulate, mark and weigh the tokens.

    Args:
        policy: What the rollouts were sampled from, to rounding.
        reference: Gives the frozen policy of a KL term, which may be the policy itself without its adapters.
        batch: This rank's rollouts with their advantages.
        loss: Its modulation and penalty need statistics of the whole batch.
        config: The token budget.
        temperature: Divides the logits.
        separate_engine: Whether the rollouts' log-probabilities are those of another engine, which sampled them.
        logp_tolerance: Largest mean difference of sampled and scored log-probabilities, nats; `None` checks nothing.

    Raises:
        RunError: If a log-probability is not finite, or sampled and scored ones differ by more, on all ranks.
    """
    everything = range(len(batch.rollouts))
    beforehand = is_needed_beforehand(loss, config, separate_engine)
    scored = everything if beforehand else (~learnt_from(batch, loss)).nonzero().squeeze(-1).tolist()
    statistics = all_statistics(policy, batch, scored, config, temperature)
    check_finite(batch, statistics.logprobs)
    engine_logprobs = sampled_logprobs([rollout.logprobs for rollout in batch.rollouts], statistics.logprobs)
    is_scored = torch.isin(batch.token_rollouts, torch.tensor(list(scored), dtype=torch.int64)).to(policy.device)
    difference = LogpDifference.of(statistics.logprobs[is_scored], engine_logprobs[is_scored])
    if beforehand:
        difference = global_difference(difference)
        check_difference(difference, logp_tolerance, policy)
    advantages = batch.advantages[batch.token_rollouts].to(policy.device)
    modulated, token_selection = ModulatedAdvantages(advantages), None

    def keys() -> Tensor:
        return token_keys(batch, policy.device)

    inputs = ModulationInputs(statistics, advantages, gather_values, keys)
    if loss.modulation is not None and not loss.modulation.is_recomputed():
        modulated = loss.modulation(inputs)
    if loss.penalty is not None:
        token_selection = loss.penalty.token_selection(inputs)
    means = {"entropy": statistics.entropy, **modulated.indicators}
    totals = sum_over_ranks({name: float(value.sum()) for name, value in means.items()})
    num_tokens = int(batch.group_tokens.sum())
    reference_logprobs = None
    if reference is not None:
        with reference as frozen:
            reference_logprobs = all_statistics(frozen, batch, everything, config, temperature).logprobs
    metrics = {name: total / num_tokens for name, total in totals.items()}
    entropy = metrics.pop("entropy")
    weights = None
    if separate_engine:
        rollouts = batch.token_rollouts.to(policy.device)
        weights, summary = engine_weights(statistics.logprobs, engine_logprobs, rollouts, loss.engine_mismatch)
        metrics.update(mismatch_metrics(gather_objects([summary])))
    old_logprobs = statistics.logprobs if beforehand else None
    return Experience(
        batch,
        old_logprobs,
        modulated,
        reference_logprobs,
        metrics,
        entropy,
        token_selection,
        weights,
        difference,
        logp_tolerance,
        inputs if modulated.candidates is not None else None,
    )
