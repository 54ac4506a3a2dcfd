"""Bookkeeping for estimators that learn from all prompts together: which iteration is open, and what all share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dynamo_lightning.allocation.estimators.pooled import PooledEstimator, fixed_sample
from dynamo_lightning.allocation.records import FloatArray, IntArray
from dynamo_lightning.allocation.table import PromptTable
from dynamo_lightning.errors import UserError

MANY = 8
"""The open iteration's ids are kept as long as all prompts are at least this many times as many, else looked up."""

FEW = 4
"""The sample's ids are looked up as long as all prompts are at most this many times as many, then kept."""


class SharedStatistics:
    """The shared vector of a `PooledEstimator`, frozen within an RL iteration.

    Ids of the open iteration and of the sample are kept only where that takes little memory for each prompt; otherwise
    a pass over all prompts finds them, of which there are then not many more.

    Args:
        estimator: How the vector advances.
        table: The rows of all visited prompts.
    """

    def __init__(self, estimator: PooledEstimator, table: PromptTable) -> None:
        self._estimator = estimator
        self._table = table
        self.shared: FloatArray = estimator.initial_shared()
        """The vector before the open iteration."""
        self.iteration = -1
        """The open iteration: the latest with outcomes; −1 before any."""
        self._kept_open: IntArray | None = None
        self._kept_sample: IntArray | None = None
        self._ahead: FloatArray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the shared vector, the sampled ids and those of the open iteration."""
        kept = (ids.nbytes for ids in (self._kept_open, self._kept_sample) if ids is not None)
        return self.shared.nbytes + sum(kept)

    def ahead(self, state: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return states and shared vector as they are for later iterations, without closing the open one."""
        if self._ahead is None:
            self._ahead = self._advanced()
        return self._estimator.fold(state, self._ahead, self.iteration), self._ahead

    def close(self, iteration: int) -> None:
        """Close the open iteration, for outcomes of a later one have come."""
        rows = self._table.gather(self._open_ids())
        rows.state, self.shared = self.ahead(rows.state)
        self._table.write(rows)
        self.iteration, self._kept_open, self._ahead = iteration, np.empty(0, dtype=np.int64), None

    def observed(self, prompt_ids: IntArray, state: FloatArray, iteration: int) -> FloatArray:
        """Take note of outcomes, and return the states to keep; outcomes of a closed iteration are folded at once."""
        self._ahead = None
        if self._kept_sample is not None:
            self._kept_sample = self._sampled(_union(self._kept_sample, prompt_ids))
        elif len(self._table) + len(prompt_ids) > FEW * self._estimator.sample_size:
            self._kept_sample = self._sampled(_union(self._table.ids(), prompt_ids))
        if iteration < self.iteration:
            return self._estimator.fold(state, self.shared, iteration)
        if self._kept_open is not None:
            self._kept_open = _union(self._kept_open, prompt_ids)
            if MANY * len(self._kept_open) > len(self._table):
                self._kept_open = None
        return state

    def _open_ids(self) -> IntArray:
        """Return the ids of the open iteration, ascending."""
        return self._table.ids(last_visit=self.iteration) if self._kept_open is None else self._kept_open

    def _sampled(self, ids: IntArray) -> IntArray:
        return fixed_sample(ids, self._estimator.sample_size)

    def _advanced(self) -> FloatArray:
        """Return the shared vector after the open iteration."""
        if self.iteration < 0:
            return self.shared
        visited = self._table.gather(fixed_sample(self._open_ids(), self._estimator.visited_size))
        sample_ids = self._sampled(self._table.ids()) if self._kept_sample is None else self._kept_sample
        sample = self._table.gather(sample_ids)
        elapsed = (self.iteration - sample.last_visit).astype(np.float64)
        return self._estimator.advance(self.shared, self.iteration, visited.state, sample.state, elapsed)

    def state_dict(self) -> dict[str, Any]:
        """Return shared vector and open iteration; all else follows from the prompts' rows."""
        return {"shared": torch.from_numpy(self.shared.copy()), "iteration": self.iteration}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], ids: IntArray, last_visit: IntArray, state: FloatArray
    ) -> None:
        """Restore what `state_dict` returned; without it (another estimator's checkpoint), fit it to the rows.

        Raises:
            UserError: If the vector or the iteration is impossible.
        """
        shared, iteration = state_dict.get("shared"), state_dict.get("iteration", int(last_visit.max(initial=-1)))
        if not isinstance(iteration, int) or iteration < last_visit.max(initial=-1):
            raise UserError(f"'iteration' is {iteration!r}, but a prompt was visited in {last_visit.max(initial=-1)}")
        self.iteration = iteration
        self._kept_sample = self._sampled(ids) if len(ids) > FEW * self._estimator.sample_size else None
        if shared is None:
            self.shared = self._advanced()
            return
        if not isinstance(shared, torch.Tensor) or shared.dtype != torch.float64 or shared.ndim != 1:
            raise UserError("'shared' is not a vector of torch.float64")
        if not torch.isfinite(shared).all():
            raise UserError("'shared' is not finite everywhere")
        self.shared = shared.cpu().numpy().copy()
        self._estimator.check_shared(self.shared)
        open_ids = ids[self._estimator.waiting(state)]
        self._kept_open = open_ids if MANY * len(open_ids) <= len(ids) else None


def _union(some: IntArray, others: IntArray) -> IntArray:
    """Return the ids of both, ascending, each once; `np.union1d` hashes, which takes ten times as long."""
    ids = np.sort(np.concatenate([some, others]))
    return ids[np.append(True, ids[1:] != ids[:-1])] if len(ids) else ids
