"""The tasks of `benchmarks/gradient_variance.py`: policies that come with the library, as their configs train them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.allocation import UniformRule, VarianceEstimator
from dynamo_lightning.data.chain import ChainReward
from dynamo_lightning.data.source import PromptSource
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.losses.advantages import RLOO
from dynamo_lightning.losses.baseline_history import BaselineHistory
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.rewards.math import MathReward
from dynamo_lightning.rewards.reward import Reward
from dynamo_lightning.rewards.scorer import ScoringConfig
from dynamo_lightning.types import GroupedRewards
from dynamo_lightning.update.config import UpdateConfig

PROMPTS_PER_BATCH, ROLLOUTS_PER_PROMPT = 32, 8  # both configs'
HALF_LIFE = 100.0  # RL iterations, of the history of baselines: as BetaPosterior's in both configs


@dataclass(frozen=True)
class Task:
    """A policy with its prompts, reward and limits."""

    model: str
    data: str
    reward: Callable[[], Reward]
    max_response_length: int
    max_prompt_length: int
    updates: UpdateConfig


TASKS = {
    "arithmetic": Task(
        "embedded:arithmetic-qwen3",
        "embedded:arithmetic/train.jsonl",
        MathReward,
        20,
        64,
        UpdateConfig(max_tokens_per_micro_batch=1024),
    ),
    "chain": Task(
        "embedded:chain-qwen3",
        "embedded:chain/train.jsonl",
        ChainReward,
        52,
        42,
        UpdateConfig(max_tokens_per_micro_batch=2048),
    ),
}
"""By name: those of `quickstart.yaml` and `chain.yaml`."""


class RolloutLog:
    """Iteration, prompt, reward and squared score norm of every rollout of a run."""

    def __init__(self) -> None:
        self.batches: list[dict[str, np.ndarray]] = []

    def add(self, scored: GroupedRewards, score_norms: Tensor) -> None:
        """Remember a batch."""
        self.batches.append(
            {
                "iteration": np.full(len(score_norms), scored.iteration),
                "prompt_id": scored.prompt_ids.numpy().copy(),
                "reward": scored.rewards.double().numpy().copy(),
                "score_norm": score_norms.double().numpy().copy(),
            }
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """By name, `[num_rollouts]` each."""
        return {name: np.concatenate([batch[name] for batch in self.batches]) for name in self.batches[0]}


class WatchedRLOO(RLOO):
    """Leave-one-out advantages of the uniform run, while a history of baselines watches its rollouts."""

    needs_score_norms = True

    def __init__(self) -> None:
        self.history = BaselineHistory(HALF_LIFE, population_rollouts=4.0)
        self.log = RolloutLog()

    @override
    def of(self, scored: GroupedRewards, score_norms: Tensor | None = None) -> Tensor:
        assert score_norms is not None
        self.history.observe(scored.rewards.double(), score_norms, scored.prompt_ids, scored.iteration)
        self.log.add(scored, score_norms)
        return super().of(scored)


def make_data(task: Task, estimator: VarianceEstimator, max_prompts: int | None = None) -> RolloutDataModule:
    """The task's data module with equal groups."""
    return RolloutDataModule(
        train=PromptSource(task.data, "train", template="{prompt}", max_prompts=max_prompts),
        tokenizer_name=task.model,
        prompts_per_batch=PROMPTS_PER_BATCH,
        rollouts_per_prompt=ROLLOUTS_PER_PROMPT,
        max_prompt_length=task.max_prompt_length,
        rule=UniformRule(),
        estimator=estimator,
    )


def make_module(task: Task, advantage: RLOO, learning_rate: float) -> PolicyModule:
    """The task's policy with DynaMO's modulation, as its config trains it."""
    return PolicyModule(
        task.model,
        generator=TransformersEngine(batch_size=256),
        sampling=SamplingConfig(max_response_length=task.max_response_length),
        reward=task.reward(),
        scoring=ScoringConfig(num_workers=1),
        loss=PolicyLoss(advantage=advantage),
        updates=task.updates,
        optimizer=partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10),
    )


def make_trainer(num_epochs: int, callbacks: list[Any]) -> L.Trainer:
    """A trainer that leaves nothing behind."""
    return L.Trainer(
        accelerator="cpu",
        max_epochs=num_epochs,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
