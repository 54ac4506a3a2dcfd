"""Prompts, the running variance estimates of their rewards, and each batch's share-out of the rollout budget."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from jsonargparse import lazy_instance
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from dynamo_lightning.allocation.allocate import Cost, allocate_rollouts
from dynamo_lightning.allocation.estimators import BetaPosterior, VarianceEstimator
from dynamo_lightning.allocation.pilot import allocate_commit, pilot_weights
from dynamo_lightning.allocation.records import Estimate
from dynamo_lightning.allocation.rules import AllocationRule, RLOORule
from dynamo_lightning.allocation.statistics import PromptStatistics
from dynamo_lightning.data.prompts import load_prompts
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.data.stream import EvaluationStream, PromptStream
from dynamo_lightning.distributed import run_seed
from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.loading import PolicyConfig, load_tokenizer
from dynamo_lightning.runs.hyperparameters import save_arguments
from dynamo_lightning.types import Outcome, Prompt, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RolloutDataModule(L.LightningDataModule):
    """Yields the global batch of each RL iteration, its rollout budget shared out by expected gradient variance.

    Every rank gets the same batch: a `DistributedSampler` has no place here, the module spreads the rollouts instead.

    Args:
        train: Prompts to train on.
        val: Prompts that `fit` and `validate` evaluate, any number of data sets.
        test: Prompts that `test` evaluates.
        predict: Prompts that `predict` answers.
        template: Template of every data set that has neither template nor system prompt nor chat template arguments of
            its own: a text with `{prompt}` in it, or a name such as `qwen2.5-math`; `null` is the tokenizer's own.
        tokenizer_name: Path or hub id of the tokenizer; the command line sets it to `model.model_name`.
        tokenizer_revision: Branch, tag or commit on the hub; the command line sets it to `model.policy.revision`.
        trust_remote_code: Run tokenizer code that comes with it; the command line sets it to the policy's option.
        max_prompt_length: Longer prompts are left out, tokens; their number is reported.
        prompts_per_batch: Prompts of one RL iteration.
        rollouts_per_prompt: Mean group size; the budget of a batch is this times its number of prompts, exactly.
        min_rollouts: Smallest group size; `null` is a quarter of the mean, at least 2.
        max_rollouts: Largest group size; `null` is three times the mean.
        rule: What the allocation minimises.
        estimator: How success rates are estimated from past outcomes.
        cost: What the budget counts: `rollouts`, or expected `tokens`, which buys the most variance for each of them.
        pilot: Rollouts that every prompt gets first; the rest is allocated by what they show. 0 switches it off.
        accept_skip_bias: Allow `min_rollouts: 0` with a rule whose gradient is unbiased only if no prompt is skipped.
        success_threshold: Rewards from here on count as success in the statistics and in pass@k.
        eval_prompts_per_batch: Prompts of one evaluation step.
        eval_rollouts_per_prompt: Responses sampled for each prompt in `validate`, `test` and `predict`.
        drop_last: Leave out the short batch at the end of an epoch.
    """

    def __init__(
        self,
        train: PromptSource | None = None,
        val: list[PromptSource] | None = None,
        test: list[PromptSource] | None = None,
        predict: list[PromptSource] | None = None,
        template: str | None = None,
        tokenizer_name: str = "embedded:arithmetic-qwen3",
        tokenizer_revision: str | None = None,
        trust_remote_code: bool = False,
        max_prompt_length: int = 1024,
        prompts_per_batch: int = 64,
        rollouts_per_prompt: int = 16,
        min_rollouts: int | None = None,
        max_rollouts: int | None = None,
        rule: AllocationRule = lazy_instance(RLOORule),
        estimator: VarianceEstimator = lazy_instance(BetaPosterior),
        cost: Cost = "rollouts",
        pilot: int = 0,
        accept_skip_bias: bool = False,
        success_threshold: float = 0.5,
        eval_prompts_per_batch: int = 64,
        eval_rollouts_per_prompt: int = 8,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        save_arguments(self, locals())
        for option, value in (
            ("max_prompt_length", max_prompt_length),
            ("prompts_per_batch", prompts_per_batch),
            ("rollouts_per_prompt", rollouts_per_prompt),
            ("eval_prompts_per_batch", eval_prompts_per_batch),
            ("eval_rollouts_per_prompt", eval_rollouts_per_prompt),
        ):
            if value < 1:
                raise UserError(f"data.{option} must be at least 1, got {value}")
        self.sources = {
            "train": [train] if train is not None else [],
            "val": val or [],
            "test": test or [],
            "predict": predict or [],
        }
        self.template = template
        self.tokenizer_name = tokenizer_name
        self.tokenizer_config = PolicyConfig(revision=tokenizer_revision, trust_remote_code=trust_remote_code)
        self.max_prompt_length = max_prompt_length
        self.prompts_per_batch = prompts_per_batch
        self.rollouts_per_prompt = rollouts_per_prompt
        self.min_rollouts = min_rollouts if min_rollouts is not None else max(2, rollouts_per_prompt // 4)
        self.max_rollouts = max_rollouts if max_rollouts is not None else 3 * rollouts_per_prompt
        self.rule = rule
        self.cost: Cost = cost
        self.pilot = pilot
        self.accept_skip_bias = accept_skip_bias
        self.success_threshold = success_threshold
        self.eval_prompts_per_batch = eval_prompts_per_batch
        self.eval_rollouts_per_prompt = eval_rollouts_per_prompt
        self.drop_last = drop_last
        self.statistics = PromptStatistics(estimator)
        self._prompts: dict[str, list[list[Prompt]]] = {}
        self._stream: PromptStream | None = None
        self._restored_position: dict[str, Any] | None = None
        # An impossible budget is the same mistake for every batch: say so before anything is loaded.
        anything = self.statistics.estimate([0], iteration=0)
        self.allocate(anything, [0])
        if pilot:
            pilot_weights(anything, [0], rollouts_per_prompt, pilot, self.min_rollouts, self.max_rollouts, rule, cost)

    # --- prompts ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the prompts that the stage needs; each data set once."""
        for group in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}[stage]:
            if group in self._prompts:
                continue
            if not self.sources[group] and not (stage == "fit" and group == "val"):
                instead = "; `validate` evaluates data.val" * (group == "test" and bool(self.sources["val"]))
                raise UserError(f"{stage} needs prompts: set data.{group}{instead}")
            labels = [source.label for source in self.sources[group]]
            if len(set(labels)) < len(labels):
                raise UserError(f"data.{group}: two data sets have one name, {labels}: tell them apart by `name`")
            if not self.sources[group]:
                self._prompts[group] = []
                continue
            tokenizer = load_tokenizer(self.tokenizer_name, self.tokenizer_config)
            loaded = []
            for index, source in enumerate(self.sources[group]):
                option = f"data.{group}" if group == "train" else f"data.{group}[{index}]"
                loaded.append(self._load(source, tokenizer, option))
            self._prompts[group] = loaded

    def _load(self, source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str) -> list[Prompt]:
        """Load one data set and say what became of its rows."""
        if source.template is None and source.system_prompt is None and not source.chat_template_kwargs:
            source = replace(source, template=self.template)
        loaded = load_prompts(source, tokenizer, self.max_prompt_length, option=option)
        conflicts = f", {loaded.num_conflicting} rows with conflicting answers left out" * bool(loaded.num_conflicting)
        rank_zero_info(
            f"{option}: {len(loaded.prompts)} prompts of {loaded.num_rows} rows in {source.path} "
            f"({loaded.num_merged} repeated rows merged{conflicts}, {loaded.num_too_long} prompts of more than "
            f"data.max_prompt_length={self.max_prompt_length} tokens left out)"
        )
        return list(loaded.prompts)

    def longest_training_prompt(self) -> int:
        """Tokens of the longest prompt to train on."""
        return max(len(prompt.token_ids) for prompts in self._prompts["train"] for prompt in prompts)

    def check_answers(self, check: Any) -> None:
        """Call `check` on every reference answer that is loaded, so that a bad one is found before any training.

        Args:
            check: Raises `ValueError` for an answer that the reward could never match.

        Raises:
            UserError: Naming the file, the row and the prompt.
        """
        for group, data_sets in self._prompts.items():
            for source, prompts in zip(self.sources[group], data_sets, strict=True):
                for prompt in prompts:
                    try:
                        check(prompt.answer)
                    except ValueError as error:
                        raise UserError(
                            f"data set {prompt.source}, row {prompt.row} of {source.path!r} (counting from 0), "
                            f"prompt {prompt.question[:80]!r}: {error}"
                        ) from None

    def train_dataloader(self) -> PromptStream:
        """The stream of training batches, where it was left."""
        if self._stream is None:
            prompts = self._prompts["train"][0]
            self._stream = PromptStream(
                prompts,
                self.prompts_per_batch,
                seed=run_seed(),
                make_batch=self._training_batch,
                drop_last=self.drop_last,
            )
            if self._restored_position is not None:
                self._stream.load_state_dict(self._restored_position)
        return self._stream

    def val_dataloader(self) -> list[Iterable[PromptBatch]]:
        """One loader for each validation data set."""
        return self._evaluation_loaders("val")

    def test_dataloader(self) -> list[Iterable[PromptBatch]]:
        """One loader for each test data set."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> list[Iterable[PromptBatch]]:
        """One loader for each data set to answer."""
        return self._evaluation_loaders("predict")

    def _evaluation_loaders(self, group: str) -> list[Iterable[PromptBatch]]:
        return [
            EvaluationStream(prompts, self.eval_prompts_per_batch, self._evaluation_batch)
            for prompts in self._prompts[group]
        ]

    def transfer_batch_to_device(self, batch: PromptBatch, device: Any, dataloader_idx: int) -> PromptBatch:
        """Batches are records without tensors: nothing to move."""
        return batch

    # --- allocation ---------------------------------------------------------------------------------------------------

    def allocate(self, estimate: Estimate, prompt_ids: Sequence[int]) -> np.ndarray:
        """Share the budget of a batch out over its prompts.

        Args:
            estimate: What is expected of each prompt, `[num_prompts]` each.
            prompt_ids: `[num_prompts]`, to break ties.

        Returns:
            Group sizes, `[num_prompts]`, int64, of mean `rollouts_per_prompt` exactly (with `cost: tokens`: worth it).
        """
        return allocate_rollouts(
            estimate,
            prompt_ids,
            budget=self.rollouts_per_prompt * len(prompt_ids),
            min_rollouts=self.min_rollouts,
            max_rollouts=self.max_rollouts,
            rule=self.rule,
            cost=self.cost,
            accept_skip_bias=self.accept_skip_bias,
        )

    def _training_batch(self, iteration: int, prompts: Sequence[Prompt]) -> PromptBatch:
        prompt_ids = [prompt.prompt_id for prompt in prompts]
        estimate = self.statistics.estimate(prompt_ids, iteration)
        return PromptBatch(
            iteration=iteration,
            prompts=tuple(prompts),
            group_sizes=tuple(self.allocate(estimate, prompt_ids).tolist()),
            success_rates=tuple(estimate.success_rate.tolist()),
            bernoulli_variances=tuple(estimate.bernoulli_variance.tolist()),
            unseen=tuple(estimate.unseen.tolist()),
        )

    def parts(self, batch: PromptBatch) -> Iterator[PromptBatch]:
        """The batch itself; or, with a pilot, the pilot part and then the part that its outcomes lead to.

        Between the two, `observe` must have been called with the pilot's outcomes. Their shares in the gradient are
        fixed beforehand, see `dynamo_lightning.allocation.pilot`.
        """
        if not self.pilot:
            yield batch
            return
        prompt_ids = [prompt.prompt_id for prompt in batch.prompts]
        budget = self.rollouts_per_prompt * len(prompt_ids)
        before = self.statistics.estimate(prompt_ids, batch.iteration)
        bounds = (self.min_rollouts, self.max_rollouts)
        weights = pilot_weights(before, prompt_ids, budget, self.pilot, *bounds, self.rule, self.cost)
        yield batch.with_groups((self.pilot,) * len(prompt_ids), weights.tolist())
        after = self.statistics.estimate(prompt_ids, batch.iteration)
        sizes = allocate_commit(after, prompt_ids, budget, self.pilot, weights, *bounds, self.rule, self.cost)
        yield batch.with_groups(sizes.tolist(), (1 - weights).tolist(), first_sample_index=self.pilot)

    def more(self, iteration: int, count: int) -> PromptBatch | None:
        """Further prompts of this epoch for a running iteration, allocated like any batch; none if none is left.

        Args:
            iteration: The iteration.
            count: How many prompts, from 0.
        """
        assert self._stream is not None
        prompts = self._stream.take(count)
        return self._training_batch(iteration, prompts) if prompts else None

    def peek(self) -> PromptBatch | None:
        """The next batch of this epoch as it will come if nothing is observed in between; none at the epoch's end."""
        assert self._stream is not None
        ahead = copy.copy(self._stream)  # with a place of its own
        return next(iter(ahead), None) if ahead.step < len(ahead) else None

    def _evaluation_batch(self, iteration: int, prompts: Sequence[Prompt]) -> PromptBatch:
        num_prompts = len(prompts)
        return PromptBatch(
            iteration=iteration,
            prompts=tuple(prompts),
            group_sizes=(self.eval_rollouts_per_prompt,) * num_prompts,
            success_rates=(0.5,) * num_prompts,
            bernoulli_variances=(0.25,) * num_prompts,
            unseen=(True,) * num_prompts,
        )

    def observe(self, batch: PromptBatch, outcomes: Sequence[Outcome]) -> None:
        """Learn from the outcomes of a batch: the same ones, of all ranks, on every rank.

        Args:
            batch: The batch they belong to.
            outcomes: Its scored rollouts in any order; joined by prompt id.
        """
        rows = {prompt.prompt_id: row for row, prompt in enumerate(batch.prompts)}
        successes, counts, tokens = np.zeros((3, len(rows)))
        for outcome in outcomes:
            row = rows[outcome.prompt_id]
            successes[row] += outcome.score.reward >= self.success_threshold
            counts[row] += 1
            tokens[row] += outcome.response_length
        self.statistics.observe(list(rows), successes, counts, batch.iteration, response_tokens=tokens)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Statistics and stream position: tensors and primitives only."""
        position = self._stream.state_dict() if self._stream is not None else self._restored_position
        return {"statistics": self.statistics.state_dict(), "stream": position or {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; Lightning does not restore a loader's position after an epoch's end.

        An evaluation needs neither, and may have another estimator than the run.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.statistics.load_state_dict(state_dict["statistics"])
        self._restored_position = state_dict["stream"] or None
        if self._stream is not None and self._restored_position is not None:
            self._stream.load_state_dict(self._restored_position)
