"""Several data sets in one stream: which prompts each pass has, by the weights of their data sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dynamo_lightning.errors import UserError


class Mixture:
    """How often the prompts of each data set come.

    An epoch has `num_passes` passes, the largest weight rounded up, and no pass has a prompt twice. In an epoch a data
    set of `n` prompts and weight `w` comes `round(w n)` times: each of its prompts `⌊w⌋` times, and a random share of
    them once more. Which ones, and in which passes, is drawn anew for each epoch from the seed alone, so it is the same
    on every rank and after a resume; the sizes of the passes do not depend on it.

    Args:
        sizes: Prompts of each data set, `[num_data_sets]`.
        weights: Expected passes over each data set in an epoch, `[num_data_sets]`.

    Raises:
        UserError: If the weight of a data set leaves none of its prompts.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]) -> None:
        self.sizes = list(sizes)
        self.num_passes = max(1, *(math.ceil(weight) for weight in weights))
        self._totals = [round(weight * size) for weight, size in zip(weights, sizes, strict=True)]
        for index, total in enumerate(self._totals):
            if total < 1:
                raise UserError(
                    f"data.train[{index}].weight={weights[index]:g} leaves none of its {sizes[index]} prompts in an "
                    "epoch: raise it"
                )
        self.pass_sizes = [len(self.members(0, number)) for number in range(self.num_passes)]
        """Prompts of each pass of an epoch, `[num_passes]`."""

    @property
    def is_plain(self) -> bool:
        """True if every pass has every prompt."""
        return self.num_passes == 1 and self._totals == self.sizes

    def members(self, seed: int, number: int) -> NDArray[np.int64]:
        """The prompts of a pass, as positions in the data sets one after the other, in ascending order.

        Args:
            seed: The run's, at least 0.
            number: Passes before this one since the run began.
        """
        if self.is_plain:
            return np.arange(sum(self.sizes))
        epoch, place = divmod(number, self.num_passes)
        chosen, first = [], 0
        for index, (size, total) in enumerate(zip(self.sizes, self._totals, strict=True)):
            order = np.random.default_rng([seed, epoch, index, 1]).permutation(size)
            copies = np.full(size, total // size)
            copies[: total % size] += 1
            # Copies of one prompt are in passes next to each other, beginning with another one from prompt to prompt.
            is_member = (place - np.arange(size)) % self.num_passes < copies
            chosen.append(first + np.sort(order[is_member]))
            first += size
        return np.concatenate(chosen)
