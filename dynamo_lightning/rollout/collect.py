"""Rollouts and rewards of one iteration: sampled on this rank, scored, and made known to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dynamo_lightning.allocation.dynamic_sampling import DynamicSampling, DynamicSamplingConfig
from dynamo_lightning.allocation.groups import make_groups
from dynamo_lightning.distributed import gather_objects, rank, run_seed, stop_together, world_size
from dynamo_lightning.engines.engine import Completion, Engine, Request, SamplingConfig
from dynamo_lightning.environments import Environment
from dynamo_lightning.errors import RunError
from dynamo_lightning.rewards.failures import failure_metrics
from dynamo_lightning.rewards.group_scoring import score_complete_groups
from dynamo_lightning.rewards.scorer import RewardScorer, check_failure_share, needs_reward
from dynamo_lightning.rollout.exchange import spread_over_ranks
from dynamo_lightning.rollout.parts import PartSampler
from dynamo_lightning.rollout.requests import make_requests, share_of_rank
from dynamo_lightning.rollout.runner import RolloutRunner
from dynamo_lightning.types import (
    Collected,
    GroupPlan,
    Key,
    Outcome,
    PromptBatch,
    Rollout,
    RolloutRequest,
    Score,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Taken = tuple[list[Rollout], Rollout, int]
"""This rank's rollouts of a batch, any of them, and the RL iteration whose weights sampled them."""


