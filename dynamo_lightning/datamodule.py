"""Prompts, their order, and an allocator that reallocates the rollout budget of each batch."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from jsonargparse import lazy_instance
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from dynamo_lightning.allocation.allocate import Cost
from dynamo_lightning.allocation.allocator import Allocator
from dynamo_lightning.allocation.budget import RolloutBudget
from dynamo_lightning.allocation.estimators import BetaPosterior, VarianceEstimator
from dynamo_lightning.allocation.groups import make_groups
from dynamo_lightning.allocation.plans import batch_of_state, batch_state
from dynamo_lightning.allocation.rules import AllocationRule, RLOORule
from dynamo_lightning.allocation.statistics import PromptStatistics
from dynamo_lightning.data.mixture import Mixture
from dynamo_lightning.data.prompts import load_prompts
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.data.stream import EvaluationStream, PromptStream
from dynamo_lightning.distributed import run_seed
from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.loading import PolicyConfig, load_tokenizer
from dynamo_lightning.rewards.columns import check_answer, check_columns
from dynamo_lightning.rewards.reward import Reward
from dynamo_lightning.runs.hyperparameters import save_arguments
from dynamo_lightning.types import GroupPlan, Outcome, PilotBaseline, Prompt, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RolloutDataModule(L.LightningDataModule):
    """Yields the global batch of each RL iteration, its rollout budget allocated by expected gradient variance.

    Every rank gets the same batch: a `DistributedSampler` has no place here, the module spreads the rollouts instead.

    Args:
        train: Prompts to train on: a data set, or a list of them that are mixed by their `weight`.
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
        rule: Objective that the allocation minimizes.
        estimator: How success rates are estimated from past outcomes.
        cost: What the budget counts: `rollouts`, or expected `tokens`, which buys the most variance for each of them.
        pilot: Rollouts that every prompt gets first; the rest is allocated by what they show. 0 switches it off.
        pilot_baseline: What a pilot's and its commit's rollouts are compared with: those of the same part (`separate`),
            those of both parts as far as the gradient stays unbiased (`cross`), or all others of the prompt (`pooled`,
            which biases the gradient).
        accept_skip_bias: Allow `min_rollouts: 0` with a rule whose gradient is unbiased only if no prompt is skipped.
        success_threshold: Rewards at or above this value count as success in the statistics and in pass@k.
        eval_prompts_per_batch: Prompts of one evaluation step.
        eval_rollouts_per_prompt: Responses sampled for each prompt in `validate`, `test` and `predict`.
        drop_last: Leave out the short batch at the end of an epoch.
    """

    def __init__(
        self,
        train: PromptSource | list[PromptSource] | None = None,
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
        pilot_baseline: PilotBaseline = "separate",
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
        self.train_is_list = isinstance(train, list)
        self.sources = {
            "train": train if isinstance(train, list) else [train] if train is not None else [],
            "val": val or [],
            "test": test or [],
            "predict": predict or [],
        }
        self.template = template
        self.tokenizer_name = tokenizer_name
        self.tokenizer_config = PolicyConfig(revision=tokenizer_revision, trust_remote_code=trust_remote_code)
        self.max_prompt_length = max_prompt_length
        self.prompts_per_batch = prompts_per_batch
        self.min_rollouts = min_rollouts if min_rollouts is not None else max(2, rollouts_per_prompt // 4)
        self.max_rollouts = max_rollouts if max_rollouts is not None else 3 * rollouts_per_prompt
        self.pilot = pilot
        self.pilot_baseline = pilot_baseline
        if pilot and pilot_baseline == "pooled":
            rank_zero_warn(
                f"data.pilot_baseline=pooled with data.pilot={pilot}: the gradient is biased, by a few percent of its "
                "length in simulation, for the pilot's outcomes decide how many rollouts dilute them; "
                "data.pilot_baseline=cross has part of the gain without bias"
            )
        self.success_threshold = success_threshold
        self.eval_prompts_per_batch = eval_prompts_per_batch
        self.eval_rollouts_per_prompt = eval_rollouts_per_prompt
        self.drop_last = drop_last
        self.allocator = Allocator(
            RolloutBudget(
                rollouts_per_prompt,
                self.min_rollouts,
                self.max_rollouts,
                rule,
                cost,
                pilot,
                pilot_baseline,
                accept_skip_bias,
            ),
            estimator,
            success_threshold,
        )
        self._prompts: dict[str, list[list[Prompt]]] = {}
        self._stream: PromptStream | None = None
        self._restored_position: dict[str, Any] | None = None
        self._in_flight: dict[int, PromptBatch] = {}

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
                loaded.append(self._load(source, tokenizer, self._option(group, index)))
            self._prompts[group] = loaded

    def _load(self, source: PromptSource, tokenizer: PreTrainedTokenizerBase, option: str) -> list[Prompt]:
        """Load one data set and say what became of its rows."""
        if source.template is None and source.system_prompt is None and not source.chat_template_kwargs:
            source = replace(source, template=self.template)
        loaded = load_prompts(source, tokenizer, self.max_prompt_length, option=option)
        others = f", {loaded.num_other_part} problems of the other part left out" * bool(loaded.num_other_part)
        conflicts = f", {loaded.num_conflicting} rows with conflicting answers left out" * bool(loaded.num_conflicting)
        rank_zero_info(
            f"{option}: {len(loaded.prompts)} prompts of {loaded.num_rows} rows in {source.path} "
            f"({loaded.num_merged} repeated rows merged{conflicts}{others}, {loaded.num_too_long} prompts of more than "
            f"data.max_prompt_length={self.max_prompt_length} tokens left out)"
        )
        if loaded.left_out_columns:
            rank_zero_warn(
                f"{option}: the columns {', '.join(loaded.left_out_columns)} of {source.path} have the names of every "
                "reward's own arguments, so rewards do not get them: rename the columns to have them"
            )
        return list(loaded.prompts)

    @property
    def loaded_prompts(self) -> dict[str, list[list[Prompt]]]:
        """Prompts of each data set that is loaded, by `train`, `val`, `test` or `predict`."""
        return self._prompts

    def longest_training_prompt(self) -> int:
        """Tokens of the longest prompt to train on."""
        return max(len(prompt.token_ids) for prompts in self._prompts["train"] for prompt in prompts)

    def check_reward(self, reward: Reward) -> None:
        """Compare the reward with all data that are loaded, so that what cannot work is found before any training.

        Raises:
            UserError: If the reward needs a column that a data set lacks, or could never match a reference answer.
        """
        for group, data_sets in self._prompts.items():
            for index, prompts in enumerate(data_sets):
                check_columns(reward, prompts, self._option(group, index))
                for prompt in prompts:
                    self._name_place(prompt, partial(check_answer, reward, prompt))

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of all that are loaded, to train on or to evaluate with; 0 without any."""
        loaded = (prompts for group in self._prompts.values() for prompts in group)
        return max((len(prompt.token_ids) for prompts in loaded for prompt in prompts), default=0)

    def check_answers(self, check: Callable[[str], None]) -> None:
        """Call `check` on every reference answer that is loaded, so that a bad one is found before any training.

        Args:
            check: Raises `ValueError` for an answer that the reward could never match.

        Raises:
            UserError: Naming the file, the line and the prompt.
        """
        for data_sets in self._prompts.values():
            for prompts in data_sets:
                for prompt in prompts:
                    self._name_place(prompt, partial(check, prompt.answer))

    def _name_place(self, prompt: Prompt, check: Callable[[], None]) -> None:
        try:
            check()
        except ValueError as error:
            raise UserError(
                f"data set {prompt.source}, {prompt.place}, prompt {prompt.question[:80]!r}: {error}"
            ) from None

    def _option(self, group: str, index: int) -> str:
        """Where a data set stands in the config: a single one to train on is no list."""
        single = group == "train" and not self.train_is_list
        return f"data.{group}" if single else f"data.{group}[{index}]"

    def train_dataloader(self) -> PromptStream:
        """The stream of training batches, where it was left."""
        if self._stream is None:
            data_sets = self._prompts["train"]
            weights = [source.weight for source in self.sources["train"]]
            self._stream = PromptStream(
                [prompt for prompts in data_sets for prompt in prompts],
                self.prompts_per_batch,
                seed=run_seed(),
                make_batch=self._training_batch,
                drop_last=self.drop_last,
                overfit_batches=getattr(self.trainer, "overfit_batches", 0),
                mixture=Mixture([len(prompts) for prompts in data_sets], weights),
            )
            if self._restored_position is not None:
                self._stream.load_state_dict(self._restored_position)
        return self._stream

    @property
    def statistics(self) -> PromptStatistics:
        """The running statistics of every prompt."""
        return self.allocator.statistics

    @property
    def num_batches(self) -> int:
        """RL iterations of one epoch."""
        return len(self.train_dataloader())

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

    def _training_batch(self, iteration: int, prompts: Sequence[Prompt]) -> PromptBatch:
        """The batch that is due: as it was planned when its rollouts were begun, or planned now."""
        planned = self._in_flight.pop(iteration, None)
        if planned is not None and [plan.prompt for plan in planned.plans] == list(prompts):
            return planned
        return PromptBatch(iteration, self.allocator.plan(prompts, iteration))

    def upcoming(self, count: int) -> list[PromptBatch]:
        """The next batches of this epoch, at most `count`; each is planned once, and comes as it was planned."""
        assert self._stream is not None
        ahead = copy.copy(self._stream)  # with a place of its own
        ahead.make_batch = partial(self._planned_batch, now=self._stream.iteration - 1)
        return list(islice(ahead, min(count, len(ahead) - ahead.step)))

    def _planned_batch(self, iteration: int, prompts: Sequence[Prompt], now: int) -> PromptBatch:
        planned = self._in_flight.get(iteration)
        if planned is None or [plan.prompt for plan in planned.plans] != list(prompts):
            # What is sampled by the weights of iteration `now` has the success rates of then.
            self._in_flight[iteration] = PromptBatch(iteration, self.allocator.plan(prompts, now))
        return self._in_flight[iteration]

    def parts(self, batch: PromptBatch) -> Iterator[PromptBatch]:
        """The batch itself; with a pilot, then the commit groups that the pilot's outcomes lead to.

        Between the two, `observe` must have been called with the pilot's outcomes.
        """
        yield batch
        if commit := self.allocator.plan_commit(batch.plans, batch.iteration):
            yield PromptBatch(batch.iteration, commit)

    def more(self, iteration: int, count: int) -> PromptBatch | None:
        """Further prompts of this epoch for a running iteration, allocated like any batch; none if none is left.

        Args:
            iteration: The iteration.
            count: How many prompts, from 0.
        """
        assert self._stream is not None
        prompts = self._stream.take(count)
        return self._training_batch(iteration, prompts) if prompts else None

    def _evaluation_batch(self, iteration: int, prompts: Sequence[Prompt]) -> PromptBatch:
        return PromptBatch(iteration, tuple(GroupPlan(prompt, self.eval_rollouts_per_prompt) for prompt in prompts))

    def observe(self, batch: PromptBatch, outcomes: Sequence[Outcome], sampled_at: int | None = None) -> None:
        """Learn from the outcomes of a batch: the same ones, of all ranks, on every rank.

        Args:
            batch: The batch they belong to.
            outcomes: Its scored rollouts in any order; joined by prompt id.
            sampled_at: RL iteration whose weights sampled them; `None` is the batch's own.
        """
        groups = make_groups(batch.plans, (), outcomes)
        self.allocator.observe(groups, batch.iteration if sampled_at is None else sampled_at)

    def _fingerprint(self) -> dict[str, int]:
        """Number and order-dependent checksum of the training prompts; empty before they are loaded."""
        if "train" not in self._prompts:
            return {}
        ids = [prompt.prompt_id for prompts in self._prompts["train"] for prompt in prompts]
        return {"count": len(ids), "checksum": zlib.crc32(np.array(ids, dtype=np.int64).tobytes())}

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Statistics and stream position: tensors and primitives only."""
        position = self._stream.state_dict() if self._stream is not None else self._restored_position
        return {
            "statistics": self.allocator.state_dict(),
            "stream": position or {},
            "prompts": self._fingerprint(),
            "in_flight": [batch_state(batch) for batch in self._in_flight.values()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; Lightning does not restore a loader's position after an epoch's end.

        An evaluation needs neither, and may have another estimator than the run.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.allocator.load_state_dict(state_dict["statistics"])
        saved, own = state_dict.get("prompts"), self._fingerprint()
        if saved and own and saved != own:
            rank_zero_warn(
                f"data.train: the checkpoint was trained on {saved['count']} other prompts than these {own['count']}: "
                "what it knows of prompts that are in both is kept, and the pass goes on at the same position"
            )
        self._restored_position = state_dict["stream"] or None
        by_id = {prompt.prompt_id: prompt for prompts in self._prompts.get("train", []) for prompt in prompts}
        batches = (batch_of_state(state, by_id) for state in state_dict.get("in_flight", []))
        self._in_flight = {batch.iteration: batch for batch in batches if batch is not None}
        if self._stream is not None and self._restored_position is not None:
            self._stream.load_state_dict(self._restored_position)
