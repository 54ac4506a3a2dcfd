"""Rollouts and rewards of one iteration: sampled on this rank, scored, and made known to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dynamo_lightning.allocation.dynamic_sampling import DynamicSampling, DynamicSamplingConfig, select_prompts
from dynamo_lightning.distributed import gather_objects, rank, run_seed, stop_together, world_size
from dynamo_lightning.engines.engine import Engine, SamplingConfig
from dynamo_lightning.errors import RunError
from dynamo_lightning.rewards.failures import failure_metrics
from dynamo_lightning.rewards.group_scoring import score_complete_groups
from dynamo_lightning.rewards.scorer import RewardScorer, check_failure_share
from dynamo_lightning.rollout.ahead import RolloutsAhead
from dynamo_lightning.rollout.exchange import spread_over_ranks
from dynamo_lightning.rollout.requests import make_requests, share_of_rank
from dynamo_lightning.types import Collected, Outcome, PromptBatch, Rollout, Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RolloutCollector:
    """Turns a batch of prompts with their group sizes into rollouts and outcomes.

    Args:
        generator: Engine that samples the responses.
        scorer: Computes their rewards.
        sampling: Options of sampling.
        passes: Cost of a rollout in the update, see `passes_per_rollout`, by which rollouts are distributed over ranks.
        dynamic_sampling: When to sample further prompts; `None` takes each batch as it is.
    """

    def __init__(
        self,
        generator: Engine,
        scorer: RewardScorer,
        sampling: SamplingConfig,
        passes: tuple[int, int],
        dynamic_sampling: DynamicSamplingConfig | None = None,
    ) -> None:
        self.generator = generator
        self.scorer = scorer
        self.sampling = sampling
        self.dynamic_sampling = dynamic_sampling
        self.passes = passes
        self.ahead = RolloutsAhead(generator, sampling)

    def collect(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        datamodule: Any,
        batch: PromptBatch,
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> Collected:
        """Sample, score and observe: once, or with dynamic sampling until enough groups have non-zero advantages.

        Args:
            policy: The current policy.
            tokenizer: Decodes the responses.
            datamodule: Splits the batch into parts, observes the outcomes and provides further prompts.
            batch: The global batch of an iteration.
            phase: Timer of a phase, a context manager by its name.
        """
        sampling = DynamicSampling(len(batch.prompts), self.dynamic_sampling) if self.dynamic_sampling else None
        rounds: list[list[PromptBatch]] = []
        rollouts: list[Rollout] = []
        outcomes: list[Outcome] = []
        todo: PromptBatch | None = batch
        while todo is not None:
            rounds.append([])
            first = len(outcomes)
            for part in datamodule.parts(todo):  # one, or a pilot and what its outcomes lead to
                with phase("generate"):
                    sampled, spare = self.ahead.take(part) or self.sample(
                        policy, tokenizer, part, "train", self.sampling.temperature
                    )
                with phase("reward"):
                    scored = self.score(part, sampled)
                datamodule.observe(part, self.without_dropped(scored))
                rounds[-1].append(part)
                rollouts += sampled
                outcomes += scored
            if sampling is None:
                break
            sampling.add(todo, self.without_dropped(outcomes[first:]))
            todo = datamodule.more(batch.iteration, sampling.num_missing)
        lengths = {prompt.prompt_id: len(prompt.token_ids) for parts in rounds for prompt in parts[0].prompts}
        metrics = failure_metrics(outcomes)
        num_tokens = sum(lengths[outcome.prompt_id] + outcome.response_length for outcome in outcomes)
        parts = rounds[0]
        if sampling is not None:
            metrics |= sampling.metrics()
            parts = [select_prompts(same_part, sampling.kept) for same_part in zip(*rounds, strict=True)]
            kept = set(sampling.kept)
            rollouts = [rollout for rollout in rollouts if rollout.prompt.prompt_id in kept]
            outcomes = [outcome for outcome in outcomes if outcome.prompt_id in kept]
        kept_outcomes = self.without_dropped(outcomes)
        own = spread_over_ranks(rollouts, kept_outcomes, parts[0].prompts, self.passes)
        return Collected(tuple(parts), tuple(own), kept_outcomes, spare, num_tokens, metrics)

    def sample(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        stage: str,
        temperature: float,
        wanted: Collection[tuple[int, int]] | None = None,
    ) -> tuple[list[Rollout], Rollout]:
        """This rank's share of the batch's rollouts, and one rollout that every rank has even if its share is empty.

        Each batch that the generator makes is scored from then on, while the next one is sampled; `score` waits for
        what is left. With `wanted`, only of the rollouts with these keys, at least one, the same on all ranks.
        """
        every = make_requests(batch, stage, run_seed())
        chosen = [r for r in every if wanted is None or (r.prompt.prompt_id, r.sample_index) in wanted]
        requests, num_filled_up = share_of_rank(chosen, rank(), world_size())
        policy.eval()
        num_own = len(requests) - num_filled_up
        rollouts: dict[int, Rollout] = {}
        self.scorer.tokenizer = tokenizer
        self.scorer.watch.expect(len(chosen))
        for positions in self.generator.batches(requests):
            sampled = self.generator.generate(
                policy,
                tokenizer,
                [requests[position] for position in positions],
                max_response_length=self.sampling.max_response_length,
                temperature=temperature,
                **self.sampling.stop_options(),
            )
            rollouts.update(zip(positions, sampled, strict=True))
            if not self.scorer.reward.needs_group:  # a group is scored when it is complete
                self.scorer.submit([rollouts[position] for position in positions if position < num_own])
        return [rollouts[position] for position in range(num_own)], rollouts[0]

    def score(self, batch: PromptBatch, rollouts: Sequence[Rollout]) -> tuple[Outcome, ...]:
        """Outcomes of all ranks' rollouts, by prompt and sample index, on every rank.

        Raises:
            RunError: If more rewards failed than `model.scoring.max_failure_share` allows.
        """
        own = [
            Outcome(rollout.prompt.prompt_id, rollout.sample_index, score, len(rollout.token_ids), rollout.truncated)
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
        if self.scorer.reward.needs_group:
            return score_complete_groups(self.scorer, rollouts)
        scores, message = [], ""
        try:
            scores = self.scorer.score(rollouts)
        except RunError as error:
            message = str(error)
        stop_together(message)
        return scores

    def without_dropped(self, outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
        """The outcomes that count: with `model.scoring.failure_score: drop`, those whose reward did not fail."""
        if self.scorer.config.failure_score != "drop":
            return tuple(outcomes)
        kept = tuple(outcome for outcome in outcomes if outcome.score.failure is None)
        if not kept:
            raise RunError(f"all {len(outcomes)} rollouts of the batch were dropped: no reward could be computed")
        return kept
