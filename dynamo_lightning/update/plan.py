"""The plan of an iteration's updates: which rollout is used for what, decided once before any pass over the policy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dynamo_lightning.distributed import max_over_ranks
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.losses.weights import counted_groups
from dynamo_lightning.types import RolloutBatch
from dynamo_lightning.update.config import UpdateConfig

NUM_COMPARED = 8
"""Rollouts of each rank whose statistics are computed again to compare them with the engine's."""


@dataclass(frozen=True)
class StepPlan:
    """Use of the rollouts in one optimizer step."""

    groups: Tensor
    """Groups of the step, `[num_groups]`, bool: those of its mini-batch's prompts."""
    counted_groups: Tensor
    """Groups that count in the denominators, `[num_groups]`, bool; see `weights.counted_groups`."""
    rollouts: Tensor
    """This rank's rollouts of these groups, `[num_rollouts]`, bool."""
    trained_on: Tensor
    """Those of them that have a gradient, `[num_rollouts]`, bool; the others are skipped."""
    is_skipped: bool
    """No rollout of the step has a gradient on any rank, so the optimizer takes no step; the same on all ranks."""


@dataclass(frozen=True)
class UpdatePlan:
    """Use of every rollout of this rank in one iteration.

    Example:
        Two prompts with rewards (1, 0, 0) and (1, 1), hence advantages (1, −½, −½, 0, 0); plain loss without
        modulation, one step. The second group has no gradient, and the step computes the log-probabilities of the
        first by itself:

        | rollout | 0 | 1 | 2 | 3 | 4 |
        |---|---|---|---|---|---|
        | `beforehand` | | | | ✓ | ✓ |
        | `steps[0].rollouts` | ✓ | ✓ | ✓ | ✓ | ✓ |
        | `steps[0].trained_on` | ✓ | ✓ | ✓ | | |

        With DynaMO's modulation `beforehand` is true for all five. With `num_mini_batches: 2` as well, and the second
        of the two steps, which has the second prompt only, `is_skipped`.
    """

    needs_old_logprobs: bool
    """The first step needs log-probabilities of the policy that sampled the tokens, of all rollouts."""
    beforehand: Tensor
    """Rollouts whose statistics are computed before the first step, `[num_rollouts]`, bool: all, or only those that no
    step trains on, for their entropies; if the engine has given them, a sample to compare."""
    uses_engine_statistics: bool
    """The engine's statistics are taken for the policy's own; the same on all ranks."""
    needed: Tensor
    """Rollouts whose statistics must be known before the first step, `[num_rollouts]`, bool."""
    steps: tuple[StepPlan, ...]
    """All passes over the mini-batches, in order: `num_epochs · num_mini_batches`."""

    @property
    def compares_beforehand(self) -> bool:
        """True if the log-probabilities of all rollouts are compared before the first step; else within it."""
        return self.needs_old_logprobs and not self.uses_engine_statistics

    @property
    def trained_on(self) -> Tensor:
        """Rollouts that some step trains on, `[num_rollouts]`, bool."""
        return torch.stack([step.trained_on for step in self.steps]).any(0)

    @classmethod
    def of(
        cls,
        batch: RolloutBatch,
        loss: PolicyLoss,
        config: UpdateConfig,
        uses_external_engine: bool,
        device: torch.device | None = None,
    ) -> UpdatePlan:
        """Plan the updates of an iteration; with `mask_truncated` ranks communicate.

        Args:
            batch: This rank's rollouts with their advantages.
            loss: Says which rollouts have a gradient.
            config: Numbers of passes and of mini-batches.
            uses_external_engine: The tokens were sampled by an engine whose log-probabilities are its own.
            device: Where ranks communicate; the CPU by default.
        """
        needs_old_logprobs = uses_old_logprobs(loss, config, uses_external_engine)
        trained_on = has_gradient(batch, loss)
        num_prompts = int(batch.group_prompts.max()) + 1
        steps = []
        for prompts in split_prompts(num_prompts, config.num_mini_batches):
            groups = (batch.group_prompts >= prompts.start) & (batch.group_prompts < prompts.stop)
            steps.append(plan_step(batch, loss, groups, device or torch.device("cpu"), trained_on))
        needed = torch.ones_like(trained_on) if needs_old_logprobs else ~trained_on
        is_given = not uses_external_engine and not config.recompute_logprobs and has_engine_statistics(batch, device)
        beforehand = sample_to_compare(batch) if is_given else needed
        return cls(needs_old_logprobs, beforehand, is_given, needed, tuple(steps) * config.num_epochs)


