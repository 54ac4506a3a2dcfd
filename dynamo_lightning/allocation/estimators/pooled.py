"""Estimators that learn something from all prompts together, besides what they keep of each prompt."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from dynamo_lightning.allocation.estimators.base import VarianceEstimator
from dynamo_lightning.allocation.records import BoolArray, FloatArray, IntArray

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class PooledEstimator(VarianceEstimator):
    """An estimator with a shared vector, which advances once per RL iteration, when all its outcomes are known.

    `PromptStatistics` keeps the vector and calls `update` for the prompts of the running iteration; the outcomes wait
    in the state until the iteration is closed, which happens when a later one is observed or asked for:

    1. `advance` gives the next shared vector, from the prompts of the iteration and a fixed sample of all prompts;
    2. `fold` merges the outcomes that waited into the rest of each prompt's state.

    Within the iteration the shared vector is frozen, so a pilot informs only its own prompts' estimates, and neither
    the order nor the number of `observe` calls matters. The shared vector is what the estimator's functions receive as
    `population`.
    """

    dtype: ClassVar[DTypeLike] = np.float64
    """Type of the columns in memory and in checkpoints."""

    sample_size: ClassVar[int] = 2048
    """Prompts in the sample of all visited prompts: those whose scrambled ids are smallest."""

    visited_size: ClassVar[int] = 1024
    """Largest number of an iteration's prompts that `advance` receives, chosen in the same way."""

    @abstractmethod
    def initial_shared(self) -> FloatArray:
        """Return the shared vector before any outcome."""

    @abstractmethod
    def check_shared(self, shared: FloatArray) -> None:
        """Raise a UserError if a checkpoint's shared vector is impossible."""

    @abstractmethod
    def advance(
        self, shared: FloatArray, iteration: int, visited: FloatArray, sample: FloatArray, elapsed: FloatArray
    ) -> FloatArray:
        """Return the shared vector after `iteration`.

        Args:
            shared: The vector before this iteration.
            iteration: The RL iteration to close.
            visited: States of the iteration's prompts with their outcomes waiting, `[num_columns, num_visited]`.
            sample: States of the sampled prompts, outcomes waiting in some, `[num_columns, num_sampled]`.
            elapsed: RL iterations between the sampled prompts' last visits and this iteration, `[num_sampled]`.
        """

    @abstractmethod
    def fold(self, state: FloatArray, shared: FloatArray, iteration: int) -> FloatArray:
        """Return states in which the outcomes that wait, all of `iteration`, are merged with the earlier ones."""

    @abstractmethod
    def waiting(self, state: FloatArray) -> BoolArray:
        """Return which prompts have outcomes that wait for `fold`, `[num_prompts]`."""


def scrambled(prompt_ids: IntArray) -> Any:
    """Return a bijective hash of each id, `[num_prompts]`, uint64: SplitMix64's finalizer (Steele et al., 2014)."""
    bits = prompt_ids.astype(np.uint64)
    for shift, factor in zip((30, 27), _MIX, strict=True):
        bits = (bits ^ (bits >> np.uint64(shift))) * factor
    return bits ^ (bits >> np.uint64(31))


def fixed_sample(prompt_ids: IntArray, size: int) -> IntArray:
    """Return, in ascending order, the `size` ids whose scrambled values are smallest, or all ids if there are fewer.

    The choice depends on the set of ids only, and the sample of a union is the sample of the union of the samples.
    """
    if len(prompt_ids) > size:
        prompt_ids = prompt_ids[np.argpartition(scrambled(prompt_ids), size - 1)[:size]]
    return np.sort(prompt_ids)
