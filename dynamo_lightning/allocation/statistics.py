"""Running statistics of every prompt: the store that feeds outcomes to an estimator and keeps what it remembers.

Departures from the paper's code: statistics are joined by prompt id, never by position, are part of the checkpoint,
and are updated in every RL iteration instead of once per epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dynamo_lightning.allocation.estimators import VarianceEstimator
from dynamo_lightning.allocation.rules import FloatArray, IntArray


@dataclass(frozen=True)
class Estimate:
    """What is expected of some prompts before their rollouts; a row per prompt, in the order asked for."""

    success_rate: FloatArray
    """`E[p]`, `[num_prompts]`, in [0, 1]."""
    bernoulli_variance: FloatArray
    """`E[p(1 − p)]`, the allocation weight, `[num_prompts]`; in [0, 1/4] but for `PaperBernoulli`."""
    unseen: NDArray[np.bool_]
    """Whether the prompt has no outcome yet, `[num_prompts]`."""


class PromptStatistics:
    """The running statistics of every prompt that was ever visited, keyed by prompt id.

    Plain arrays sorted by id: the same calls give the same bits on every rank, and prompts that join or leave the data
    set change nothing for the others. Outcomes of prompts that left are kept, for they may come back.

    Args:
        estimator: What is remembered of each prompt, and what follows from it.
    """

    def __init__(self, estimator: VarianceEstimator) -> None:
        self.estimator = estimator
        self._prompt_ids: IntArray = np.empty(0, dtype=np.int64)
        self._last_visit: IntArray = np.empty(0, dtype=np.int64)
        self._state: FloatArray = np.empty((len(estimator.columns), 0))
        self._population: tuple[float, ...] | None = None

    def __len__(self) -> int:
        """Return the number of prompts visited so far."""
        return len(self._prompt_ids)

    @property
    def population(self) -> tuple[float, ...]:
        """What all visited prompts say of any prompt (`BetaPosterior`: the prior's a0 and b0), as of the last visit."""
        if self._population is None:  # fitted once per RL iteration: it costs a pass over all visited prompts
            elapsed = self._last_visit.max(initial=0) - self._last_visit
            self._population = self.estimator.fit_population(self._state, elapsed.astype(np.float64))
        return self._population

    def observe(self, prompt_ids: ArrayLike, successes: ArrayLike, counts: ArrayLike, iteration: int) -> None:
        """Add the outcomes of one RL iteration; the order of the prompts does not matter.

        Args:
            prompt_ids: Distinct ids, `[num_prompts]`.
            successes: Successful rollouts of each prompt, `[num_prompts]`.
            counts: Rollouts of each prompt, `[num_prompts]`; where 0, the prompt counts as not visited.
            iteration: The RL iteration of these rollouts, not before one that was observed for the same prompt.

        Raises:
            ValueError: If lengths differ, an id occurs twice, not `0 ≤ successes ≤ counts`, or time runs backwards.
        """
        ids = _as_ids(prompt_ids)
        k, n = np.asarray(successes, dtype=np.float64), np.asarray(counts, dtype=np.float64)
        if not ids.shape == k.shape == n.shape:
            raise ValueError(f"prompt_ids, successes and counts differ in shape: {ids.shape}, {k.shape}, {n.shape}")
        order = np.argsort(ids, kind="stable")
        ids, k, n = ids[order], k[order], n[order]
        twice = ids[1:][ids[1:] == ids[:-1]]
        if len(twice):
            raise ValueError(f"prompt id {twice[0]} occurs more than once in one call: add up its outcomes first")
        bad = ~((k >= 0) & (k <= n) & np.isfinite(n))
        if bad.any():
            raise ValueError(f"prompt id {ids[bad][0]} has {k[bad][0]:g} successes in {n[bad][0]:g} rollouts")
        ids, k, n = ids[n > 0], k[n > 0], n[n > 0]

        rows, known = self._find(ids)
        elapsed = np.where(known, self._elapsed(ids, rows, known, iteration), 0.0)
        new = ~known
        initial = np.array(self.estimator.initial_state())[:, None].repeat(np.count_nonzero(new), axis=1)
        self._prompt_ids = np.insert(self._prompt_ids, rows[new], ids[new])
        self._last_visit = np.insert(self._last_visit, rows[new], iteration)
        self._state = np.insert(self._state, rows[new], initial, axis=1)
        rows = np.searchsorted(self._prompt_ids, ids)
        self._state[:, rows] = self.estimator.update(self._state[:, rows], k, n, elapsed)
        self._last_visit[rows] = iteration
        self._population = None

    def estimate(self, prompt_ids: ArrayLike, iteration: int) -> Estimate:
        """Return what is expected of these prompts in RL iteration `iteration`.

        Args:
            prompt_ids: Ids of seen or unseen prompts, `[num_prompts]`.
            iteration: The coming RL iteration.

        Raises:
            ValueError: If one of the prompts was visited after `iteration`.
        """
        ids = _as_ids(prompt_ids)
        rows, known = self._find(ids)
        elapsed = self._elapsed(ids, rows, known, iteration)
        state = np.array(self.estimator.initial_state())[:, None].repeat(len(ids), axis=1)
        state[:, known] = self._state[:, rows[known]]
        return Estimate(
            success_rate=self.estimator.success_rate(state, elapsed, self.population),
            bernoulli_variance=self.estimator.bernoulli_variance(state, elapsed, self.population),
            unseen=~known,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all statistics: tensors and primitives only, for FSDP loads checkpoints `weights_only`."""
        return {
            "estimator": type(self.estimator).__name__,
            "settings": self.estimator.settings(),
            "prompt_ids": torch.from_numpy(self._prompt_ids.copy()),
            "last_visit": torch.from_numpy(self._last_visit.copy()),
            "columns": {
                column: torch.from_numpy(values.copy())
                for column, values in zip(self.estimator.columns, self._state, strict=True)
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace all statistics by saved ones; warn if the estimator's settings are other than they were.

        Raises:
            ValueError: If they are another estimator's, or corrupt. The statistics are then unchanged.
        """
        name, settings = type(self.estimator).__name__, self.estimator.settings()
        if state_dict.get("estimator") != name:
            raise ValueError(f"the checkpoint has statistics of {state_dict.get('estimator')!r}, not of {name!r}")
        try:
            ids, last_visit, state = self._checked_arrays(state_dict)
            self.estimator.check_state(state)
        except ValueError as error:
            raise ValueError(f"the checkpoint's prompt statistics are corrupt: {error}") from error
        if state_dict["settings"] != settings:
            warnings.warn(
                f"{name} goes on with {settings}, but old outcomes were added up with {state_dict['settings']}",
                stacklevel=2,
            )
        self._prompt_ids, self._last_visit, self._state, self._population = ids, last_visit, state, None

    def _checked_arrays(self, state_dict: Mapping[str, Any]) -> tuple[IntArray, IntArray, FloatArray]:
        """Return copies of the saved ids, last visits and columns; ValueError if they cannot be."""
        missing = {"settings", "prompt_ids", "last_visit", "columns"} - state_dict.keys()
        if missing or set(state_dict["columns"]) != set(self.estimator.columns):
            raise ValueError(f"missing {sorted(missing)}" if missing else f"columns {sorted(state_dict['columns'])}")
        columns = {column: state_dict["columns"][column] for column in self.estimator.columns}
        tensors = {"prompt_ids": state_dict["prompt_ids"], "last_visit": state_dict["last_visit"], **columns}
        for key, tensor in tensors.items():
            dtype = torch.float64 if key in columns else torch.int64
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.ndim != 1:
                raise ValueError(f"{key!r} is not a vector of {dtype}")
            if len(tensor) != len(tensors["prompt_ids"]):
                raise ValueError(f"{key!r} has length {len(tensor)}, 'prompt_ids' {len(tensors['prompt_ids'])}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{key!r} is not finite everywhere")
        ids, last_visit = (tensors[key].cpu().numpy().copy() for key in ("prompt_ids", "last_visit"))
        if (ids[1:] <= ids[:-1]).any():
            raise ValueError("'prompt_ids' are not sorted or occur twice")
        if (last_visit < 0).any():
            raise ValueError(f"'last_visit' has the negative value {last_visit.min()}")
        return ids, last_visit, np.stack([tensor.cpu().numpy() for tensor in columns.values()])

    def _find(self, ids: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
        """Return where each id stands or would be inserted, and whether it is there."""
        rows = np.searchsorted(self._prompt_ids, ids)
        known = np.zeros(len(ids), dtype=bool)
        inside = rows < len(self)
        known[inside] = self._prompt_ids[rows[inside]] == ids[inside]
        return rows, known

    def _elapsed(self, ids: IntArray, rows: IntArray, known: NDArray[np.bool_], iteration: int) -> FloatArray:
        """Return RL iterations since the last visit, 0 for unseen prompts; ValueError if that visit is yet to come."""
        elapsed = np.zeros(len(ids))
        elapsed[known] = iteration - self._last_visit[rows[known]]
        if (elapsed < 0).any():
            late = np.flatnonzero(elapsed < 0)[0]
            raise ValueError(
                f"iteration {iteration} lies before iteration {self._last_visit[rows[late]]}, "
                f"in which prompt id {ids[late]} was visited"
            )
        return elapsed


def _as_ids(prompt_ids: ArrayLike) -> IntArray:
    """Return ids as a vector; ValueError if they are not integers, for a float cannot hold 63 bits."""
    ids = np.asarray(prompt_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"prompt_ids must be a vector of integers, got {ids.dtype} of shape {ids.shape}")
    return ids.astype(np.int64)
