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
from dynamo_lightning.allocation.records import BoolArray, Estimate, FloatArray, IntArray
from dynamo_lightning.errors import UserError

__all__ = ["Estimate", "PromptStatistics"]


LENGTH_COLUMNS = ("response_tokens", "responses")


class PromptStatistics:
    """The running statistics of every prompt that was ever visited, keyed by prompt id.

    Plain arrays sorted by id: the same calls give the same bits on every rank, and prompts that join or leave the data
    set change nothing for the others. Outcomes of prompts that left are kept, for they may come back. Only visited
    prompts take memory, here and in the checkpoint: 8 bytes for the id and for each number kept.

    Response lengths are remembered beside what the estimator remembers: tokens and responses, both halved whenever the
    prompt is visited in a new iteration, for lengths move with the policy. Their ratio is the expected length; a prompt
    without any has the mean of all prompts.

    Args:
        estimator: What is remembered of each prompt, and what follows from it.
    """

    def __init__(self, estimator: VarianceEstimator) -> None:
        self.estimator = estimator
        self._prompt_ids: IntArray = np.empty(0, dtype=np.int64)
        self._last_visit: IntArray = np.empty(0, dtype=np.int64)
        self._state: FloatArray = np.empty((len(estimator.columns), 0))
        self._lengths: FloatArray = np.empty((len(LENGTH_COLUMNS), 0))
        self._population: tuple[float, ...] | None = None

    def __len__(self) -> int:
        """Return the number of prompts visited so far."""
        return len(self._prompt_ids)

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays take: the same for every prompt visited so far, nothing for the others."""
        return self._prompt_ids.nbytes + self._last_visit.nbytes + self._state.nbytes + self._lengths.nbytes

    @property
    def mean_response_length(self) -> float:
        """Expected tokens of a response to a prompt without any, the mean over prompts; NaN if no length was seen."""
        tokens, responses = self._lengths[:, self._lengths[1] > 0]
        return float((tokens / responses).mean()) if len(tokens) else float("nan")

    @property
    def population(self) -> tuple[float, ...]:
        """What all visited prompts say of any prompt (`BetaPosterior`: the prior's a0 and b0), as of the last visit."""
        if self._population is None:  # fitted once per RL iteration: it costs a pass over all visited prompts
            elapsed = self._last_visit.max(initial=0) - self._last_visit
            self._population = self.estimator.fit_population(self._state, elapsed.astype(np.float64))
        return self._population

    def observe(
        self,
        prompt_ids: ArrayLike,
        successes: ArrayLike,
        counts: ArrayLike,
        iteration: int,
        response_tokens: ArrayLike | None = None,
    ) -> None:
        """Add outcomes of one RL iteration, all at once or, as with a pilot, in parts; the prompts' order is no matter.

        Args:
            prompt_ids: Distinct ids, `[num_prompts]`.
            successes: Successful rollouts of each prompt, `[num_prompts]`.
            counts: Rollouts of each prompt, `[num_prompts]`; where 0, the prompt counts as not visited.
            iteration: The RL iteration of these rollouts, not before one that was observed for the same prompt.
            response_tokens: Tokens of all responses of each prompt together, `[num_prompts]`, at least one each; only
                `cost: tokens` needs them.

        Raises:
            UserError: If shapes differ, an id occurs twice, not `0 ≤ successes ≤ counts`, there are fewer tokens than
                responses, or time runs backwards. The statistics are then unchanged.
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
        ids, k, n, tokens = ids[visited], k[visited], n[visited], tokens[visited]

        rows, known = self._find(ids)
        elapsed = np.where(known, self._elapsed(ids, rows, known, iteration), 0.0)
        new = ~known
        initial = np.array(self.estimator.initial_state())[:, None].repeat(np.count_nonzero(new), axis=1)
        self._prompt_ids = np.insert(self._prompt_ids, rows[new], ids[new])
        self._last_visit = np.insert(self._last_visit, rows[new], iteration)
        self._state = np.insert(self._state, rows[new], initial, axis=1)
        self._lengths = np.insert(self._lengths, rows[new], 0.0, axis=1)
        rows = np.searchsorted(self._prompt_ids, ids)
        if response_tokens is not None:
            self._lengths[:, rows] = self._lengths[:, rows] * np.where(elapsed > 0, 0.5, 1.0) + np.stack([tokens, n])
        self._state[:, rows] = self.estimator.update(self._state[:, rows], k, n, elapsed)
        self._last_visit[rows] = iteration
        self._population = None

    def estimate(self, prompt_ids: ArrayLike, iteration: int) -> Estimate:
        """Return what is expected of these prompts in RL iteration `iteration`.

        Args:
            prompt_ids: Ids of seen or unseen prompts, `[num_prompts]`.
            iteration: The coming RL iteration.

        Raises:
            UserError: If one of the prompts was visited after `iteration`.
        """
        ids = _as_ids(prompt_ids)
        rows, known = self._find(ids)
        elapsed = self._elapsed(ids, rows, known, iteration)
        state = np.array(self.estimator.initial_state())[:, None].repeat(len(ids), axis=1)
        state[:, known] = self._state[:, rows[known]]
        tokens, responses = np.zeros((len(LENGTH_COLUMNS), len(ids)))
        tokens[known], responses[known] = self._lengths[:, rows[known]]
        response_length = tokens / np.maximum(responses, 1e-300)
        if (responses == 0).any():
            response_length[responses == 0] = self.mean_response_length
        return Estimate(
            success_rate=self.estimator.success_rate(state, elapsed, self.population),
            bernoulli_variance=self.estimator.bernoulli_variance(state, elapsed, self.population),
            unseen=~known,
            response_length=response_length,
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
                for column, values in zip(self._columns, (*self._state, *self._lengths), strict=True)
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace all statistics by saved ones; warn if the estimator's settings are other than they were.

        Raises:
            UserError: If they are another estimator's, or corrupt. The statistics are then unchanged.
        """
        name, settings = type(self.estimator).__name__, self.estimator.settings()
        if state_dict.get("estimator") != name:
            raise UserError(f"the checkpoint has statistics of {state_dict.get('estimator')!r}, not of {name!r}")
        try:
            ids, last_visit, state = self._checked_arrays(state_dict)
            self.estimator.check_state(state[: len(self.estimator.columns)])
            _check_lengths(state[len(self.estimator.columns) :])
        except ValueError as error:
            raise UserError(f"the checkpoint's prompt statistics are corrupt: {error}") from error
        if state_dict["settings"] != settings:
            warnings.warn(
                f"{name} goes on with {settings}, but old outcomes were added up with {state_dict['settings']}",
                stacklevel=2,
            )
        self._prompt_ids, self._last_visit, self._population = ids, last_visit, None
        self._state, self._lengths = np.split(state, [len(self.estimator.columns)])

    @property
    def _columns(self) -> tuple[str, ...]:
        return (*self.estimator.columns, *LENGTH_COLUMNS)

    def _checked_arrays(self, state_dict: Mapping[str, Any]) -> tuple[IntArray, IntArray, FloatArray]:
        """Return copies of the saved ids, last visits and columns; ValueError if they cannot be."""
        missing = {"settings", "prompt_ids", "last_visit", "columns"} - state_dict.keys()
        if missing or set(state_dict["columns"]) != set(self._columns):
            raise UserError(f"missing {sorted(missing)}" if missing else f"columns {sorted(state_dict['columns'])}")
        columns = {column: state_dict["columns"][column] for column in self._columns}
        tensors = {"prompt_ids": state_dict["prompt_ids"], "last_visit": state_dict["last_visit"], **columns}
        for key, tensor in tensors.items():
            dtype = torch.float64 if key in columns else torch.int64
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
        return ids, last_visit, np.stack([tensor.cpu().numpy() for tensor in columns.values()])

    def _find(self, ids: IntArray) -> tuple[IntArray, BoolArray]:
        """Return where each id stands or would be inserted, and whether it is there."""
        rows = np.searchsorted(self._prompt_ids, ids)
        known = np.zeros(len(ids), dtype=bool)
        inside = rows < len(self)
        known[inside] = self._prompt_ids[rows[inside]] == ids[inside]
        return rows, known

    def _elapsed(self, ids: IntArray, rows: IntArray, known: BoolArray, iteration: int) -> FloatArray:
        """Return RL iterations since the last visit, 0 for unseen prompts; ValueError if that visit is yet to come."""
        elapsed = np.zeros(len(ids))
        elapsed[known] = iteration - self._last_visit[rows[known]]
        if (elapsed < 0).any():
            late = np.flatnonzero(elapsed < 0)[0]
            raise UserError(
                f"iteration {iteration} lies before iteration {self._last_visit[rows[late]]}, "
                f"in which prompt id {ids[late]} was visited"
            )
        return elapsed


def _check_lengths(lengths: FloatArray) -> None:
    """Raise a ValueError if there are fewer tokens than responses, each of which has at least one."""
    tokens, responses = lengths
    if not ((responses >= 0) & (tokens >= responses)).all():
        row = np.flatnonzero(~((responses >= 0) & (tokens >= responses)))[0]
        raise UserError(f"{tokens[row]:g} 'response_tokens' in {responses[row]:g} 'responses'")


def _as_ids(prompt_ids: ArrayLike) -> IntArray:
    """Return ids as a vector; ValueError if they are not integers, for a float cannot hold 63 bits."""
    ids = np.asarray(prompt_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError(f"prompt_ids must be a vector of integers, got {ids.dtype} of shape {ids.shape}")
    return ids.astype(np.int64)
