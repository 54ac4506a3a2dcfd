"""Prompts that the stream repeats or skips, from one iteration to the next and across a resume."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Place = tuple[int, int]
"""Pass over the data, and prompts of it that were given."""
MIN_BATCHES = 4
"""Batches of a pass from which on two equal ones are no chance."""
MAX_KEPT = 4096


class StreamWatch:
    """Compares each batch with what was given before it.

    Three signs: the number of the iteration, the place in the stream, and, for streams of one's own that have no place,
    a batch with exactly the prompts of an earlier one of the same pass.
    """

    def __init__(self) -> None:
        self.iteration: int | None = None
        """Number of the last batch."""
        self.place: Place | None = None
        """Behind the last batch."""
        self.checksums: list[int] = []
        """Checksums of the prompts of earlier batches, the newest last."""

    def begin(
        self, iteration: int, prompt_ids: Sequence[int], place: Place | None, num_batches: float
    ) -> tuple[float, float]:
        """Take in a batch.

        Args:
            iteration: Its number, from 0.
            prompt_ids: Its prompts.
            place: Behind it, before further prompts are taken; `None` if the stream has none.
            num_batches: Batches of a pass.

        Returns:
            Repeated and skipped prompts.
        """
        size = len(prompt_ids)
        gap = iteration - self.iteration - 1 if self.iteration is not None else 0
        ahead = place[1] - size - self.place[1] if place and self.place and place[0] == self.place[0] else 0
        is_earlier_pass = bool(place and self.place and place[0] < self.place[0])
        checksum = zlib.crc32(np.sort(np.array(prompt_ids, dtype=np.int64)).tobytes())
        window = self.checksums[-int(num_batches) + 1 :] if MIN_BATCHES <= num_batches < math.inf else []
        is_repeated = gap < 0 or is_earlier_pass or checksum in window
        self.iteration = iteration
        self.checksums = [*self.checksums, checksum][-MAX_KEPT:]
        return float(size if is_repeated else min(size, max(0, -ahead))), float(max(0, ahead, gap * size))

    def end(self, place: Place | None) -> None:
        """Take in the place behind everything that the iteration took."""
        self.place = place

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        place = list(self.place) if self.place is not None else None
        return {"iteration": self.iteration, "place": place, "checksums": list(self.checksums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.iteration = state["iteration"]
        self.place = tuple(state["place"]) if state["place"] is not None else None
        self.checksums = list(state["checksums"])
