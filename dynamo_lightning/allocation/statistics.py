"""Running statistics of every prompt: the store that feeds outcomes to an estimator and keeps what it remembers.

Departures from the paper's code: statistics are joined by prompt id, never by position, are part of the checkpoint,
and are updated in every RL iteration instead of once per epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from dynamo_lightning.allocation.estimators.base import VarianceEstimator
from dynamo_lightning.allocation.estimators.pooled import PooledEstimator
from dynamo_lightning.allocation.lengths import LENGTH_COLUMNS, MeanLength, check_lengths
from dynamo_lightning.allocation.prompt_features import HIDDEN_STATE
from dynamo_lightning.allocation.records import BoolArray, Estimate, FloatArray, IntArray
from dynamo_lightning.allocation.shared_statistics import SharedStatistics
from dynamo_lightning.allocation.table import PromptTable, Rows
from dynamo_lightning.errors import UserError

__all__ = ["Estimate", "PromptStatistics"]


class ForeignStatisticsError(UserError):
    """A checkpoint's statistics are those of another estimator, and cannot be converted."""


class PromptStatistics:
    """The running statistics of every prompt that was ever visited, keyed by prompt id.

    Everything is a function of the outcomes and their prompt ids: the same calls give the same bits on every rank, and
    prompts that join or leave the data set change nothing for the others. Outcomes of prompts that left are kept, for
    they may come back. Only visited prompts take memory, here and in the checkpoint: 8 bytes each for the id, the last
    visit and the two lengths, and the estimator's columns.

    Response lengths are remembered beside what the estimator remembers: tokens and responses, both halved whenever the
    prompt is visited in a new iteration, for lengths move with the policy. Their ratio is the expected length; a prompt
    without any has the mean of all prompts.

    Args:
        estimator: What is remembered of each prompt, and what follows from it.
    """

    def __init__(self, estimator: VarianceEstimator) -> None:
        self.estimator = estimator
        self._table = PromptTable(len(estimator.columns), self._dtype)
        self._latest_visit = 0
        self._mean_length = MeanLength()
        self._population: tuple[float, ...] | None = None
        self._pool = SharedStatistics(estimator, self._table) if isinstance(estimator, PooledEstimator) else None

    def __len__(self) -> int:
        """Return the number of prompts visited so far."""
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take: the same for every prompt visited so far, nothing for the others.

        A `PooledEstimator` adds its shared vector, and the ids of its sample and of the running iteration.
        """
        return self._table.nbytes + (self._pool.nbytes if self._pool is not None and len(self) else 0)

    @property
    def mean_response_length(self) -> float:
        """Expected tokens of a response to a prompt without any, the mean over prompts; NaN if no length was seen."""
        return self._mean_length.value

    @property
    def population(self) -> tuple[float, ...]:
        """Parameters of all visited prompts together (`BetaPosterior`: the prior's a0 and b0), as of the last visit.

        A `PooledEstimator`'s is as of the last iteration before the latest visit.
        """
        if self._pool is not None:
            return tuple(self._pool.shared.tolist())
        if self._population is None:  # fitted once per RL iteration: it costs a pass over all visited prompts
            _, last_visit, state, _ = self._table.sorted_arrays()
            elapsed = self._latest_visit - last_visit
            self._population = self.estimator.fit_population(state, elapsed.astype(np.float64))
        return self._population

    def observe(
        self,
        prompt_ids: ArrayLike,
        successes: ArrayLike,
        counts: ArrayLike,
        iteration: int,
        response_tokens: ArrayLike | None = None,
        features: ArrayLike | None = None,
    ) -> None:
        """Add outcomes of one RL iteration, all at once or, as with a pilot, in parts; the prompts' order is no matter.

        Args:
            prompt_ids: Distinct ids, `[num_prompts]`.
            successes: Successful rollouts of each prompt, `[num_prompts]`.
            counts: Rollouts of each prompt, `[num_prompts]`; where 0, the prompt counts as not visited.
            iteration: The RL iteration of these rollouts, not before one that was observed for the same prompt.
            response_tokens: Tokens of all responses of each prompt together, `[num_prompts]`, at least one each; only
                `cost: tokens` needs them.
            features: Of each prompt, `[num_prompts, num_features]`; only estimators with features need them.

        Raises:
            UserError: If shapes differ, an id occurs twice, not `0 ≤ successes ≤ counts`, there are fewer tokens than
                responses, features are missing or not finite, or time runs backwards. The statistics are then
                unchanged.
        """
        ids = _as_ids(prompt_ids)
        k, n = np.asarray(successes, dtype=np.float64), np.asarray(counts, dtype=np.float64)
        if not ids.shape == k.shape == n.shape:
            raise UserError(f"prompt_ids, successes and counts differ in shape: {ids.shape}, {k.shape}, {n.shape}")
        tokens = np.asarray(response_tokens, dtype=np.float64) if response_tokens is not None else np.zeros(len(ids))
        if tokens.shape != ids.shape:
            raise UserError(f"prompt_ids and response_tokens differ in shape: {ids.shape}, {tokens.shape}")
        order = np.argsort(ids, kind="stable")
        ids, k, n, tokens = ids[order], k[order], n[order], tokens[order]
        twice = ids[1:][ids[1:] == ids[:-1]]
        if len(twice):
            raise UserError(f"prompt id {twice[0]} occurs more than once in one call: add up its outcomes first")
        bad = ~((k >= 0) & (k <= n) & np.isfinite(n))
        if bad.any():
            raise UserError(f"prompt id {ids[bad][0]} has {k[bad][0]:g} successes in {n[bad][0]:g} rollouts")
        bad = ~((tokens >= n) & np.isfinite(tokens)) & (response_tokens is not None)
        if bad.any():
            raise UserError(f"prompt id {ids[bad][0]} has {tokens[bad][0]:g} tokens in {n[bad][0]:g} responses")
        visited = n > 0
        known = self._checked_features(_as_ids(prompt_ids), features)
        if known is None and self.estimator.features and visited.any():
            raise UserError(f"data.estimator.features={list(self.estimator.features)}: the features are missing")
        ids, k, n, tokens = ids[visited], k[visited], n[visited], tokens[visited]

        rows = self._gather(ids)
        if known is not None:
            rows.state = self.estimator.with_features(rows.state, known[order][visited])
        elapsed = self._elapsed(ids, rows, iteration)
        if self._pool is not None and iteration > self._pool.iteration and len(ids):
            rows.state, _ = self._pool.ahead(rows.state)
            self._pool.close(iteration)
        lengths = rows.lengths
        if response_tokens is not None:
            lengths = lengths * np.where(elapsed > 0, 0.5, 1.0) + np.stack([tokens, n])
        self._mean_length.replace(rows.lengths, lengths)
        rows.lengths, rows.last_visit = lengths, np.full(len(ids), iteration)
        rows.state = self.estimator.update(rows.state, k, n, elapsed)
        if self._pool is not None:
            rows.state = self._pool.observed(ids, rows.state, iteration)
        self._table.write(rows)
        self._latest_visit = max(self._latest_visit, iteration if len(ids) else 0)
        self._population = None

    def is_known(self, prompt_ids: ArrayLike) -> BoolArray:
        """Return which prompts have outcomes, `[num_prompts]`."""
        return self._table.gather(_as_ids(prompt_ids)).known

    def estimate(self, prompt_ids: ArrayLike, iteration: int, features: ArrayLike | None = None) -> Estimate:
        """Return what is expected of these prompts in RL iteration `iteration`.

        Args:
            prompt_ids: Ids of seen or unseen prompts, `[num_prompts]`.
            iteration: The coming RL iteration.
            features: Of each prompt, `[num_prompts, num_features]`; without them those remembered of visited prompts,
                and for unseen ones those of an average prompt. Estimators without features ignore them.

        Raises:
            UserError: If one of the prompts was visited after `iteration`, or features are not finite.
        """
        ids = _as_ids(prompt_ids)
        rows = self._gather(ids)
        known = self._checked_features(ids, features)
        if known is not None:
            rows.state = self.estimator.with_features(rows.state, known)
        elapsed = self._elapsed(ids, rows, iteration)
        state, population = rows.state, self.population
        if self._pool is not None and iteration > self._pool.iteration:
            state, shared = self._pool.ahead(state)
            population = tuple(shared.tolist())
        tokens, responses = rows.lengths
        response_length = tokens / np.maximum(responses, 1e-300)
        if (responses == 0).any():
            response_length[responses == 0] = self.mean_response_length
        success_rate, bernoulli_variance = self.estimator.moments(state, elapsed, population)
        return Estimate(
            success_rate=success_rate,
            bernoulli_variance=bernoulli_variance,
            unseen=~rows.known,
            response_length=response_length,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all statistics: tensors and primitives only, for FSDP loads checkpoints `weights_only`."""
        ids, last_visit, state, lengths = self._table.sorted_arrays()
        return {
            "estimator": type(self.estimator).__name__,
            "settings": self.estimator.settings(),
            "prompt_ids": torch.from_numpy(ids),
            "last_visit": torch.from_numpy(last_visit),
            "columns": {
                column: torch.from_numpy(values.copy())
                for column, values in zip(self._columns, (*state, *lengths), strict=True)
            },
            **(self._pool.state_dict() if self._pool is not None else {}),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace all statistics by saved ones; warn if the estimator or its settings are other than they were.

        Statistics of another estimator are converted if this one can be (`VarianceEstimator.converted_columns`).

        Raises:
            UserError: If they are another estimator's that cannot be converted, or corrupt. The statistics are then
                unchanged.
        """
        name, settings = type(self.estimator).__name__, self.estimator.settings()
        saved_name = state_dict.get("estimator")
        try:
            if saved_name != name:
                state_dict = self._converted(saved_name, state_dict)
            elif {"settings", "columns"} <= state_dict.keys():
                state_dict = self.estimator.adapted(state_dict)
            ids, last_visit, state, lengths = self._checked_arrays(state_dict)
            self.estimator.check_state(state)
            check_lengths(lengths)
            pool = None
            table = PromptTable(len(self.estimator.columns), self._dtype)
            rows = table.gather(ids)
            rows.last_visit, rows.state, rows.lengths = last_visit, state, lengths
            table.write(rows)
            if isinstance(self.estimator, PooledEstimator):
                pool = SharedStatistics(self.estimator, table)
                pool.load_state_dict(state_dict, ids, last_visit, state)
        except ForeignStatisticsError:
            raise
        except ValueError as error:
            raise UserError(f"the checkpoint's prompt statistics are corrupt: {error}") from error
        if saved_name != name:
            warnings.warn(f"{name} goes on with the outcomes that {saved_name} had counted", stacklevel=2)
        elif state_dict["settings"] != settings:
            warnings.warn(
                f"{name} goes on with {settings}, but old outcomes were added up with {state_dict['settings']}",
                stacklevel=2,
            )
        self._table, self._pool, self._population = table, pool, None
        self._latest_visit = int(last_visit.max(initial=0))
        self._mean_length = MeanLength()
        self._mean_length.replace(np.zeros_like(lengths), lengths)

    @property
    def _columns(self) -> tuple[str, ...]:
        return (*self.estimator.columns, *LENGTH_COLUMNS)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(getattr(self.estimator, "dtype", np.float64))

    def _converted(self, saved_name: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return another estimator's saved statistics as this one's; ForeignStatisticsError if that is impossible."""
        columns = state_dict.get("columns", {})
        own = self.estimator.converted_columns(str(saved_name), columns)
        if own is None:
            raise ForeignStatisticsError(
                f"the checkpoint has statistics of {saved_name!r}, not of {type(self.estimator).__name__!r}"
            )
        return {**state_dict, "columns": {**own, **{name: columns[name] for name in LENGTH_COLUMNS if name in columns}}}

    def _checked_arrays(self, state_dict: Mapping[str, Any]) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
        """Return copies of the saved ids, last visits, columns and lengths; ValueError if they cannot be."""
        missing = {"settings", "prompt_ids", "last_visit", "columns"} - state_dict.keys()
        if missing or set(state_dict["columns"]) != set(self._columns):
            raise UserError(f"missing {sorted(missing)}" if missing else f"columns {sorted(state_dict['columns'])}")
        columns = {column: state_dict["columns"][column] for column in self._columns}
        tensors = {"prompt_ids": state_dict["prompt_ids"], "last_visit": state_dict["last_visit"], **columns}
        for key, tensor in tensors.items():
            dtype = torch.int64
            if key in columns:
                dtype = torch.float64 if key in LENGTH_COLUMNS else torch.from_numpy(np.empty(0, self._dtype)).dtype
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.ndim != 1:
                raise UserError(f"{key!r} is not a vector of {dtype}")
            if len(tensor) != len(tensors["prompt_ids"]):
                raise UserError(f"{key!r} has length {len(tensor)}, 'prompt_ids' {len(tensors['prompt_ids'])}")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{key!r} is not finite everywhere")
        ids, last_visit = (tensors[key].cpu().numpy().copy() for key in ("prompt_ids", "last_visit"))
        if (ids[1:] <= ids[:-1]).any():
            raise UserError("'prompt_ids' are not sorted or occur twice")
        if (last_visit < 0).any():
            raise UserError(f"'last_visit' has the negative value {last_visit.min()}")
        state, lengths = (
            np.stack([columns[name].cpu().numpy().astype(np.float64) for name in names])
            for names in (self.estimator.columns, LENGTH_COLUMNS)
        )
        return ids, last_visit, state, lengths

    def _checked_features(self, ids: IntArray, features: ArrayLike | None) -> FloatArray | None:
        """Return the features that the estimator uses, `[num_prompts, num_features]`; UserError if they cannot be."""
        names = self.estimator.features
        if features is None or not names:
            return None
        values = np.asarray(features, dtype=np.float64)
        if values.shape != (len(ids), len(names)):
            raise UserError(
                f"data.estimator.features={list(names)}: features of shape {values.shape} for {len(ids)} prompts"
            )
        # A score that is NaN is the one that is remembered.
        may_be_nan = np.array([name == HIDDEN_STATE for name in names])
        bad = ~(np.isfinite(values) | (np.isnan(values) & may_be_nan)).all(axis=1)
        if bad.any():
            raise UserError(
                f"data.estimator.features={list(names)}: prompt id {ids[bad][0]} has {values[bad][0].tolist()}, "
                "which is not finite"
            )
        return values

    def _gather(self, ids: IntArray) -> Rows:
        """Return the rows of these prompts, the estimator's initial state for the unseen ones."""
        rows = self._table.gather(ids)
        rows.state[:, ~rows.known] = np.array(self.estimator.initial_state())[:, None]
        return rows

    def _elapsed(self, ids: IntArray, rows: Rows, iteration: int) -> FloatArray:
        """Return RL iterations since the last visit, 0 for unseen prompts; ValueError if that visit is yet to come."""
        elapsed = np.where(rows.known, iteration - rows.last_visit, 0).astype(np.float64)
        if (elapsed < 0).any():
            late = np.flatnonzero(elapsed < 0)[0]
            raise UserError(
                f"iteration {iteration} lies before iteration {rows.last_visit[late]}, "
                f"in which prompt id {ids[late]} was visited"
            )
        return elapsed


def _as_ids(prompt_ids: ArrayLike) -> IntArray:
    """Return ids as a vector; ValueError if they are not integers, for a float cannot hold 63 bits."""
    ids = np.asarray(prompt_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError(f"prompt_ids must be a vector of integers, got {ids.dtype} of shape {ids.shape}")
    return ids.astype(np.int64)
