"""Checkpoints of the uniform run of `benchmarks/gradient_variance.py`, and the reference rollouts of their prompts."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dynamo_lightning.allocation import Estimate, PromptStatistics, VarianceEstimator
from dynamo_lightning.distributed import derive_seed
from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.measure.moments import KernelMoments, kernel_moments
from dynamo_lightning.measure.scores import head_scores, parameter_scores
from dynamo_lightning.policy.loading import load_tokenizer
from dynamo_lightning.rewards.scorer import RewardScorer, ScoringConfig
from dynamo_lightning.rollout.runner import sample_rollouts
from dynamo_lightning.types import Prompt, Rollout, RolloutRequest

sys.path.insert(0, str(Path(__file__).parent))  # also when loaded by its path

from variance_baselines import score_norms
from variance_tables import Scale
from variance_tasks import ROLLOUTS_PER_PROMPT, TASKS

T = TypeVar("T")
SUCCESS_THRESHOLD = 0.5
"""Least reward of a success, both configs'."""


@dataclass(frozen=True)
class Checkpoint:
    """The uniform run after an epoch."""

    seed: int
    epoch: int
    state: dict[str, torch.Tensor]
    prompts: tuple[Prompt, ...]
    prior: tuple[np.ndarray, ...]
    """Mean and weight of the prior of each prompt's baseline, `[num_prompts]` each."""
    iteration: int
    """The next one of the run."""
    rollouts: dict[str, np.ndarray]
    """`iteration`, `prompt_id`, `reward` and `score_norm` of all rollouts of the run so far, `[num_rollouts]` each."""

    @property
    def history(self) -> int:
        """Earlier rollouts of every prompt."""
        return self.epoch * ROLLOUTS_PER_PROMPT

    def estimate(self, estimator: VarianceEstimator, prompt_ids: np.ndarray | None = None) -> Estimate:
        """An estimator's expectations after all outcomes of the run: of the prompts, or of those with these ids."""
        statistics, iterations = PromptStatistics(estimator), self.rollouts["iteration"]
        for iteration in np.unique(iterations).tolist():
            rows = iterations == iteration
            ids, index = np.unique(self.rollouts["prompt_id"][rows], return_inverse=True)
            successes = np.bincount(index, self.rollouts["reward"][rows] >= SUCCESS_THRESHOLD)
            statistics.observe(ids, successes, np.bincount(index), iteration)
        if prompt_ids is None:
            prompt_ids = np.array([prompt.prompt_id for prompt in self.prompts])
        return statistics.estimate(prompt_ids, self.iteration)


@dataclass
class Reference:
    """The reference rollouts of one prompt; equal responses are kept once."""

    responses: list[Rollout]
    """`[num_distinct]`."""
    index: np.ndarray
    """Which response each rollout is, `[num_references]`."""
    rewards: np.ndarray
    """`[num_distinct]`."""
    scores: np.ndarray | None = None
    """Sketched gradients, `[num_distinct, num_dimensions]`; None if all rewards are equal and no baseline is known."""
    head_scores: np.ndarray | None = None
    norms: np.ndarray | None = None
    """Squared logit gradients of the responses, `[num_distinct]`."""
    prior: tuple[float, float] = (0.0, 0.0)
    """Mean and weight of the prior of the prompt's baseline."""

    @property
    def counts(self) -> np.ndarray:
        """How often each response came, `[num_distinct]`."""
        return np.bincount(self.index, minlength=len(self.responses))

    def moments(self, scores: np.ndarray | None) -> KernelMoments:
        """What the exact variance of the leave-one-out gradient follows from."""
        return KernelMoments(0, 0, 0) if scores is None else kernel_moments(self.rewards, scores, self.counts)


@cache
def scorer(task: str) -> RewardScorer:
    """One for each process: its worker remembers the answers that it has judged."""
    pool = RewardScorer(TASKS[task].reward(), ScoringConfig(num_workers=1))
    pool.start()
    Finalize(None, pool.close, exitpriority=10)  # `atexit` is for the main process; others would wait for its worker
    return pool


def sample_references(policy: Any, checkpoint: Checkpoint, scale: Scale) -> list[Reference]:
    """Sample, score and differentiate the reference rollouts of the checkpoint's prompts."""
    key, task = (checkpoint.seed, "reference", checkpoint.epoch), TASKS[scale.task]
    requests = [
        RolloutRequest(prompt, index, derive_seed(*key, prompt.prompt_id, index))
        for prompt in checkpoint.prompts
        for index in range(scale.num_references)
    ]
    engine, tokenizer = TransformersEngine(batch_size=256), load_tokenizer(task.model)
    rollouts = sample_rollouts(
        engine, policy, tokenizer, requests, max_response_length=task.max_response_length, temperature=1.0
    )
    references = []
    for start in range(0, len(rollouts), scale.num_references):
        own = rollouts[start : start + scale.num_references]
        distinct = {tuple(rollout.token_ids.tolist()): rollout for rollout in own}
        row = {tokens: number for number, tokens in enumerate(distinct)}
        index = np.array([row[tuple(rollout.token_ids.tolist())] for rollout in own])
        references.append(Reference(list(distinct.values()), index, np.zeros(len(distinct))))
    scored = iter(scorer(scale.task).score([response for reference in references for response in reference.responses]))
    for reference in references:
        reference.rewards = np.array([next(scored).reward for _ in reference.responses])
    for reference, mean, weight in zip(references, *checkpoint.prior, strict=True):
        seed = derive_seed(*key)
        responses = reference.responses
        sketch = parameter_scores(policy, responses, num_dimensions=scale.num_dimensions, temperature=1.0, seed=seed)
        reference.scores = (sketch - torch.from_numpy(reference.counts).float() @ sketch / scale.num_references).numpy()
        reference.norms = score_norms(policy, responses, task.updates)
        reference.prior = float(mean), float(weight)
        if np.ptp(reference.rewards):
            options: dict[str, Any] = {"num_projections": 256, "temperature": 1.0, "seed": seed}
            head = head_scores(policy, responses, responses[0], task.updates, **options)
            reference.head_scores = head.numpy()
    return references


def kept(folder: Path | None, name: str, make: Callable[[], T]) -> T:
    """What `make` returns; with a folder, what an earlier call under this name left there.

    The files are pickles: read only what this benchmark wrote.
    """
    if folder is None:
        return make()
    path = folder / f"{name}.pickle"
    if path.exists():
        return pickle.loads(path.read_bytes())  # type: ignore[no-any-return]
    found = make()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(found))
    return found
