"""Shows what the allocation of rollouts buys: the gradient estimator's variance relative to equal groups.

With leave-one-out advantages prompt i adds about a_i/(n_i − 1) to the variance, a_i = p_i(1 − p_i) the variance of its
reward and n_i its group size. Three ratios follow from that; the fourth measures the variance on the rollouts' own
gradients instead. Ratios below 1 are a gain; uniform allocation gives 1.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from dynamo_lightning.allocation.allocate import best_variance_ratio, sample_bernoulli_variance, variance_ratio
from dynamo_lightning.distributed import derive_seed, gather_objects, run_seed
from dynamo_lightning.errors import UserError
from dynamo_lightning.measure.moments import group_variances
from dynamo_lightning.measure.scores import head_scores
from dynamo_lightning.measure.used_advantage import VarianceSplit, noise_hint, used_contribution, variance_split
from dynamo_lightning.runs.step_metrics import log_step_metrics
from dynamo_lightning.types import IterationRecord, Rollout


def variance_ratios(record: IterationRecord, success_threshold: float = 0.5) -> dict[str, float]:
    """The iteration's variance relative to equal groups, Σ a_i/(n_i − 1) over Σ a_i/(n̄ − 1), three ways.

    Groups with fewer than two rollouts have no leave-one-out advantage and are left out.

    Args:
        record: The iteration.
        success_threshold: A rollout with at least this reward is a success.

    Returns:
        By metric name, each only if defined (two or more groups' worth of rollouts and some variance):

        - `alloc/predicted_variance_ratio`: a_i as expected before the rollouts, n_i as allocated;
        - `alloc/best_variance_ratio`: 1/(1 + CV²(√a)) of the same a_i, what no allocation without bounds can beat;
        - `alloc/realised_variance_ratio`: a_i = k(n − k)/(n(n − 1)) from the group's own k successes in the n rollouts
          that came back, which is unbiased for p(1 − p) but noisy: average it over iterations.
    """
    ratios = {}
    plans = record.batch.plans
    variances, sizes = np.array([(plan.bernoulli_variance, plan.size) for plan in plans]).T
    kept = sizes >= 2
    if variances[kept].sum() > 0:
        ratios["alloc/predicted_variance_ratio"] = variance_ratio(variances[kept], sizes[kept])
        ratios["alloc/best_variance_ratio"] = best_variance_ratio(variances[kept])

    groups: dict[int, list[bool]] = defaultdict(list)
    for outcome in record.outcomes:
        groups[outcome.prompt_id].append(outcome.score.reward >= success_threshold)
    counts = np.array([len(group) for group in groups.values() if len(group) >= 2])
    successes = np.array([sum(group) for group in groups.values() if len(group) >= 2])
    if len(counts):
        realised = sample_bernoulli_variance(successes, counts)
        if realised.sum() > 0:
            ratios["alloc/realised_variance_ratio"] = variance_ratio(realised, counts)
    return {name: float(ratio) for name, ratio in ratios.items()}


def measured_variances(
    record: IterationRecord, scores: Mapping[tuple[int, int], np.ndarray], prompt_ids: list[int]
) -> tuple[float, float]:
    """The variance that these prompts add to the batch's gradient: with their groups, and with equal ones.

    Args:
        record: The iteration.
        scores: Score of each of the prompts' rollouts by `(prompt_id, sample_index)`, `[num_projections]` each.
        prompt_ids: Prompts to add up, with two outcomes or more each.

    Returns:
        `Σ Var ĝ_i(n_i)` and `Σ Var ĝ_i(n̄)`, n̄ the mean size of all of the batch's groups of at least two, up to the
        same factor; both unbiased but for groups of two or three, see `group_variances`.
    """
    groups: dict[int, list[Any]] = defaultdict(list)
    for outcome in record.outcomes:
        groups[outcome.prompt_id].append(outcome)
    mean_size = float(np.mean([len(group) for group in groups.values() if len(group) >= 2]))
    variances = [
        group_variances(
            [outcome.score.reward for outcome in groups[prompt_id]],
            [scores[outcome.key] for outcome in groups[prompt_id]],
            [len(groups[prompt_id]), mean_size],
        )
        for prompt_id in prompt_ids
    ]
    own, equal = np.sum(variances, axis=0)
    return float(own), float(equal)


def measured_split(
    record: IterationRecord, scores: Mapping[tuple[int, int], np.ndarray], prompt_ids: list[int]
) -> VarianceSplit:
    """The variance of the gradient that was used, and what the advantage and the sizes have to do with it.

    Called on every rank: the advantages of all ranks are gathered.

    Args:
        record: The iteration, with the rollouts as they were trained on.
        scores: Score of each of the prompts' rollouts by `(prompt_id, sample_index)`, `[num_projections]` each.
        prompt_ids: Measured prompts, with two outcomes or more each.
    """
    assert record.trained is not None
    own = zip((rollout.key for rollout in record.trained.rollouts), record.trained.advantages.tolist(), strict=True)
    advantages = dict(gather_objects(list(own)))
    outcomes: dict[int, list[Any]] = defaultdict(list)
    for outcome in record.outcomes:
        outcomes[outcome.prompt_id].append(outcome)
    counts = [len(group) for group in outcomes.values() if len(group) >= 2]
    mean_size = float(np.mean(counts)) if counts else 0.0
    unseen = {plan.prompt.prompt_id for plan in record.batch.plans if plan.unseen}
    groups = []
    for prompt_id in prompt_ids:
        group = outcomes[prompt_id]
        vectors = np.stack([scores[outcome.key] for outcome in group])
        sizes = [len(group), mean_size]
        placed, equal = group_variances([outcome.score.reward for outcome in group], vectors, sizes)
        used = used_contribution(np.array([advantages[outcome.key] for outcome in group]), vectors)
        groups.append((*used, placed, equal, prompt_id in unseen))
    return variance_split(groups, mean_size)


class VarianceReductionMonitor(Callback):
    """Logs `alloc/{predicted,best,realised,measured}_variance_ratio`; the first in the progress bar too.

    The first three are free, see `variance_ratios`. The measured one is off by default, for it runs the policy: every
    `measure_every` iterations, a random sample of the batch's prompts is taken; the gradient of each of their rollouts
    with respect to the vocabulary head is projected on random directions (one forward pass over these rollouts, no
    backward pass), and the exact variance of the leave-one-out gradient is estimated from them for the group's size
    and for the batch's mean size (`dynamo_lightning.measure`). Such estimates are noisy: the ratio is that of
    their sums over the last `num_pooled` measurements, logged in every iteration from the first one on. The cost is
    logged as `alloc/measure_seconds`, 0 in iterations without a measurement, so that its mean is the cost per
    iteration; it is bounded, for at most `num_measured_prompts` groups go through the policy.

    The same scores, times the advantages that the rollouts were really trained with, give the variance of the gradient
    that was used, see `dynamo_lightning.measure.used_advantage`, pooled in the same way:

    - `alloc/total_variance_ratio`, its variance relative to leave-one-out advantages and equal groups; the product of
      `alloc/baseline_variance_ratio` (what the advantage changes, at the same sizes) and of what the sizes change:
      `alloc/placing_variance_ratio` among prompts with earlier rollouts and `alloc/cold_start_variance_ratio` among
      unseen ones. Only for advantages that leave the gradient unbiased, for others scale it;
    - `noise/scale_rollouts`, the gradient noise scale tr Σ/‖∇J‖² (McCandlish et al., 2018, arXiv 1812.06162) in
      rollouts, prompts drawn anew: in a batch of so many, noise and gradient are equally long. It is logged once
      ‖∇J‖² is distinguishable from 0, and a line in words says how the batch compares (`noise/batch_share`, batch
      over scale) whenever the answer changes.

    What it leaves out: layers below the head; token-level modulation; groups of one rollout, which have no
    leave-one-out gradient; and that the policy has just moved by one iteration's update when the callback is called.

    An iteration in which a ratio is undefined (all groups all right or all wrong) does not log it. All ranks take part
    in a measurement, with equally many forward passes, and log the same.

    Args:
        success_threshold: A rollout with at least this reward is a success; `null` takes `data.success_threshold`.
        measure_every: RL iterations from one measurement to the next; 0 never measures.
        num_measured_prompts: Prompts in a measurement, at most.
        num_projections: Random directions; more make a measurement less noisy.
        num_pooled: Measurements that a logged ratio is made of, at most.

    Raises:
        UserError: If an option is out of range.
    """

    def __init__(
        self,
        success_threshold: float | None = None,
        measure_every: int = 0,
        num_measured_prompts: int = 16,
        num_projections: int = 64,
        num_pooled: int = 10,
    ) -> None:
        for option, value, least in (
            ("measure_every", measure_every, 0),
            ("num_measured_prompts", num_measured_prompts, 1),
            ("num_projections", num_projections, 1),
            ("num_pooled", num_pooled, 1),
        ):
            if value < least:
                raise UserError(f"VarianceReductionMonitor.{option} must be at least {least}, got {value}")
        self.success_threshold = success_threshold
        self.measure_every = measure_every
        self.num_measured_prompts = num_measured_prompts
        self.num_projections = num_projections
        self._measurements: deque[tuple[float, float]] = deque(maxlen=num_pooled)
        self._splits: deque[VarianceSplit] = deque(maxlen=num_pooled)
        self._said = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the data module's threshold; refuse what cannot be measured.

        Raises:
            UserError: If there is a pilot: its prompts have two groups each, which the formula does not know.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.success_threshold is None:
            self.success_threshold = getattr(data, "success_threshold", 0.5)
        pilot = getattr(data, "pilot", 0)
        if self.measure_every and pilot:
            raise UserError(
                f"VarianceReductionMonitor.measure_every={self.measure_every} measures one group for each prompt, but "
                f"data.pilot={pilot} makes two: set one of them to 0"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the iteration's ratios."""
        record: IterationRecord = outputs["record"]
        assert self.success_threshold is not None
        ratios = variance_ratios(record, self.success_threshold)
        if self.measure_every:
            start = time.perf_counter()
            if (record.batch.iteration + 1) % self.measure_every == 0:
                self.measure(trainer, pl_module, record)
                ratios["alloc/measure_seconds"] = time.perf_counter() - start
            else:
                ratios["alloc/measure_seconds"] = 0.0
            own, equal = np.sum([*self._measurements, (0.0, 0.0)], axis=0)
            if equal > 0:
                ratios["alloc/measured_variance_ratio"] = float(own / equal)
            ratios.update(self._split_ratios(record, pl_module))
        log_step_metrics(pl_module, ratios, shown=("alloc/predicted_variance_ratio",))

    def measure(self, trainer: Trainer, pl_module: LightningModule, record: IterationRecord) -> None:
        """Measure this iteration and add it to the pool; called on every rank."""
        seed = derive_seed(run_seed(), "measure", record.batch.iteration)
        prompt_ids = self._sample(record, seed)
        scores = self._scores(trainer, pl_module, record, set(prompt_ids), seed)
        if prompt_ids:
            self._measurements.append(measured_variances(record, scores, prompt_ids))
        if record.trained is not None:
            self._splits.append(measured_split(record, scores, prompt_ids))

    def _split_ratios(self, record: IterationRecord, pl_module: Any) -> dict[str, float]:
        """Ratios and noise scale of the pooled measurements; says how the batch compares if that has changed."""
        if not self._splits:
            return {}
        total = VarianceSplit.pooled(self._splits)
        is_unbiased = bool(getattr(getattr(getattr(pl_module, "loss", None), "advantage", None), "is_unbiased", False))
        ratios = total.ratios() if is_unbiased else {}
        if (scale := total.noise_scale()) is not None:
            num_rollouts = len(record.outcomes)
            ratios |= {"noise/scale_rollouts": scale, "noise/batch_share": num_rollouts / scale}
            kind, text = noise_hint(num_rollouts, scale)
            if kind != self._said:
                rank_zero_info(text)
            self._said = kind
        return ratios

    def _sample(self, record: IterationRecord, seed: int) -> list[int]:
        """Prompts to measure, the same on every rank: of those with two outcomes or more."""
        counts: dict[int, int] = defaultdict(int)
        for outcome in record.outcomes:
            counts[outcome.prompt_id] += 1
        ids = sorted(prompt_id for prompt_id, count in counts.items() if count >= 2)
        chosen = np.random.default_rng(seed).permutation(len(ids))[: self.num_measured_prompts]
        return [ids[i] for i in chosen]

    def _scores(
        self, trainer: Trainer, pl_module: Any, record: IterationRecord, prompt_ids: set[int], seed: int
    ) -> dict[tuple[int, int], np.ndarray]:
        """Projected score of every rollout of these prompts, on every rank: a prompt's rollouts are spread over all."""
        own = [rollout for rollout in record.rollouts if rollout.prompt.prompt_id in prompt_ids]
        prompt = record.batch.prompts[0]
        # The filler never counts.
        filler = Rollout(prompt, 0, np.array(prompt.token_ids[-1:]), np.zeros(1, dtype=np.float32), "")
        policy, was_training = pl_module.policy, pl_module.policy.training
        policy.eval()
        with trainer.precision_plugin.forward_context():
            projected = head_scores(
                policy,
                own,
                filler,
                pl_module.update_config,
                temperature=pl_module.sampling.temperature,
                num_projections=self.num_projections,
                seed=seed,
            )
        policy.train(was_training)
        pairs = zip([rollout.key for rollout in own], projected.double().cpu().numpy(), strict=True)
        return dict(gather_objects(list(pairs)))

    def state_dict(self) -> dict[str, Any]:
        """The pooled measurements."""
        splits = {"splits": [list(astuple(split)) for split in self._splits]} if self._splits else {}
        return {"measurements": [list(pair) for pair in self._measurements], **splits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the pooled measurements of a checkpoint."""
        self._measurements.clear()
        self._measurements.extend((own, equal) for own, equal in state_dict["measurements"])
        self._splits.clear()
        self._splits.extend(VarianceSplit(*numbers) for numbers in state_dict.get("splits", []))
