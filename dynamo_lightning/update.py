"""From scored rollouts to a better policy: the scoring pass, then one or several optimizer steps.

The scoring pass runs the policy over every rollout without gradient. It gives `old_logprobs`, the entropies and the
modulated token advantages, whose normalisers need the whole batch. The updates then run over the rollouts that teach
something. All sums are over micro-batches and ranks before anything is divided, so the gradient does not depend on how
the batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
import torch
from torch import Tensor

from dynamo_lightning.distributed import (
    derive_seed,
    gather_objects,
    gather_values,
    max_over_ranks,
    run_seed,
    sum_over_ranks,
    world_size,
)
from dynamo_lightning.losses.engine_mismatch import engine_weights, mismatch_metrics
from dynamo_lightning.losses.modulation import ModulatedAdvantages
from dynamo_lightning.losses.policy_loss import LossInputs, PolicyLoss
from dynamo_lightning.losses.token_statistics import MAX_LOGITS_BYTES, TokenStatistics
from dynamo_lightning.losses.weights import token_weights
from dynamo_lightning.packing import MicroBatch, make_micro_batch, pack
from dynamo_lightning.policy import response_loss, response_statistics
from dynamo_lightning.rollout.generator import SamplingConfig
from dynamo_lightning.sharding import clip_gradient, gradient_sync
from dynamo_lightning.types import Rollout, RolloutBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class UpdateConfig:
    """How a batch of rollouts is learnt from."""

    num_mini_batches: int = 1
    """Optimizer steps per pass over the batch; each takes the same number of whole prompts."""
    num_epochs: int = 1
    """Passes over the batch."""
    max_tokens_per_micro_batch: int = 16384
    """Prompt and response tokens that go through the policy at once; bounds memory, does not change the result."""
    max_logits_bytes: int = MAX_LOGITS_BYTES
    """Memory for the logits that are held at once, and for working on them; does not change the result."""
    sync_every_micro_batch: bool = False
    """Add gradients up over processes after every micro-batch instead of after the last: with FSDP each process then
    holds its part of the gradient only, not the whole, for more communication; changes the result by rounding."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("num_mini_batches", "num_epochs", "max_tokens_per_micro_batch", "max_logits_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.updates.{name} must be at least 1, got {getattr(self, name)}")


class PolicyHolder(L.LightningModule):
    """What the update needs of the module that it updates."""

    policy: PreTrainedModel | None
    loss: PolicyLoss
    sampling: SamplingConfig
    update_config: UpdateConfig
    gradient_clip_val: float | None
    gradient_norm: float = 0.0
    """Of the last optimizer step, before clipping."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the total gradient norm and keep what it was before.

        Raises:
            RuntimeError: If it is not finite: a step would ruin the policy.
        """
        assert self.policy is not None
        self.gradient_norm = float(clip_gradient(self.policy, self.gradient_clip_val))
        if not math.isfinite(self.gradient_norm):
            raise RuntimeError(
                f"the gradient norm is {self.gradient_norm} at optimizer step {self.global_step}: training stops "
                "before the policy is lost; the last checkpoint is intact"
            )


@dataclass(frozen=True)
class Experience:
    """Scored rollouts with all that is known of their tokens at the policy that sampled them."""

    batch: RolloutBatch
    statistics: TokenStatistics
    """Of this rank's response tokens, `[num_tokens]` each."""
    modulated: ModulatedAdvantages
    """Final advantages of this rank's response tokens, `[num_tokens]`; raw ones if the modulation is recomputed."""
    reference_logprobs: Tensor | None
    """log π_ref of this rank's response tokens, `[num_tokens]`; only with a KL term."""
    metrics: Mapping[str, float]
    """Global means over all response tokens."""
    marks: Tensor | None = None
    """The penalty's marks of this rank's response tokens, `[num_tokens]`; only with a penalty that has some."""
    engine_weights: Tensor | None = None
    """Importance weights of this rank's response tokens, `[num_tokens]`; only if another engine sampled them."""


@dataclass(frozen=True)
class UpdateResult:
    """What the optimizer steps of one iteration did."""

    metrics: Mapping[str, float]
    """Mean over the optimizer steps; each a global sum over a global denominator."""
    gradient_norms: tuple[float, ...]
    """Of each step, before clipping; empty if nothing was to be learnt."""


def micro_batches(
    rollouts: Sequence[Rollout], indices: Sequence[int], spare: Rollout, config: UpdateConfig, device: torch.device
) -> list[tuple[MicroBatch, bool]]:
    """The chosen rollouts in packed micro-batches, equally many on every rank.

    Ranks agree on the number before the first is computed: sharded policies communicate in every forward pass.

    Args:
        rollouts: All rollouts of this rank.
        indices: Those to take.
        spare: Stands in on a rank that runs out of micro-batches before others do.
        config: The token budget.
        device: Where the tensors go.

    Returns:
        The micro-batches, paired with whether they count: `(micro_batch, True)`, or `(spare one, False)`.
    """
    lengths = [len(rollouts[i].prompt.token_ids) + len(rollouts[i].token_ids) for i in indices]
    rows = [[indices[i] for i in row] for row in pack(lengths, config.max_tokens_per_micro_batch)]
    num_spare = max_over_ranks(len(rows), device) - len(rows)
    counted = [(make_micro_batch(rollouts, row, device), True) for row in rows]
    return counted + [(make_micro_batch([spare], [0], device), False)] * num_spare


