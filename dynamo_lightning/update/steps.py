"""The gradient of one optimizer step, micro-batch by micro-batch.

All sums are over micro-batches and ranks before anything is divided, so the gradient does not depend on how the batch
is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynamo_lightning.distributed import world_size
from dynamo_lightning.losses.policy_loss import LossInputs
from dynamo_lightning.losses.token_statistics import TokenStatistics
from dynamo_lightning.policy.forward import response_loss, token_layout
from dynamo_lightning.policy.packing import MicroBatch, MicroBatches
from dynamo_lightning.policy.sharding import gradient_sync
from dynamo_lightning.update.denominators import advantages_at_later_step, kept_scale
from dynamo_lightning.update.experience import Experience
from dynamo_lightning.update.logprobs import check_finite
from dynamo_lightning.update.plan import StepPlan, row_indices
from dynamo_lightning.update.sampling_check import LogpDifference, sampled_logprobs
from dynamo_lightning.update.settings import UpdateSettings
from dynamo_lightning.update.token_weights import step_weights

if TYPE_CHECKING:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TrainedPolicy:
    """The policy with what changes its parameters.

    Example:
        Without a trainer: `TrainedPolicy(policy, torch.optim.SGD(policy.parameters(), lr=0.1))`
    """

    policy: PreTrainedModel
    optimizer: torch.optim.Optimizer | LightningOptimizer
    scheduler: Any = None
    """The learning rate schedule, advanced after each optimizer step; `None` keeps the rate."""
    backward: Callable[[Tensor], None] = Tensor.backward
    """Backward pass from a loss; Lightning's scales the loss with `16-mixed`."""
    wrapped: nn.Module | None = None
    """The strategy's wrapper of the policy, if there is one: gradients are added up over processes through it."""
    scaler: Any = None
    """The gradient scaler of `16-mixed`; `None` in other precisions."""


def accumulate_gradient(
    trained: TrainedPolicy,
    experience: Experience,
    step: StepPlan,
    settings: UpdateSettings,
    *,
    has_moved: bool = True,
    measures_difference: bool = False,
) -> tuple[Mapping[str, Tensor], LogpDifference]:
    """Add the gradient of one optimizer step's loss to the parameters.

    Args:
        trained: The policy.
        experience: This rank's share of the batch.
        step: The rollouts of the step.
        settings: The loss and the memory bounds.
        has_moved: The policy may differ from the one that sampled the batch.
        measures_difference: Compare this rank's log-probabilities with those of sampling.

    Returns:
        This rank's share of the metrics of the loss, scalars; the shares of all ranks add up. And the difference, of
        no tokens unless it is measured.

    Raises:
        RunError: If a log-probability is not finite, on all ranks.
    """
    batch, loss, policy = experience.batch, settings.loss, trained.policy
    device = policy.device
    num_tokens = int(batch.group_tokens[step.groups].sum())
    weights = step_weights(batch, loss, step, settings.max_response_length).to(device)
    if experience.engine_weights is not None:
        weights = weights * experience.engine_weights
    advantages = experience.modulated.advantages
    if has_moved and experience.modulated.candidates is not None:
        advantages = advantages_at_later_step(policy, experience, step, settings)
    if experience.modulated.kept is not None:
        advantages = advantages * kept_scale(batch, loss, step, experience.modulated.kept)
    inputs = LossInputs(
        old_logprobs=experience.old_logprobs,
        advantages=advantages,
        weights=weights,
        reference_logprobs=experience.reference_logprobs,
        sequence_indices=batch.token_rollouts.to(device),
        token_selection=experience.token_selection,
    )
    budget, layout = settings.config.max_tokens_per_micro_batch, token_layout(policy)
    rows = MicroBatches(batch.rollouts, row_indices(step.trained_on), batch.filler, budget, device, layout)
    totals: dict[str, Tensor] = {}
    logprobs = torch.zeros_like(weights)
    for position, (micro_batch, counts) in enumerate(rows):
        is_last = position == len(rows) - 1
        with gradient_sync(trained.wrapped, policy, is_last or settings.config.sync_every_micro_batch):
            own_inputs = inputs[micro_batch.token_indices] if counts else None
            share, metrics, own_logprobs = micro_batch_loss(policy, micro_batch, own_inputs, num_tokens, settings)
            # DDP and FSDP average gradients over ranks; the loss is a sum over them.
            trained.backward(share * world_size())
        if counts:
            logprobs[micro_batch.token_indices] = own_logprobs.to(logprobs.dtype)
        add_metrics(totals, metrics)
    check_finite(batch, logprobs)
    if not measures_difference:
        return totals, LogpDifference()
    computed = step.trained_on[batch.token_rollouts].to(device)
    engine_logprobs = sampled_logprobs([rollout.logprobs for rollout in batch.rollouts], logprobs)
    return totals, LogpDifference.of(logprobs[computed], engine_logprobs[computed])


def micro_batch_loss(
    policy: PreTrainedModel,
    micro_batch: MicroBatch,
    inputs: LossInputs | None,
    num_tokens: int,
    settings: UpdateSettings,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A micro-batch's share of the loss, a scalar, and of its metrics; and its log-probabilities, `[num_tokens]`.

    Without inputs the loss is 0, to keep the ranks in step.
    """
    loss = settings.loss
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
        temperature=settings.temperature,
        max_logits_bytes=settings.config.max_logits_bytes,
        entropy_gradient=loss.entropy_coefficient != 0,
    )
    return share, totals, torch.cat(logprobs)


def add_metrics(sums: dict[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
    """Add metrics by name, in float64 on their device: reading each would wait for the device each time."""
    for name, metric in metrics.items():
        value = metric.detach().double()
        sums[name] = sums[name] + value if name in sums else value