def plan_step(
    batch: RolloutBatch, loss: PolicyLoss, groups: Tensor, device: torch.device, trained_on: Tensor | None = None
) -> StepPlan:
    """Plan one optimizer step; with `mask_truncated` ranks communicate.

    Args:
        batch: This rank's rollouts with their advantages.
        loss: Says which rollouts have a gradient.
        groups: Groups of the step, `[num_groups]`, bool.
        device: Where ranks communicate.
        trained_on: Result of `has_gradient`, if known.
    """
    in_step = groups[batch.group_indices]
    trained_on = in_step & (has_gradient(batch, loss) if trained_on is None else trained_on)
    if loss.mask_truncated:  # only the rank that holds a response knows that it was truncated
        any_gradient = bool(max_over_ranks(int(trained_on.any()), device))
    else:
        with_gradient = batch.group_has_signal if loss.vanishes_without_advantage else batch.group_sizes > 0
        any_gradient = bool((with_gradient & groups).any())
    counted = counted_groups(
        torch.where(groups, batch.group_sizes, 0), needs_others=loss.advantage.equal_rewards_give_zero
    )
    return StepPlan(groups, counted, in_step, trained_on, not any_gradient)


def split_prompts(num_prompts: int, num_mini_batches: int) -> list[range]:
    """Cut the prompts into mini-batches of whole prompts whose sizes differ by at most one; none is empty."""
    num_mini_batches = min(num_mini_batches, num_prompts)
    cuts = [num_prompts * i // num_mini_batches for i in range(num_mini_batches + 1)]
    return [range(start, end) for start, end in pairwise(cuts)]


def has_engine_statistics(batch: RolloutBatch, device: torch.device | None) -> bool:
    """True if the engine has given the statistics of all ranks' rollouts."""
    is_missing = any(rollout.token_statistics is None for rollout in batch.rollouts)
    return not max_over_ranks(int(is_missing), device or torch.device("cpu"))


def sample_to_compare(batch: RolloutBatch) -> Tensor:
    """A few of this rank's rollouts, others in each iteration, `[num_rollouts]`, bool."""
    count = len(batch.rollouts)
    chosen = torch.zeros(count, dtype=torch.bool)
    if count:
        spread = torch.arange(min(count, NUM_COMPARED)) * count // min(count, NUM_COMPARED)
        chosen[(spread + batch.iteration) % count] = True
    return chosen


def row_indices(mask: Tensor) -> list[int]:
    """Positions of the true entries, ascending."""
    indices: list[int] = mask.nonzero().squeeze(-1).tolist()
    return indices


def has_gradient(batch: RolloutBatch, loss: PolicyLoss) -> Tensor:
    """This rank's rollouts for which the loss has a gradient, `[num_rollouts]`, bool."""
    chosen = batch.advantages != 0 if loss.vanishes_without_advantage else torch.ones_like(batch.advantages).bool()
    if loss.mask_truncated:
        chosen = chosen & ~torch.tensor([rollout.truncated for rollout in batch.rollouts], dtype=torch.bool)
    return chosen


def uses_old_logprobs(loss: PolicyLoss, config: UpdateConfig, uses_external_engine: bool) -> bool:
    """True if the first step needs statistics of the policy that sampled the tokens before it begins.

    It does if there are several steps, if advantages are made of, modulated, selected or weighted by them. Otherwise
    the ratio is 1, with the gradient of log π, and the step computes the statistics itself.
    """
    several_steps = config.num_epochs > 1 or config.num_mini_batches > 1 or loss.advantage.needs_score_norms
    return several_steps or loss.batch_modulation is not None or loss.penalty is not None or uses_external_engine


def passes_per_rollout(loss: PolicyLoss, config: UpdateConfig, uses_external_engine: bool) -> tuple[int, int]:
    """Cost of a rollout from its log-probabilities to the last step, in forward passes; a backward pass counts as two.

    Returns:
        That of a rollout whose group has different rewards, and of one whose group has equal rewards.
    """
    trained_on = int(uses_old_logprobs(loss, config, uses_external_engine)) + 3 * config.num_epochs
    is_skipped = loss.vanishes_without_advantage and loss.advantage.equal_rewards_give_zero
    return trained_on, 1 if is_skipped else trained_on