@torch.no_grad()
def all_statistics(
    policy: PreTrainedModel, batch: RolloutBatch, config: UpdateConfig, temperature: float
) -> TokenStatistics:
    """Statistics of all response tokens of this rank's rollouts, `[num_tokens]` each, without gradient.

    Float32, or float64 for a float64 policy.
    """
    num_tokens = sum(len(rollout.token_ids) for rollout in batch.rollouts)
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    columns = [torch.zeros(num_tokens, dtype=dtype, device=policy.device) for _ in range(3)]
    everything = range(len(batch.rollouts))
    for micro_batch, counts in micro_batches(batch.rollouts, everything, batch.spare, config, policy.device):
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
        RuntimeError: Names the prompts.
    """
    parts = logprobs.split([len(rollout.token_ids) for rollout in batch.rollouts])
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
        raise RuntimeError(
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


def scoring_pass(
    policy: PreTrainedModel,
    reference: AbstractContextManager[PreTrainedModel] | None,
    batch: RolloutBatch,
    loss: PolicyLoss,
    config: UpdateConfig,
    temperature: float,
    separate_engine: bool = False,
) -> Experience:
    """Run the policy, and the reference if there is one, over every rollout; modulate, mark and weigh the tokens.

    Args:
        policy: What the rollouts were sampled from, to rounding.
        reference: Gives the frozen policy of a KL term, which may be the policy itself without its adapters.
        batch: This rank's rollouts with their advantages.
        loss: Its modulation and penalty need statistics of the whole batch.
        config: The token budget.
        temperature: Divides the logits.
        separate_engine: Whether the rollouts' log-probabilities are those of another engine, which sampled them.

    Raises:
        RuntimeError: If a log-probability is not finite, on all ranks.
    """
    statistics = all_statistics(policy, batch, config, temperature)
    check_finite(batch, statistics.logprobs)
    lengths = torch.tensor([len(rollout.token_ids) for rollout in batch.rollouts], dtype=torch.int64)
    advantages = batch.advantages.repeat_interleave(lengths).to(policy.device)
    modulated, marks = ModulatedAdvantages(advantages), None

    def keys() -> Tensor:
        return token_keys(batch, policy.device)

    if loss.modulation is not None and not loss.modulation.is_recomputed():
        modulated = loss.modulation(statistics, advantages, gather_values, token_keys=keys)
    if loss.penalty is not None:
        marks = loss.penalty.marks(statistics, advantages, gather_values, keys)
    means = {"entropy": statistics.entropy, **modulated.indicators}
    totals = sum_over_ranks({name: float(value.sum()) for name, value in means.items()})
    num_tokens = int(batch.group_tokens.sum())
    reference_logprobs = None
    if reference is not None:
        with reference as frozen:
            reference_logprobs = all_statistics(frozen, batch, config, temperature).logprobs
    metrics = {name: total / num_tokens for name, total in totals.items()}
    weights = None
    if separate_engine:
        values = [logprob for rollout in batch.rollouts for logprob in rollout.logprobs]
        engine_logprobs = torch.tensor(values, dtype=statistics.logprobs.dtype, device=policy.device)
        indices = torch.arange(len(lengths)).repeat_interleave(lengths).to(policy.device)
        weights, summary = engine_weights(statistics.logprobs, engine_logprobs, indices, loss.engine_mismatch)
        metrics.update(mismatch_metrics(gather_objects([summary])))
    return Experience(batch, statistics, modulated, reference_logprobs, metrics, marks, weights)


def split_prompts(num_prompts: int, num_mini_batches: int) -> list[range]:
    """Cut the prompts into mini-batches of whole prompts whose sizes differ by at most one; none is empty."""
    num_mini_batches = min(num_mini_batches, num_prompts)
    cuts = [num_prompts * i // num_mini_batches for i in range(num_mini_batches + 1)]
    return [range(start, end) for start, end in pairwise(cuts)]


def update_policy(module: PolicyHolder, experience: Experience) -> UpdateResult:
    """Take the optimizer steps of one iteration.

    A mini-batch in which no advantage differs from 0 makes no step, unless a part of the loss does not vanish with it
    (an entropy or KL term, KL-Cov): not even weight decay moves the policy then. The learning rate schedule advances
    all the same.
    """
    config = module.update_config
    optimizer, scheduler = module.optimizers(), module.lr_schedulers()
    assert module.policy is not None and not isinstance(optimizer, list) and not isinstance(scheduler, list)
    module.policy.train()
    gradient_norms: list[float] = []
    steps: list[Mapping[str, float]] = []
    for _ in range(config.num_epochs):
        group_prompts = experience.batch.group_prompts
        for prompts in split_prompts(int(group_prompts.max()) + 1, config.num_mini_batches):
            chosen = (group_prompts >= prompts.start) & (group_prompts < prompts.stop)
            teaches = bool((experience.batch.group_teaches & chosen).any())
            sampled = bool(experience.batch.group_sizes[chosen].any())
            if teaches or (sampled and not module.loss.vanishes_without_advantage):
                optimizer.zero_grad()
                steps.append(accumulate_gradient(module, experience, chosen))
                optimizer.step()
                gradient_norms.append(module.gradient_norm)
            if scheduler is not None:
                scheduler.step()
    names = steps[0] if steps else {}
    metrics = {name: sum(step[name] for step in steps) / len(steps) for name in names}
    return UpdateResult(metrics, tuple(gradient_norms))


def accumulate_gradient(module: PolicyHolder, experience: Experience, chosen: Tensor) -> Mapping[str, float]:
    """Add the gradient of one optimizer step's loss to the parameters.

    Args:
        module: Holds the policy and the loss.
        experience: This rank's share of the batch.
        chosen: Which of the batch's groups take part, `[num_groups]`, bool.

    Returns:
        The metrics of the loss, global.
    """
    batch, loss, policy = experience.batch, module.loss, module.policy
    assert policy is not None
    device = policy.device
    lengths = torch.tensor([len(rollout.token_ids) for rollout in batch.rollouts], dtype=torch.int64)
    num_tokens = int(batch.group_tokens[chosen].sum())
    sampled = chosen & (batch.group_sizes > 0)
    weights = token_weights(
        batch.group_sizes[batch.group_indices],
        batch.group_shares[batch.group_indices],
        lengths,
        aggregation=loss.aggregation,
        length_normalisation=loss.length_normalisation,
        num_prompts=len(batch.group_prompts[sampled].unique()),
        num_rollouts=int(batch.group_sizes[chosen].sum()),
        num_tokens=num_tokens,
        max_response_length=module.sampling.max_response_length,
    )
    weights = weights.repeat_interleave(lengths).to(device)
    if experience.engine_weights is not None:
        weights = weights * experience.engine_weights
    inputs = LossInputs(
        old_logprobs=experience.statistics.logprobs,
        advantages=experience.modulated.advantages,
        weights=weights,
        reference_logprobs=experience.reference_logprobs,
        sequence_indices=torch.arange(len(lengths)).repeat_interleave(lengths).to(device),
        marks=experience.marks,
    )
    takes_part = chosen[batch.group_indices]
    if loss.vanishes_without_advantage:
        takes_part &= batch.advantages != 0
    indices = takes_part.nonzero().squeeze(-1).tolist()
    rows = micro_batches(batch.rollouts, indices, batch.spare, module.update_config, device)
    wrapped = module.trainer.strategy.model
    totals: dict[str, float] = {}
    for position, (micro_batch, counts) in enumerate(rows):
        is_last = position == len(rows) - 1
        with gradient_sync(wrapped, policy, is_last or module.update_config.sync_every_micro_batch):
            chosen_inputs = inputs[micro_batch.token_indices] if counts else None
            share, metrics = micro_batch_loss(module, micro_batch, chosen_inputs, num_tokens)
            # DDP and FSDP average gradients over ranks; the loss is a sum over them.
            module.manual_backward(share * world_size())
        for name, metric in metrics.items():
            totals[name] = totals.get(name, 0.0) + metric
    return sum_over_ranks(totals)


def micro_batch_loss(
    module: PolicyHolder, micro_batch: MicroBatch, inputs: LossInputs | None, num_tokens: int
) -> tuple[Tensor, dict[str, float]]:
    """A micro-batch's share of the loss, a scalar, and of its metrics; without inputs 0, to keep the ranks in step."""
    loss, policy = module.loss, module.policy
    assert policy is not None
    totals: dict[str, Tensor] = {}

    def token_loss(statistics: TokenStatistics, tokens: slice) -> Tensor:
        if inputs is None:
            return 0.0 * statistics.logprobs.sum()
        value, metrics = loss(statistics, inputs[tokens], num_tokens)
        for name, metric in metrics.items():
            totals[name] = totals[name] + metric if name in totals else metric
        return value

    share = response_loss(
        policy,
        micro_batch,
        token_loss,
        couples_tokens=loss.couples_tokens,
        temperature=module.sampling.temperature,
        max_logits_bytes=module.update_config.max_logits_bytes,
        entropy_gradient=loss.entropy_coefficient != 0,
    )
    return share, {name: float(total) for name, total in totals.items()}
