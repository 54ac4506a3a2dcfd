"""Response lengths of prompts: their mean, which does not depend on the order, and the check of saved ones."""

from __future__ import annotations

import numpy as np

from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.errors import UserError

LENGTH_COLUMNS = ("response_tokens", "responses")

LENGTH_UNIT = 2**20
"""Fractions of a token that the mean length is counted in: whole numbers, whose sum does not depend on the order."""


class MeanLength:
    """The mean over prompts of their expected response lengths, kept up to date as prompts change."""

    def __init__(self) -> None:
        self._total = 0
        self._prompts = 0

    @property
    def value(self) -> float:
        """The mean in tokens; NaN without any prompt that has a length."""
        return self._total / self._prompts / LENGTH_UNIT if self._prompts else float("nan")

    def replace(self, before: FloatArray, after: FloatArray) -> None:
        """Exchange the tokens and responses of some prompts, `[2, num_prompts]`."""
        for (tokens, responses), sign in ((before, -1), (after, 1)):
            has_any = responses > 0
            lengths = np.rint(tokens[has_any] / responses[has_any] * LENGTH_UNIT).astype(np.int64)
            self._total += sign * int(lengths.sum())
            self._prompts += sign * int(has_any.sum())


def check_lengths(lengths: FloatArray) -> None:
    """Raise a ValueError if there are fewer tokens than responses, each of which has at least one."""
    tokens, responses = lengths
    if not ((responses >= 0) & (tokens >= responses)).all():
        row = np.flatnonzero(~((responses >= 0) & (tokens >= responses)))[0]
        raise UserError(f"{tokens[row]:g} 'response_tokens' in {responses[row]:g} 'responses'")
