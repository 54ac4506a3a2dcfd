"""Rows of numbers keyed by prompt id, in memory for visited prompts only, cheap to extend at any size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from dynamo_lightning.allocation.records import BoolArray, FloatArray, IntArray

BLOCK_SIZE = 2**19
"""Largest number of prompts in a block."""


@dataclass
class Rows:
    """The rows of some prompts, in the order asked for; prompts that are not in the table have zeros."""

    known: BoolArray
    """Which prompts are in the table, `[num_prompts]`."""
    last_visit: IntArray
    """RL iteration of the last visit, `[num_prompts]`."""
    state: FloatArray
    """The estimator's columns, `[num_columns, num_prompts]`, float64."""
    lengths: FloatArray
    """Tokens and responses, `[2, num_prompts]`."""
    ids: IntArray
    """Ids of the prompts, `[num_prompts]`."""
    places: list[tuple[IntArray, IntArray]]
    """For each block, positions in the block and the positions here that they belong to; `write` needs them."""


@dataclass
class _Block:
    """Arrays with a row per prompt, so that a prompt's numbers lie side by side in memory."""

    ids: IntArray
    last_visit: IntArray
    state: FloatArray  # [num_prompts, num_columns]
    lengths: FloatArray  # [num_prompts, 2]

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.last_visit.nbytes + self.state.nbytes + self.lengths.nbytes


class PromptTable:
    """Blocks of at most `BLOCK_SIZE` prompts, each sorted by id; new prompts enter the latest block.

    One sorted array would have to be copied whenever a prompt joins: a gigabyte for ten million prompts. Here only the
    latest block is copied, and looking up an id costs one binary search per block. Which prompts share a block shows
    in nothing that the table returns.

    Args:
        num_columns: The estimator's columns.
        dtype: Type of these columns in memory.
    """

    def __init__(self, num_columns: int, dtype: DTypeLike = np.float64) -> None:
        self._num_columns = num_columns
        self._dtype = np.dtype(dtype)
        self._blocks: list[_Block] = []

    def __len__(self) -> int:
        """Return the number of prompts."""
        return sum(len(block.ids) for block in self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes that all arrays take."""
        return sum(block.nbytes for block in self._blocks)

    def ids(self, last_visit: int | None = None) -> IntArray:
        """Return all ids, or those whose last visit was in this iteration, ascending: a pass over all prompts."""
        found = [
            block.ids if last_visit is None else block.ids[block.last_visit == last_visit] for block in self._blocks
        ]
        return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *found]))

    def gather(self, ids: IntArray) -> Rows:
        """Return copies of the rows of distinct `ids`, `[num_prompts]`, in any order."""
        rows = Rows(
            known=np.zeros(len(ids), dtype=bool),
            last_visit=np.zeros(len(ids), dtype=np.int64),
            state=np.zeros((self._num_columns, len(ids))),
            lengths=np.zeros((2, len(ids))),
            ids=ids,
            places=[],
        )
        wanted = np.argsort(ids)  # ascending: consecutive searches then read what is in the cache
        for block in self._blocks:
            places = np.searchsorted(block.ids, ids[wanted])
            here = block.ids[np.minimum(places, len(block.ids) - 1)] == ids[wanted]
            places, found, wanted = places[here], wanted[here], wanted[~here]
            rows.known[found] = True
            rows.last_visit[found] = block.last_visit[places]
            rows.state[:, found] = block.state[places].T
            rows.lengths[:, found] = block.lengths[places].T
            rows.places.append((places, found))
        return rows

    def write(self, rows: Rows) -> None:
        """Put changed rows back, and add those of new prompts; nothing may have been written since `gather`."""
        for block, (places, found) in zip(self._blocks, rows.places, strict=True):
            block.last_visit[places] = rows.last_visit[found]
            block.state[places] = rows.state[:, found].T
            block.lengths[places] = rows.lengths[:, found].T
        new = np.flatnonzero(~rows.known)
        new = new[np.argsort(rows.ids[new])]
        state = rows.state[:, new].T.astype(self._dtype)
        self._add(_Block(rows.ids[new], rows.last_visit[new], state, rows.lengths[:, new].T))

    def sorted_arrays(self) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
        """Return copies of ids, last visits, columns and lengths of all prompts, sorted by id."""
        if not self._blocks:
            empty = np.empty(0, dtype=np.int64)
            return empty, empty.copy(), np.empty((self._num_columns, 0), dtype=self._dtype), np.empty((2, 0))
        ids = np.concatenate([block.ids for block in self._blocks])
        last_visit = np.concatenate([block.last_visit for block in self._blocks])
        state = np.concatenate([block.state for block in self._blocks])
        lengths = np.concatenate([block.lengths for block in self._blocks])
        if len(self._blocks) > 1:  # one block is sorted
            order = np.argsort(ids)
            ids, last_visit, state, lengths = ids[order], last_visit[order], state[order], lengths[order]
        return ids, last_visit, np.ascontiguousarray(state.T), np.ascontiguousarray(lengths.T)

    def _add(self, rows: _Block) -> None:
        """Insert rows that are new, ascending by id."""
        while len(rows.ids):
            if not self._blocks or len(self._blocks[-1].ids) >= BLOCK_SIZE:
                columns = self._num_columns
                empty = np.empty(0, dtype=np.int64)
                self._blocks.append(_Block(empty, empty, np.empty((0, columns), self._dtype), np.empty((0, 2))))
            last = self._blocks[-1]
            room = BLOCK_SIZE - len(last.ids)
            places = np.searchsorted(last.ids, rows.ids[:room])
            self._blocks[-1] = _Block(
                np.insert(last.ids, places, rows.ids[:room]),
                np.insert(last.last_visit, places, rows.last_visit[:room]),
                np.insert(last.state, places, rows.state[:room], axis=0),
                np.insert(last.lengths, places, rows.lengths[:room], axis=0),
            )
            rows = _Block(rows.ids[room:], rows.last_visit[room:], rows.state[room:], rows.lengths[room:])
