"""The allocator: prompts in, one group of rollouts planned for each; outcomes in, better plans for later batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dynamo_lightning.allocation.allocate import allocate_rollouts
from dynamo_lightning.allocation.budget import RolloutBudget
from dynamo_lightning.allocation.estimators.base import VarianceEstimator
from dynamo_lightning.allocation.hidden_scores import HiddenScores
from dynamo_lightning.allocation.pilot import allocate_commit, commit_bounds, pilot_weights
from dynamo_lightning.allocation.prompt_features import HIDDEN_STATE, prompt_features
from dynamo_lightning.allocation.records import Estimate, FloatArray, IntArray
from dynamo_lightning.allocation.statistics import PromptStatistics
from dynamo_lightning.errors import UserError
from dynamo_lightning.types import GroupPlan, Prompt, RolloutGroup


class Allocator:
    """Plans the groups of each batch to minimize gradient variance, from running estimates of success rates.

    The same calls give the same plans on every rank.

    Args:
        budget: Rollouts of a batch, and how they may be spent.
        estimator: What is remembered of each prompt.
        success_threshold: Rewards at or above this value count as success.

    Raises:
        UserError: If no batch could meet the budget: its mean and its bounds contradict each other.
    """

    def __init__(self, budget: RolloutBudget, estimator: VarianceEstimator, success_threshold: float = 0.5) -> None:
        self.budget = budget
        self.success_threshold = success_threshold
        self.statistics = PromptStatistics(estimator)
        self.hidden_scores = HiddenScores() if HIDDEN_STATE in estimator.features else None
        self.read_hidden_states: Callable[[Sequence[Prompt]], FloatArray] | None = None
        """Gives the policy's hidden states of prompts, `[num_prompts, hidden_size]`, the same on every rank."""
        # An impossible budget is the same mistake for every batch: say so before anything is loaded.
        unknown = self.statistics.estimate([0], iteration=0)
        self.allocate(unknown, [0])
        if budget.pilot:
            pilot_weights(unknown, [0], budget)

    def allocate(self, estimate: Estimate, prompt_ids: Sequence[int]) -> IntArray:
        """Allocate the budget of a batch to its prompts.

        Args:
            estimate: What is expected of each prompt, `[num_prompts]` each.
            prompt_ids: `[num_prompts]`, to break ties.

        Returns:
            Group sizes, `[num_prompts]`, of mean `rollouts_per_prompt` exactly (with `cost: tokens`: worth it).
        """
        return allocate_rollouts(
            estimate,
            prompt_ids,
            budget=self.budget.of(len(prompt_ids)),
            min_rollouts=self.budget.min_rollouts,
            max_rollouts=self.budget.max_rollouts,
            rule=self.budget.rule,
            cost=self.budget.cost,
            accept_skip_bias=self.budget.accept_skip_bias,
        )

    def plan(self, prompts: Sequence[Prompt], iteration: int) -> tuple[GroupPlan, ...]:
        """Plan one group for each prompt; with a pilot the pilot's groups, whose share in the gradient is now fixed.

        Args:
            prompts: Distinct prompts of a batch, `[num_prompts]`.
            iteration: The coming RL iteration.
        """
        prompt_ids = [prompt.prompt_id for prompt in prompts]
        estimate = self.statistics.estimate(prompt_ids, iteration, self._features(prompts, iteration))
        if self.budget.pilot:
            sizes = np.full(len(prompt_ids), self.budget.pilot)
            shares = pilot_weights(estimate, prompt_ids, self.budget)
            least, _ = commit_bounds(len(prompt_ids), self.budget)
            mean = float(self.budget.rollouts_per_prompt - self.budget.pilot)
        else:
            sizes, shares = self.allocate(estimate, prompt_ids), np.ones(len(prompt_ids))
            least, mean = 0, 0.0
        return tuple(
            GroupPlan(prompt, size, share, 0, success_rate, variance, unseen, self.budget.pilot_baseline, least, mean)
            for prompt, size, share, success_rate, variance, unseen in zip(
                prompts,
                sizes.tolist(),
                shares.tolist(),
                estimate.success_rate.tolist(),
                estimate.bernoulli_variance.tolist(),
                estimate.unseen.tolist(),
                strict=True,
            )
        )

    def plan_commit(self, pilots: Sequence[GroupPlan], iteration: int) -> tuple[GroupPlan, ...]:
        """Plan the second group of each prompt from what its pilot showed; none without a pilot.

        `observe` must have been called with the pilots' outcomes. The shares of both groups add up to 1.
        """
        if not self.budget.pilot:
            return ()
        prompt_ids = [plan.prompt.prompt_id for plan in pilots]
        features = self._features([plan.prompt for plan in pilots], iteration)
        estimate = self.statistics.estimate(prompt_ids, iteration, features)
        shares = np.array([plan.share for plan in pilots])
        sizes = allocate_commit(estimate, prompt_ids, shares, self.budget)
        return tuple(
            replace(plan, size=size, share=1 - plan.share, first_sample_index=plan.first_sample_index + plan.size)
            for plan, size in zip(pilots, sizes.tolist(), strict=True)
        )

    def observe(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        """Learn from the outcomes of planned groups: the same ones, of all ranks, on every rank.

        Args:
            groups: Of distinct prompts.
            iteration: The RL iteration whose weights sampled them.
        """
        prompt_ids = [group.plan.prompt.prompt_id for group in groups]
        successes, counts, tokens = np.zeros((3, len(groups)))
        for row, group in enumerate(groups):
            counts[row] = len(group.outcomes)
            successes[row] = sum(outcome.score.reward >= self.success_threshold for outcome in group.outcomes)
            tokens[row] = sum(outcome.num_tokens for outcome in group.outcomes)
        features = self._features([group.plan.prompt for group in groups], iteration, is_planned=True)
        if self.hidden_scores is not None:
            self.hidden_scores.observe(prompt_ids, successes, counts, iteration)
        self.statistics.observe(prompt_ids, successes, counts, iteration, tokens, features)

    def _features(self, prompts: Sequence[Prompt], iteration: int, is_planned: bool = False) -> FloatArray | None:
        """Return the features that the estimator asks for, `[num_prompts, num_features]`; `None` without any."""
        names = self.statistics.estimator.features
        if not names:
            return None
        scores = (
            None if self.hidden_scores is None else self._scores(self.hidden_scores, prompts, iteration, is_planned)
        )
        return prompt_features(prompts, names, scores)

    def _scores(
        self, hidden_scores: HiddenScores, prompts: Sequence[Prompt], iteration: int, is_planned: bool
    ) -> FloatArray:
        """Scores of prompts without any outcome before this iteration, `[num_prompts]`; NaN for the others.

        Only prompts that were never visited are passed through the policy, once, when they are planned.
        """
        prompt_ids = [prompt.prompt_id for prompt in prompts]
        scores = hidden_scores.waiting(prompt_ids, iteration)
        is_known = self.statistics.is_known(prompt_ids)
        new = [] if is_planned else np.flatnonzero(np.isnan(scores) & ~is_known).tolist()
        if new:
            if self.read_hidden_states is None:
                raise UserError(
                    "data.estimator.features: 'hidden_state' is read from the policy that is trained, and there is "
                    "none: plan within `fit`, or leave it out"
                )
            states = self.read_hidden_states([prompts[row] for row in new])
            scores[new] = hidden_scores.score([prompt_ids[row] for row in new], states, iteration)
        return scores

    def state_dict(self) -> dict[str, Any]:
        """The statistics: tensors and primitives only."""
        scores = {} if self.hidden_scores is None else {"hidden_scores": self.hidden_scores.state_dict()}
        return {**self.statistics.state_dict(), **scores}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; scores of hidden states are learned anew if it has none."""
        self.statistics.load_state_dict(state_dict)
        if self.hidden_scores is not None and "hidden_scores" in state_dict:
            self.hidden_scores.load_state_dict(state_dict["hidden_scores"])