class RolloutCollector:
    """Turns a batch of prompts with their group sizes into rollouts and outcomes.

    Args:
        generator: Engine that samples the responses.
        environment: What answers them.
        scorer: Computes their rewards.
        sampling: Options of sampling.
        passes: Cost of a rollout in the update, see `passes_per_rollout`, by which rollouts are distributed over ranks.
        dynamic_sampling: When to sample further prompts; `None` takes each batch as it is.
        with_statistics: Have an engine that can give `token_statistics` in training.
    """

    def __init__(
        self,
        generator: Engine,
        environment: Environment,
        scorer: RewardScorer,
        sampling: SamplingConfig,
        passes: tuple[int, int],
        dynamic_sampling: DynamicSamplingConfig | None = None,
        with_statistics: bool = False,
    ) -> None:
        self.generator = generator
        self.scorer = scorer
        self.sampling = sampling
        self.dynamic_sampling = dynamic_sampling
        self.passes = passes
        self.with_statistics = with_statistics
        self.runner = RolloutRunner(generator, environment, sampling.max_response_length)

    def collect(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        datamodule: Any,
        batch: PromptBatch,
        phase: Callable[[str], AbstractContextManager[None]],
        taken: Taken | None = None,
    ) -> Collected:
        """Sample, score and observe: once, or with dynamic sampling until enough groups have non-zero advantages.

        Args:
            policy: The current policy.
            tokenizer: Decodes the responses.
            datamodule: Splits the batch into parts, observes the outcomes and provides further prompts.
            batch: The global batch of an iteration.
            phase: Timer of a phase, a context manager by its name.
            taken: Rollouts of the batch, if they are sampled already.
        """
        search = DynamicSampling(len(batch.prompts), self.dynamic_sampling) if self.dynamic_sampling else None
        rollouts: list[Rollout] = []
        outcomes: list[Outcome] = []
        plans: list[list[GroupPlan]] = [[], []]  # of pilots, or of whole groups, and of commits
        todo: PromptBatch | None = batch
        while todo is not None:
            first, sampler = len(outcomes), PartSampler(self, policy, tokenizer)
            for number, part in enumerate(datamodule.parts(todo)):  # one, or a pilot and what its outcomes lead to
                with phase("generate"):
                    own, filler, sampled_at = taken or (*sampler.sample(part), batch.iteration)
                with phase("reward"):
                    scored = self.score(part, own)
                datamodule.observe(part, self.without_dropped(scored), sampled_at)
                plans[number] += part.plans
                rollouts += own
                outcomes += scored
            if search is None:
                break
            search.add(todo, self.without_dropped(outcomes[first:]))
            todo = datamodule.more(batch.iteration, search.num_missing)
        lengths = {plan.prompt.prompt_id: len(plan.prompt.token_ids) for plan in plans[0]}
        num_tokens = sum(lengths[outcome.prompt_id] + outcome.num_tokens for outcome in outcomes)
        metrics = failure_metrics(outcomes) | (search.metrics() if search else {})
        chosen = [plan for part in plans for plan in (search.choose(part) if search else part)]
        kept = {plan.prompt.prompt_id for plan in chosen}
        rollouts = [rollout for rollout in rollouts if rollout.prompt.prompt_id in kept]
        scored = self.without_dropped([outcome for outcome in outcomes if outcome.prompt_id in kept])
        own = spread_over_ranks(rollouts, scored, [plan.prompt for plan in chosen], self.passes)
        return Collected(batch.iteration, make_groups(chosen, own, scored), filler, num_tokens, metrics)

    def sample(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        stage: str,
        temperature: float,
        wanted: Collection[Key] | None = None,
        submit: bool = True,
        scored_later: Collection[Key] = (),
    ) -> tuple[list[Rollout], Rollout]:
        """This rank's share of the batch's rollouts, and one rollout that every rank has even if its share is empty.

        Each batch that the generator makes is scored from then on, while the next one is sampled; `score` waits for
        what is left.

        Args:
            policy: The current policy.
            tokenizer: Decodes the responses.
            batch: Prompts and group sizes.
            stage: `train`, or the name of the evaluation.
            temperature: Divides the logits.
            wanted: Only the rollouts with these keys, at least one, the same on all ranks.
            submit: Begin to score them; `False` if something else is scored first.
            scored_later: Rollouts that are not scored with the next `score`, by key.
        """
        every = make_requests(batch, stage, run_seed())
        chosen = [request for request in every if wanted is None or request.key in wanted]
        requests, num_filled_up = share_of_rank(chosen, rank(), world_size())
        policy.eval()
        num_own = len(requests) - num_filled_up
        rollouts: dict[int, Rollout] = {}
        self.scorer.tokenizer = tokenizer
        self.scorer.watch.expect(len(chosen))
        options: dict[str, Any] = {"temperature": temperature, **self.sampling.stop_options()}
        if stage == "train" and self.with_statistics:
            options["with_statistics"] = True

        def ask(asked: Sequence[Request]) -> list[Completion]:
            return self.generator.generate(policy, tokenizer, asked, **options)

        device = policy.device if world_size() > 1 else None
        for positions in self.generator.batches([len(request.prompt.token_ids) for request in requests]):
            sampled = self.runner.play(ask, tokenizer, [requests[position] for position in positions], device)
            rollouts.update(zip(positions, sampled, strict=True))
            if submit:
                own = [rollouts[position] for position in positions if position < num_own]
                self.submit([rollout for rollout in own if rollout.key not in scored_later])
        return [rollouts[position] for position in range(num_own)], rollouts[0]

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        """Begin to score rollouts; those of a reward of groups wait until their group is complete."""
        if not self.scorer.reward.needs_group:
            self.scorer.submit([rollout for rollout in rollouts if needs_reward(rollout)])

    def sample_in_background(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[RolloutRequest]
    ) -> Callable[[], list[Rollout]]:
        """A function that samples these rollouts from the weights that were pushed last, in any thread.

        Args:
            policy: Still has these weights.
            tokenizer: Decodes the responses.
            requests: This rank's share.
        """
        longest = max(len(request.prompt.token_ids) for request in requests) + self.sampling.max_response_length
        ask = self.generator.begin(
            policy, tokenizer, longest=longest, temperature=self.sampling.temperature, **self.sampling.stop_options()
        )
        return lambda: self.runner.play(ask, tokenizer, requests)

    def score(self, batch: PromptBatch, rollouts: Sequence[Rollout]) -> tuple[Outcome, ...]:
        """Outcomes of all ranks' rollouts, by prompt and sample index, on every rank.

        Raises:
            RunError: If more rewards failed than `model.scoring.max_failure_share` allows.
        """
        own = [
            Outcome(
                *rollout.key,
                score,
                rollout.response_length,
                rollout.truncated,
                len(rollout.token_ids) - rollout.response_length,
            )
            for rollout, score in zip(rollouts, self._scores(batch, rollouts), strict=True)
        ]
        position = {prompt.prompt_id: index for index, prompt in enumerate(batch.prompts)}
        outcomes = sorted(gather_objects(own), key=lambda o: (position[o.prompt_id], o.sample_index))
        scores = [outcome.score for outcome in outcomes]
        failed = [score for score in scores if score.failure is not None]
        if failed:
            rank_zero_warn(f"{len(failed)} of {len(scores)} rewards failed, the first by {failed[0].message}")
        check_failure_share(scores, self.scorer.config.max_failure_share)
        return tuple(outcomes)

    def _scores(self, batch: PromptBatch, rollouts: Sequence[Rollout]) -> list[Score]:
        """The scores of this rank's rollouts; an error of any rank is raised on all, which would wait for it."""
        self.scorer.watch.expect(sum(batch.group_sizes))  # of rollouts that were sampled earlier
        asked = [rollout for rollout in rollouts if needs_reward(rollout)]
        if self.scorer.reward.needs_group:
            found = score_complete_groups(self.scorer, asked)
        else:
            found, message = [], ""
            try:
                found = self.scorer.score(asked)
            except RunError as error:
                message = str(error)
            stop_together(message)
        scores = iter(found)
        return [next(scores) if needs_reward(rollout) else self.scorer.own_score(rollout) for rollout in rollouts]

    def without_dropped(self, outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
        """The outcomes that count: with `model.scoring.failure_score: drop`, those whose reward did not fail."""
        if self.scorer.config.failure_score != "drop":
            return tuple(outcomes)
        kept = tuple(outcome for outcome in outcomes if outcome.score.failure is None)
        if not kept:
            raise RunError(f"all {len(outcomes)} rollouts of the batch were dropped: no reward could be computed")
        return kept
