"""From scored rollouts to a better policy: one or several optimizer steps.

They run over the rollouts that teach something. All sums are over micro-batches and ranks before anything is divided,
so the gradient does not depend on how the batch is cut.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from dynamo_lightning.distributed import max_over_ranks, sum_over_ranks, world_size
from dynamo_lightning.errors import RunError
from dynamo_lightning.losses.policy_loss import LossInputs, PolicyLoss
from dynamo_lightning.losses.token_statistics import TokenStatistics
from dynamo_lightning.policy.dropout import set_training_mode
from dynamo_lightning.policy.packing import MicroBatch, MicroBatches
from dynamo_lightning.policy.reading import response_loss, token_layout
from dynamo_lightning.policy.sharding import clip_gradient, gradient_sync
from dynamo_lightning.rollout.generator import SamplingConfig
from dynamo_lightning.types import RolloutBatch
from dynamo_lightning.update.config import UpdateConfig
from dynamo_lightning.update.denominators import advantages_at_later_step, kept_scale, step_weights
from dynamo_lightning.update.sampling_check import (
    LogpDifference,
    check_difference,
    difference_metrics,
    global_difference,
    sampled_logprobs,
)
from dynamo_lightning.update.scoring import Experience, check_finite, learnt_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MAX_OVERFLOWS_IN_A_ROW = 20
"""The scaler starts at 2¹⁶ and halves at each overflow: then the gradient itself is too large for float16."""


class PolicyHolder(L.LightningModule):
    """What the update needs of the module that it updates."""

    policy: PreTrainedModel | None
    loss: PolicyLoss
    sampling: SamplingConfig
    update_config: UpdateConfig
    gradient_clip_val: float | None
    gradient_norm: float = 0.0
    """Of the last optimizer step, before clipping."""
    num_overflows_in_a_row: int = 0
    """Optimizer steps skipped by the gradient scaler since the last that was taken."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the total gradient norm and keep what it was before.

        With `16-mixed` a norm that is not finite is an overflow: the gradient scaler skips the step and lowers its
        scale. That is common in the first steps and rare later.

        Raises:
            RunError: If it is not finite: a step would ruin the policy; with `16-mixed` if 21 in a row are not.
        """
        assert self.policy is not None
        self.gradient_norm = float(clip_gradient(self.policy, self.gradient_clip_val))
        if math.isfinite(self.gradient_norm):
            self.num_overflows_in_a_row = 0
            return
        scaler = gradient_scaler(self)
        self.num_overflows_in_a_row += 1
        if scaler is not None and self.num_overflows_in_a_row > MAX_OVERFLOWS_IN_A_ROW:
            raise RunError(
                f"trainer.precision={self.trainer.precision}: the gradient overflowed in "
                f"{self.num_overflows_in_a_row} optimizer steps in a row, at last with a scale of "
                f"{scaler.get_scale():g}: training stops at optimizer step {self.global_step}; use bf16-mixed"
            )
        if scaler is None:
            raise RunError(
                f"the gradient norm is {self.gradient_norm} at optimizer step {self.global_step}: training stops "
                "before the policy is lost; the last checkpoint is intact"
            )


def gradient_scaler(module: L.LightningModule) -> Any:
    """The scaler of `16-mixed`; `None` in other precisions."""
    return getattr(getattr(module.trainer, "precision_plugin", None), "scaler", None)


@dataclass(frozen=True)
class UpdateResult:
    """What the optimizer steps of one iteration did."""

    metrics: Mapping[str, float]
    """Those of the scoring pass, and means over the optimizer steps; each a global sum over a global denominator."""
    gradient_norms: tuple[float, ...]
    """Of each step, before clipping; empty if nothing was to be learnt."""


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
    set_training_mode(module.policy)
    gradient_norms: list[float] = []
    sums: dict[str, Tensor] = {}
    num_steps = 0
    num_overflows = 0
    difference = experience.difference if experience.old_logprobs is not None else None
    for _ in range(config.num_epochs):
        group_prompts = experience.batch.group_prompts
        for prompts in split_prompts(int(group_prompts.max()) + 1, config.num_mini_batches):
            chosen = (group_prompts >= prompts.start) & (group_prompts < prompts.stop)
            if has_gradient(experience.batch, module.loss, chosen, module.policy.device):
                optimizer.zero_grad()
                own: list[LogpDifference] = []
                has_moved = bool(gradient_norms)
                add_metrics(sums, accumulate_gradient(module, experience, chosen, own, has_moved=has_moved))
                num_steps += 1
                if difference is None:  # the only update is also what scores its tokens
                    difference = checked_difference(module.policy, experience, own[0])
                optimizer.step()
                if math.isfinite(module.gradient_norm):
                    gradient_norms.append(module.gradient_norm)
                else:
                    num_overflows += 1
            if scheduler is not None:
                advance(scheduler, has_stepped=bool(gradient_norms))
    means = {name: total / num_steps for name, total in sum_over_ranks(as_floats(sums)).items()}
    if difference is None:
        difference = checked_difference(module.policy, experience, LogpDifference())
    entropy = experience.entropy + means.pop("entropy", 0.0)
    if gradient_scaler(module) is not None:
        means["frac_overflow"] = num_overflows / max(1, num_steps)
    metrics = {**experience.metrics, **means, **difference_metrics(difference), "entropy": entropy}
    return UpdateResult(metrics, tuple(gradient_norms))


def add_metrics(sums: dict[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
    """Add metrics by name, in float64 on their device: reading each would wait for the device each time."""
    for name, metric in metrics.items():
        value = metric.detach().double()
        sums[name] = sums[name] + value if name in sums else value


def as_floats(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers of scalar tensors, read from the device together."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}


def has_gradient(batch: RolloutBatch, loss: PolicyLoss, chosen: Tensor, device: torch.device) -> bool:
    """Whether any rollout of the chosen groups has a part in the loss's gradient, on any rank; the same on all."""
    if loss.mask_truncated:  # a group may teach by its truncated responses only
        own = learnt_from(batch, loss) & chosen[batch.group_indices]
        return bool(max_over_ranks(int(own.any()), device))
    teaches = bool((batch.group_teaches & chosen).any())
    sampled = bool(batch.group_sizes[chosen].any())
    return teaches or (sampled and not loss.vanishes_without_advantage)


