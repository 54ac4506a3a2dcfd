"""The policy and its training step, which reads as the algorithm.

One Lightning batch is one RL iteration: the global `PromptBatch` comes in with its group sizes; rollouts, rewards,
advantages and updates all happen in `training_step` (manual optimization). Every rank gets the same batch, samples its
share of the rollouts and trains on it; the outcomes are gathered, so that statistics, advantages and denominators are
global.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from jsonargparse import lazy_instance
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Size

from dynamo_lightning import strategies
from dynamo_lightning.allocation.dynamic_sampling import DynamicSamplingConfig
from dynamo_lightning.checkpoints import check_shapes, shapes_of
from dynamo_lightning.engines.engine import Engine, SamplingConfig
from dynamo_lightning.engines.offload import OptimizerOffload
from dynamo_lightning.engines.renamed import warn_once
from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.environments import Environment, SingleTurn
from dynamo_lightning.errors import UserError
from dynamo_lightning.evaluation.benchmarks import EvaluationConfig
from dynamo_lightning.evaluation.loops import EvaluationLoops
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.policy.agreement import choose_layout
from dynamo_lightning.policy.dropout import set_training_mode
from dynamo_lightning.policy.forward import set_token_layout
from dynamo_lightning.policy.lengths import check_lengths
from dynamo_lightning.policy.loading import PolicyConfig, load_architecture, load_policy, load_tokenizer
from dynamo_lightning.policy.lora import without_adapters
from dynamo_lightning.policy.prompt_states import prompt_states
from dynamo_lightning.policy.sharding import shard_policy
from dynamo_lightning.rewards.combined import RewardLike, as_reward
from dynamo_lightning.rewards.math import MathReward
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.rollout.collect import RolloutCollector
from dynamo_lightning.rollout.source import Actor, RolloutSource
from dynamo_lightning.runs.hyperparameters import eager, save_arguments, warn_of_left_out
from dynamo_lightning.runs.progress import keep_counters, mend_epochs
from dynamo_lightning.runs.schedule import apply_options
from dynamo_lightning.runs.step_metrics import log_step_metrics
from dynamo_lightning.runs.trainer_checks import (
    check_data_module,
    check_micro_batch,
    check_number_of_responses,
    check_staleness,
    check_strategy,
    check_thresholds,
    check_trainer,
    check_validation_interval,
)
from dynamo_lightning.types import Collected, FloatArray, Prompt, PromptBatch
from dynamo_lightning.update.config import UpdateConfig
from dynamo_lightning.update.join import join
from dynamo_lightning.update.plan import passes_per_rollout
from dynamo_lightning.update.record import iteration_record
from dynamo_lightning.update.sampling_check import sampling_tolerance, takes_engine_statistics
from dynamo_lightning.update.settings import UpdateSettings
from dynamo_lightning.update.steps import TrainedPolicy
from dynamo_lightning.update.updater import PolicyUpdater

if TYPE_CHECKING:
    from transformers import PreTrainedModel

strategies.register()


class CloseOnException(L.Callback):
    """Closes what `teardown` closes, which Lightning leaves out when a run ends by an exception, Ctrl-C or SIGTERM."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """No reward process, engine or handed-over weights are left behind."""
        try:
            pl_module.teardown(stage="")
        except Exception as error:  # what stopped the run is the one to be seen
            rank_zero_warn(f"not everything could be closed: {error}")


class PolicyModule(EvaluationLoops):
    """A causal language model trained by reinforcement learning with verifiable rewards.

    Args:
        model_name: Path or hub id of a Hugging Face causal language model; `embedded:arithmetic-qwen3` is shipped.
        policy: How the model is loaded.
        generator: What samples the responses.
        sampling: How responses are sampled.
        reward: What verifies the responses: a reward; from Python also a function of a module, `(prompt, response,
            answer, **columns) -> float`, or a list of rewards and functions, which are added.
        scoring: The processes in which rewards are computed.
        loss: The policy loss.
        updates: Options of training on a batch of rollouts.
        dynamic_sampling: Go on with further prompts of the epoch until enough groups have a signal (DAPO); `null`
            takes each batch as it is.
        environment: What answers the policy's responses; by default nothing, each rollout is one response.
        max_staleness: RL iterations that the weights which sample a batch may be older than those that are trained on
            it. From 1 on a generator whose engine runs elsewhere, such as `VLLMServerEngine`, samples while the policy
            is trained; others sample the same data without gaining time.
        one_step_off: Old name of `max_staleness: 1`.
        optimizer: The optimizer; on the command line it is `--optimizer`.
        lr_scheduler: The learning rate schedule, stepped with the optimizer; on the command line `--lr_scheduler`.
        gradient_clip_val: Total gradient norm above which gradients are scaled down; `null` never does.
        pass_at_k: The k of every pass@k that evaluations report, each at most `data.eval_rollouts_per_prompt`.
        eval_temperature: Divides the logits in evaluations; 0 is greedy, which needs one response per prompt only.
        evaluation: What `test` reports and keeps.
    """

    def __init__(
        self,
        model_name: str = "embedded:arithmetic-qwen3",
        policy: PolicyConfig = PolicyConfig(),
        generator: Engine = lazy_instance(TransformersEngine),
        sampling: SamplingConfig = SamplingConfig(),
        reward: RewardLike = lazy_instance(MathReward),
        scoring: ScoringConfig = ScoringConfig(),
        loss: PolicyLoss = PolicyLoss(),
        updates: UpdateConfig = UpdateConfig(),
        dynamic_sampling: DynamicSamplingConfig | None = None,
        environment: Environment = lazy_instance(SingleTurn),
        max_staleness: int = 0,
        one_step_off: bool | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip_val: float | None = 1.0,
        pass_at_k: list[int] | None = None,
        eval_temperature: float = 1.0,
        evaluation: EvaluationConfig = EvaluationConfig(),
    ) -> None:
        super().__init__()
        save_arguments(self, locals())
        reward, environment = eager(reward), eager(environment)  # they go to other processes, or are copied
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise UserError(f"model.gradient_clip_val must be positive or null, got {gradient_clip_val}")
        if eval_temperature < 0:
            raise UserError(f"model.eval_temperature must not be negative, got {eval_temperature}")
        if loss.kl_coefficient > 0 and policy.lora is not None and policy.lora.bias != "none":
            raise UserError(
                f"model.policy.lora.bias={policy.lora.bias} does not go with model.loss.kl_coefficient="
                f"{loss.kl_coefficient}: without its adapters the policy would be its own reference, but for trained "
                "biases: set bias to none"
            )
        if one_step_off is not None:
            warn_once("model.one_step_off", f"model.max_staleness={int(one_step_off)}")
            max_staleness = max(max_staleness, int(one_step_off))
        if max_staleness < 0:
            raise UserError(f"model.max_staleness must not be negative, got {max_staleness}")
        if max_staleness and dynamic_sampling is not None:
            raise UserError(
                f"model.max_staleness={max_staleness} does not go with model.dynamic_sampling: set it to 0, or "
                "dynamic_sampling to null"
            )
        self.automatic_optimization = False
        self.model_name = model_name
        self.policy_config = policy
        self.sampling = sampling
        self.reward = as_reward(reward)
        scorer = RewardScorer(self.reward, scoring, sampling.max_response_length)
        # Rollouts of older weights are corrected like those of another engine: by one importance weight for both.
        is_external = generator.uses_external_engine or max_staleness > 0
        passes = passes_per_rollout(loss, updates, is_external)
        self.collector = RolloutCollector(generator, environment, scorer, sampling, passes, dynamic_sampling)
        self.source = RolloutSource(self.collector, max_staleness)
        self.optimizer_offload = OptimizerOffload()
        self.loss = loss
        self.update_config = updates
        settings = UpdateSettings(loss, sampling.max_response_length, updates, sampling.temperature)
        settings = replace(settings, uses_external_engine=is_external, gradient_clip_val=gradient_clip_val)
        self.updater = PolicyUpdater(settings)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.gradient_clip_val = gradient_clip_val
        self.pass_at_k = pass_at_k if pass_at_k is not None else [1]
        self.eval_temperature = eval_temperature
        self.evaluation = evaluation
        self.policy: PreTrainedModel | None = None
        self.seconds: dict[str, float] = {}
        self.planning_seconds = 0.0

    # --- set-up -------------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """Called before Lightning's own checks, so that an error can name our options."""
        check_trainer(self.trainer, self)
        return [CloseOnException()]

    def configure_model(self) -> None:
        """Load the policy, once, and spread it over the processes; with a KL term also the frozen reference."""
        if self.policy is not None:
            return
        policy = load_policy(self.model_name, self.policy_config)
        self.tokenizer = load_tokenizer(self.model_name, self.policy_config)
        needs_copy = self.loss.kl_coefficient > 0 and self.policy_config.lora is None
        reference = [copy.deepcopy(policy).requires_grad_(False).eval()] if needs_copy else []
        if self._trainer is not None:  # `export` has none
            strategy, precision = self.trainer.strategy, str(self.trainer.precision)
            policy, *reference = (shard_policy(part, strategy, precision) for part in (policy, *reference))
        self.policy = policy
        # In a list, the reference is no submodule: it is neither trained, nor saved, nor moved by Lightning.
        self._reference = reference

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all trainable parameters, and its schedule."""
        assert self.policy is not None
        optimizer = self.optimizer(parameter for parameter in self.policy.parameters() if parameter.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError("lr_scheduler ReduceLROnPlateau needs a metric at every step: choose another schedule")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def setup(self, stage: str) -> None:
        """Check every reference answer against the reward before anything is sampled."""
        check_data_module(self.trainer)
        data = self.datamodule
        check_staleness(self.source.max_staleness, data.pilot, data.statistics.estimator.features)
        self.loss.check_pilot(data.pilot)
        data.allocator.read_hidden_states = self.read_hidden_states
        check_strategy(self.trainer, self.collector.generator)
        check_lengths(
            load_architecture(self.model_name, self.policy_config),
            self.datamodule.longest_prompt(),
            self.sampling.max_response_length,
        )
        if stage == "fit":
            self.check_fit_options()
        self.collector.scorer.start()
        self.datamodule.check_reward(self.reward)
        if stage in ("validate", "test", "fit"):
            ks = {"model.pass_at_k": self.pass_at_k, "model.evaluation.maj_at_k": self.evaluation.maj_at_k}
            check_number_of_responses(ks, self.datamodule.eval_rollouts_per_prompt)

    def check_fit_options(self) -> None:
        """Find out before anything is sampled what would stop the run later, or what two parts disagree about.

        Raises:
            UserError: Names the options.
        """
        check_validation_interval(self.trainer, self.datamodule.num_batches)
        longest, most = self.datamodule.longest_training_prompt(), self.update_config.max_tokens_per_micro_batch
        check_micro_batch(longest, self.sampling.max_response_length, most)
        threshold = getattr(self.loss.advantage, "success_threshold", self.datamodule.success_threshold)
        check_thresholds(threshold, self.datamodule.success_threshold)

    def on_fit_start(self) -> None:
        """Put the reference policy where the policy is."""
        for reference in self._reference:
            torch.nn.Module.to(reference, self.device)

    def on_train_start(self) -> None:
        """Find the layout of sequences in which the update's log-probabilities are the policy's own."""
        assert self.policy is not None
        set_training_mode(self.policy)
        with self.trainer.precision_plugin.forward_context():
            layout = choose_layout(self.policy)
            generator, settings = self.collector.generator, self.updater.settings
            self.collector.with_statistics = takes_engine_statistics(generator, self.policy, settings)
        for reference in self._reference:
            set_token_layout(reference, layout)

    def teardown(self, stage: str) -> None:
        """End the reward processes and what samples the responses."""
        self.collector.scorer.close()
        self.collector.generator.close()

    def read_hidden_states(self, prompts: Sequence[Prompt]) -> FloatArray:
        """The policy's hidden states at the end of prompts, for plans, which are made between two iterations."""
        assert self.policy is not None
        start = time.perf_counter()
        set_training_mode(self.policy)
        with self.trainer.precision_plugin.forward_context():
            states = prompt_states(self.policy, prompts, self.update_config.max_tokens_per_micro_batch)
        self.planning_seconds += time.perf_counter() - start
        return states

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Keep Lightning's counters right after a resume."""
        keep_counters(self.trainer, batch.iteration)

    # --- the RL iteration ---------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """One RL iteration: prompts with their group sizes → rollouts → rewards → advantages → update."""
        assert self.policy is not None
        self.seconds = {"hidden_states": self.planning_seconds} if self.planning_seconds else {}
        self.planning_seconds = 0.0
        collected = self.source.next(batch, self.actor(), self.datamodule, self.phase)
        tolerance = self.sampling_tolerance(collected)
        rollouts = join(collected, self.loss.advantage)
        with self.phase("logprobs"):
            experience = self.updater.prepare(self.policy, rollouts, self.reference(), tolerance)
        with self.phase("update"):
            result = self.updater.step(self.trained_policy(), experience)
        limits = self.datamodule.min_rollouts, self.datamodule.max_rollouts
        record = iteration_record(collected, experience, result, size_limits=limits, seconds=self.seconds)
        self.loss.after_iteration(record)
        self.log_metrics(record.metrics)
        return {"loss": torch.tensor(result.metrics.get("loss", 0.0)), "record": record}

    def actor(self) -> Actor:
        """The policy as it samples."""
        assert self.policy is not None
        return Actor(self.policy, self.tokenizer, self.global_step, self.sync_generator, self.rest_generator)

    def sampling_tolerance(self, collected: Collected) -> float | None:
        """Largest mean difference of log-probabilities that an update begins with; `None` after older weights."""
        assert self.policy is not None
        age = self.global_step - collected.filler.turns[0].version
        return sampling_tolerance(self.sampling.logp_tolerance, self.collector.generator, self.policy, age)

    def trained_policy(self) -> TrainedPolicy:
        """The policy with Lightning's optimizer, schedule, backward pass and wrapper."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert self.policy is not None and not isinstance(optimizer, list) and not isinstance(scheduler, list)
        wrapped = self.trainer.strategy.model
        return TrainedPolicy(self.policy, optimizer, scheduler, self.manual_backward, wrapped, self.gradient_scaler)

    @property
    def gradient_scaler(self) -> Any:
        """The gradient scaler of `16-mixed`; `None` in other precisions."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, which Lightning's precision plugin has unscaled by now."""
        assert self.policy is not None
        self.updater.clipping.clip(self.policy, self.global_step, self.gradient_scaler)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an iteration."""
        log_step_metrics(self, metrics, shown=("reward", "entropy", "grad_norm"))

    def reference(self) -> AbstractContextManager[PreTrainedModel] | None:
        """Gives the frozen policy of a KL term: a copy, or the policy without its adapters; `None` without a term."""
        assert self.policy is not None
        if self.loss.kl_coefficient == 0:
            return None
        return without_adapters(self.policy) if self.policy_config.lora else nullcontext(self._reference[0])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the iteration, for the log and for Lightning's profiler."""
        start = time.perf_counter()
        with self.trainer.profiler.profile(name):  # type: ignore[attr-defined]
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def sync_generator(self) -> None:
        """Have the generator sample from the weights as they are now."""
        assert self.policy is not None
        self.source.in_flight.wait()
        with self.phase("sync"), self.trainer.precision_plugin.forward_context():
            if self.collector.generator.offload_optimizer:
                self.optimizer_offload.offload(self.trainer.optimizers)
            self.collector.generator.sync(self.policy, self.global_step)
        self.collector.generator.synced_version = self.global_step

    def rest_generator(self) -> None:
        """Nothing is sampled until the next `sync_generator`."""
        self.collector.generator.rest()
        self.optimizer_offload.restore()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the loss remembers, and rollouts sampled ahead: no weights to sample them again are saved."""
        if self.source.max_staleness:
            checkpoint["rollouts_in_flight"] = self.source.in_flight.state_dict()
        if remembered := self.loss.state_dict():
            checkpoint["loss"] = remembered

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another policy in one line; for training, take over what is not in the weights."""
        if "state_dict" in checkpoint:  # a sharding strategy has checked and loaded its own already
            self.check_weights(shapes_of(checkpoint["state_dict"]))
        if self._trainer is None:
            warn_of_left_out(checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}), type(self).__name__)
        elif self.trainer.state.fn == TrainerFn.FITTING:
            self.source.in_flight.load_checkpoint(checkpoint)
            self.loss.load_state_dict(checkpoint.get("loss", {}))
            mend_epochs(checkpoint)
            apply_options(checkpoint, self.optimizer, self.lr_scheduler, self.trainer.optimizers)

    def check_weights(self, saved: Mapping[str, Size]) -> None:
        """Raise a `UserError` that names the first weight, by its shape, that the policy does not have like this."""
        check_shapes(saved, shapes_of(self.state_dict()), self.model_name)
