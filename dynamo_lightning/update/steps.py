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

from dynamo_lightning.distributed import sum_over_ranks, world_size
from dynamo_lightning.errors import RunError
from dynamo_lightning.losses.policy_loss import LossInputs, PolicyLoss
from dynamo_lightning.losses.token_statistics import TokenStatistics
from dynamo_lightning.policy.packing import MicroBatch, micro_batches
from dynamo_lightning.policy.reading import response_loss
from dynamo_lightning.policy.sharding import clip_gradient, gradient_sync
from dynamo_lightning.rollout.generator import SamplingConfig
from dynamo_lightning.update.config import UpdateConfig
from dynamo_lightning.update.denominators import advantages_at_later_step, kept_scale, step_weights
from dynamo_lightning.update.scoring import Experience, check_finite, learnt_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
            RunError: If it is not finite: a step would ruin the policy.
        """
        assert self.policy is not None
        self.gradient_norm = float(clip_gradient(self.policy, self.gradient_clip_val))
        if not math.isfinite(self.gradient_norm):
            raise RunError(
                f"the gradient norm is {self.gradient_norm} at optimizer step {self.global_step}: training stops "
                "before the policy is lost; the last checkpoint is intact"
            )


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
                steps.append(accumulate_gradient(module, experience, chosen, has_moved=bool(gradient_norms)))
                optimizer.step()
                gradient_norms.append(module.gradient_norm)
            if scheduler is not None:
                advance(scheduler, has_stepped=bool(gradient_norms))
    means = {name: sum(step[name] for step in steps) / len(steps) for name in (steps[0] if steps else ())}
    entropy = experience.entropy + means.pop("entropy", 0.0)
    return UpdateResult({**experience.metrics, **means, "entropy": entropy}, tuple(gradient_norms))


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
    module: PolicyHolder, experience: Experience, chosen: Tensor, *, has_moved: bool = True
) -> Mapping[str, float]:
    """Add the gradient of one optimizer step's loss to the parameters.

    Args:
        module: Holds the policy and the loss.
        experience: This rank's share of the batch.
        chosen: Which of the batch's groups take part, `[num_groups]`, bool.
        has_moved: The policy may differ from the one that sampled the batch.

    Returns:
        The metrics of the loss, global.

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
        marks=experience.marks,
    )
    indices = takes_part.nonzero().squeeze(-1).tolist()
    rows = micro_batches(batch.rollouts, indices, batch.spare, module.update_config.max_tokens_per_micro_batch, device)
    wrapped = module.trainer.strategy.model
    totals: dict[str, float] = {}
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
        for name, metric in metrics.items():
            totals[name] = totals.get(name, 0.0) + metric
    check_finite(batch, logprobs)
    return sum_over_ranks(totals)


def micro_batch_loss(
    module: PolicyHolder, micro_batch: MicroBatch, inputs: LossInputs | None, num_tokens: int
) -> tuple[Tensor, dict[str, float], Tensor]:
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
    return share, {name: float(total) for name, total in totals.items()}, torch.cat(logprobs)