def checked_difference(policy: PreTrainedModel, experience: Experience, own: LogpDifference) -> LogpDifference:
    """Difference of sampled and scored log-probabilities over all tokens and ranks.

    Args:
        policy: The policy.
        experience: With the difference of the tokens that the update leaves out.
        own: That of this rank's tokens in the update.

    Raises:
        RunError: If it is larger than the run may go on with, on all ranks.
    """
    difference = global_difference(experience.difference + own)
    check_difference(difference, experience.logp_tolerance, policy)
    return difference


def advance(scheduler: Any, *, has_stepped: bool) -> None:
    """Advance the learning rate schedule.

    Before the first optimizer step PyTorch warns that the two are called in the wrong order; here the order is right,
    and there was nothing to learn from so far.
    """
    with warnings.catch_warnings():
        if not has_stepped:
            warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
        scheduler.step()


def accumulate_gradient(
    module: PolicyHolder,
    experience: Experience,
    chosen: Tensor,
    differences: list[LogpDifference] | None = None,
    *,
    has_moved: bool = True,
) -> Mapping[str, Tensor]:
    """Add the gradient of one optimizer step's loss to the parameters.

    Args:
        module: Holds the policy and the loss.
        experience: This rank's share of the batch.
        chosen: Which of the batch's groups take part, `[num_groups]`, bool.
        differences: Takes the difference of this rank's log-probabilities from the sampled ones, if given.
        has_moved: The policy may differ from the one that sampled the batch.

    Returns:
        This rank's share of the metrics of the loss, scalars; the shares of all ranks add up.

    Raises:
        RunError: If a log-probability is not finite, on all ranks.
    """
    batch, loss, policy = experience.batch, module.loss, module.policy
    assert policy is not None
    device = policy.device
    num_tokens = int(batch.group_tokens[chosen].sum())
    weights = step_weights(experience, loss, chosen, module.sampling.max_response_length).to(device)
    if experience.engine_weights is not None:
        weights = weights * experience.engine_weights
    takes_part = chosen[batch.group_indices] & learnt_from(batch, loss)
    advantages = experience.modulated.advantages
    if has_moved and experience.modulated.candidates is not None:
        advantages = advantages_at_later_step(module, experience, chosen)
    if experience.modulated.kept is not None:
        advantages = advantages * kept_scale(experience, loss, chosen, experience.modulated.kept)
    inputs = LossInputs(
        old_logprobs=experience.old_logprobs,
        advantages=advantages,
        weights=weights,
        reference_logprobs=experience.reference_logprobs,
        sequence_indices=batch.token_rollouts.to(device),
        token_selection=experience.token_selection,
    )
    indices = takes_part.nonzero().squeeze(-1).tolist()
    budget, layout = module.update_config.max_tokens_per_micro_batch, token_layout(policy)
    rows = MicroBatches(batch.rollouts, indices, batch.spare, budget, device, layout)
    wrapped = module.trainer.strategy.model
    totals: dict[str, Tensor] = {}
    logprobs = torch.zeros_like(weights)
    for position, (micro_batch, counts) in enumerate(rows):
        is_last = position == len(rows) - 1
        with gradient_sync(wrapped, policy, is_last or module.update_config.sync_every_micro_batch):
            chosen_inputs = inputs[micro_batch.token_indices] if counts else None
            share, metrics, own_logprobs = micro_batch_loss(module, micro_batch, chosen_inputs, num_tokens)
            # DDP and FSDP average gradients over ranks; the loss is a sum over them.
            module.manual_backward(share * world_size())
        if counts:
            logprobs[micro_batch.token_indices] = own_logprobs.to(logprobs.dtype)
        add_metrics(totals, metrics)
    check_finite(batch, logprobs)
    if differences is not None:
        computed = takes_part[batch.token_rollouts].to(device)
        engine_logprobs = sampled_logprobs([rollout.logprobs for rollout in batch.rollouts], logprobs)
        differences.append(LogpDifference.of(logprobs[computed], engine_logprobs[computed]))
    return totals


def micro_batch_loss(
    module: PolicyHolder, micro_batch: MicroBatch, inputs: LossInputs | None, num_tokens: int
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A micro-batch's share of the loss, a scalar, and of its metrics; and its log-probabilities, `[num_tokens]`.

    Without inputs the loss is 0, to keep the ranks in step.
    """
    loss, policy = module.loss, module.policy
    assert policy is not None
    totals: dict[str, Tensor] = {}
    logprobs: list[Tensor] = []

    def token_loss(statistics: TokenStatistics, tokens: slice) -> Tensor:
        logprobs.append(statistics.logprobs.detach())
        if inputs is None:
            return 0.0 * statistics.logprobs.sum()
        value, metrics = loss(statistics, inputs[tokens], num_tokens)
        add_metrics(totals, metrics)
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
    return share, totals, torch.cat(logprobs)
