"""The interface of estimators of a prompt's reward variance p(1 − p): pure functions on float64 arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.errors import UserError


class VarianceEstimator(ABC):
    """A summary of a prompt's outcomes, and the estimate of its success rate p now that follows from it.

    Shapes: `state` is `[num_columns, num_prompts]`, a row for each of `columns`; `successes`, `counts` and `elapsed`
    (RL iterations since the prompt's last visit) are `[num_prompts]`; all are float64. `population` is whatever
    `fit_population` returned: what the visited prompts together say of any one of them. An unseen prompt is one in
    its initial state, nothing else.
    """

    columns: tuple[str, ...]
    """Names of the numbers kept for each prompt."""

    features: tuple[str, ...] = ()
    """Features of prompts that `with_features` takes, names of `feature_offsets.FEATURES`."""

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments, as the checkpoint records them: by default all public attributes."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def initial_state(self) -> tuple[float, ...]:
        """Return the state of a prompt without outcomes, `[num_columns]`: zeros, for columns that count."""
        return (0.0,) * len(self.columns)

    def check_state(self, state: FloatArray) -> None:
        """Raise a ValueError if `state` cannot be: by default if a number is negative."""
        for column, values in zip(self.columns, state, strict=True):
            if (values < 0).any():
                raise UserError(f"{column!r} has the negative value {values.min()}")

    def with_features(self, state: FloatArray, features: FloatArray) -> FloatArray:
        """Return states that remember the prompts' features, `[num_prompts, num_features]`; by default unchanged."""
        return state

    def adapted(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a checkpoint of this estimator with other settings in the layout of these; by default unchanged."""
        return state_dict

    def converted_columns(self, estimator: str, columns: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return a checkpoint's columns of another estimator as this one's; None if that is impossible.

        Args:
            estimator: Class name of the other estimator.
            columns: Its columns, `[num_prompts]` each, unchecked, and those of the response lengths.
        """
        return None

    def fit_population(self, state: FloatArray, elapsed: FloatArray) -> tuple[float, ...]:
        """Return what all visited prompts say of any prompt; `elapsed` is up to the latest visit of any prompt."""
        return ()

    @abstractmethod
    def update(self, state: FloatArray, successes: FloatArray, counts: FloatArray, elapsed: FloatArray) -> FloatArray:
        """Return the state after `successes` of `counts` new rollouts (at least one each)."""

    @abstractmethod
    def success_rate(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return the expected success rate `E[p]`, `[num_prompts]`."""

    @abstractmethod
    def bernoulli_variance(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return the weight for allocation, `E[p(1 − p)]`, `[num_prompts]`."""

    def moments(
        self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]
    ) -> tuple[FloatArray, FloatArray]:
        """Return `success_rate` and `bernoulli_variance`; to override where both follow from one costly step."""
        return self.success_rate(state, elapsed, population), self.bernoulli_variance(state, elapsed, population)
