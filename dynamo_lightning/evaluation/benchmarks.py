"""The work of `test` on its batches: sampling of missing responses, an archive of all, and the summary."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dynamo_lightning.distributed import gather_objects
from dynamo_lightning.evaluation.archive import Record, ResponseArchive
from dynamo_lightning.evaluation.summary import BenchmarkResult, Sample, summarise
from dynamo_lightning.rewards.math import final_answer
from dynamo_lightning.types import Outcome, PromptBatch, Rollout


@dataclass(frozen=True)
class EvaluationConfig:
    """Options of the report and the archive of `test`."""

    maj_at_k: list[int] = field(default_factory=list)
    """The k of every majority vote, each at most `data.eval_rollouts_per_prompt`."""
    folder: str | None = None
    """Folder that keeps the responses of all evaluations, each in a folder of its own that is found again: a `test`
    that was interrupted goes on where it stopped. `null` keeps no responses."""


class BenchmarkRun:
    """One evaluation of one policy.

    Args:
        pass_ks: The k of every pass@k.
        config: What to report and keep.
        success_threshold: Rewards from here on are right.
        label: Begins the name of the evaluation's folder.
        settings: What the responses depend on besides the problem.
    """

    def __init__(
        self,
        pass_ks: Sequence[int],
        config: EvaluationConfig,
        success_threshold: float,
        label: str,
        settings: Mapping[str, Any],
    ) -> None:
        self.pass_ks = pass_ks
        self.config = config
        self.success_threshold = success_threshold
        self.settings = dict(settings)
        self.archive = ResponseArchive(config.folder, label, settings) if config.folder is not None else None
        self._samples: dict[tuple[str, int, int], Sample] = {}

    @property
    def folder(self) -> Path | None:
        """Where the responses are, if they are kept."""
        return self.archive.folder if self.archive is not None else None

    def missing(self, batch: PromptBatch) -> set[tuple[int, int]]:
        """Keys of the responses of a batch that are still to be sampled; those that are kept already are taken in."""
        missing = set()
        for prompt, group_size in zip(batch.prompts, batch.group_sizes, strict=True):
            for index in range(group_size):
                record = self.archive.find(prompt, index) if self.archive is not None else None
                if record is None:
                    missing.add((prompt.prompt_id, index))
                else:
                    self._add(self._read(record))
        return missing

    def add(self, batch: PromptBatch, rollouts: Sequence[Rollout], outcomes: Sequence[Outcome]) -> None:
        """Take in what was sampled.

        Args:
            batch: Its batch.
            rollouts: Sampled on this rank.
            outcomes: Of all ranks.
        """
        scores = {outcome.key: outcome.score for outcome in outcomes}
        if self.archive is not None:
            self.archive.append((rollout, scores[rollout.key]) for rollout in rollouts)
        votes = dict(gather_objects([(rollout.key, final_answer(rollout.text)) for rollout in rollouts]))
        sources = {prompt.prompt_id: prompt.source for prompt in batch.prompts}
        for outcome in outcomes:
            # A failed reward counts as wrong, also where training would drop the rollout (its reward is NaN then).
            self._add(
                Sample(
                    source=sources[outcome.prompt_id],
                    prompt_id=outcome.prompt_id,
                    sample_index=outcome.sample_index,
                    correct=outcome.score.reward >= self.success_threshold,
                    vote=votes[outcome.key],
                    response_length=outcome.response_length,
                    truncated=outcome.truncated,
                )
            )

    def results(self) -> dict[str, BenchmarkResult]:
        """The numbers of every benchmark."""
        return summarise(self._samples.values(), self.pass_ks, self.config.maj_at_k)

    def _add(self, sample: Sample) -> None:
        self._samples[(sample.source, *sample.key)] = sample

    def _read(self, record: Record) -> Sample:
        return Sample(
            source=record["source"],
            prompt_id=record["prompt_id"],
            sample_index=record["sample_index"],
            correct=record["reward"] is not None and record["reward"] >= self.success_threshold,
            vote=record["final_answer"],
            response_length=record["response_length"],
            truncated=record["truncated"],
        )


def weights_digest(policy: torch.nn.Module) -> str:
    """A digest of the first numbers of every parameter, the same however the policy is sharded or placed.

    An update moves every parameter, so these few numbers tell two checkpoints apart without reading gigabytes.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in policy.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        digest.update(name.encode())
        digest.update(local.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return gather_objects([digest.hexdigest()])[0]  # the first rank has the first rows of every sharded parameter


def describe(value: Any) -> Any:
    """An object's class and public attributes as plain values, nested: what a reward's results depend on."""
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, str | int | float | bool | None):
        return value
    if hasattr(value, "__qualname__"):  # a class or a function
        return f"{value.__module__}.{value.__qualname__}"
    if not hasattr(value, "__dict__"):
        return str(value)
    attributes = {name: describe(item) for name, item in sorted(vars(value).items()) if not name.startswith("_")}
    return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **attributes}
