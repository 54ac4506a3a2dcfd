"""A set-up with a few prompts and the responses that the policy gave to them: the input of every check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from lightning import Trainer

from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.engines.stopping import StopConfig, StopRule, stop_rule
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.rewards.group_scoring import score_complete_groups
from dynamo_lightning.types import Prompt, Rollout, Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS_PER_DATASET = 2


@dataclass(frozen=True)
class CheckCase:
    """A set-up that is ready to train, with a few prompts of each data set and sampled responses."""

    trainer: Trainer
    model: PolicyModule
    datamodule: RolloutDataModule
    prompts: tuple[Prompt, ...]
    """Two of each data set."""
    rollouts: tuple[Rollout, ...]
    """Responses sampled as in training, the same number to each prompt."""
    scores: tuple[Score, ...]
    """The reward's result for each rollout."""
    seconds: float
    """Wall-clock seconds that scoring all rollouts took, workers being warm."""

    @property
    def policy(self) -> PreTrainedModel:
        """The policy under training."""
        assert self.model.policy is not None
        return self.model.policy

    @property
    def stop_rule(self) -> StopRule:
        """Tokens and strings that end a response."""
        sampling = self.model.sampling
        config = StopConfig(tuple(sampling.stop_strings), tuple(sampling.stop_token_ids))
        return stop_rule(self.policy, self.model.tokenizer, config)

    def score_texts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score]:
        """Scores of made-up responses, one to each prompt.

        Args:
            prompts: `[num_responses]`.
            texts: `[num_responses]`.
        """
        tokenizer = self.model.tokenizer
        rollouts = []
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            rollouts.append(Rollout(prompt, index, np.array(ids, np.int32), np.zeros(len(ids), np.float32), text))
        return score(self.model, rollouts)


def score(model: PolicyModule, rollouts: Sequence[Rollout]) -> list[Score]:
    """Scores of rollouts by the reward's own worker processes, in their order."""
    scorer = model.collector.scorer
    return score_complete_groups(scorer, rollouts) if scorer.reward.needs_group else scorer.score(rollouts)
