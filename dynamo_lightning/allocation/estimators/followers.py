"""Which share of the prompts follows the drift that `LogitFilter` takes to be common, learned from their outcomes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.errors import UserError

SHARES = np.linspace(0.0, 1.0, 11)
"""Candidate shares, `[num_shares]`, equally likely before any outcome."""

EASY = 0.75
"""Success rate from which a prompt counts as easy: easy prompts have a share of their own."""

HALF_LIFE = 64.0
"""RL iterations after which what an outcome says of the shares counts half."""

PACKED_LENGTH = 2 * len(SHARES)
"""Numbers in a packed `Followers`."""


class Followers(NamedTuple):
    """The shares of prompts that follow the common drift, one for easy prompts and one for all others.

    A prompt with earlier outcomes either follows M, `logit p = θ + M`, or is still where it was, `logit p = θ + M̄`, M̄
    the mean of M over its outcomes. With L_f and L_s, the probabilities of its new outcomes in the two cases, a share φ
    has the likelihood `Π_i (φ L_f,i + (1 − φ) L_s,i)` over the prompts of an iteration. Its posterior mean is used.
    """

    log_likelihood: FloatArray
    """That of each candidate, older iterations discounted, `[2, num_shares]`; row 1 is that of easy prompts."""

    @classmethod
    def initial(cls) -> Followers:
        """Return what is known before any outcome: nothing."""
        return cls(np.zeros((2, len(SHARES))))

    def pack(self) -> FloatArray:
        """Return all numbers in one vector."""
        return self.log_likelihood.ravel()

    @classmethod
    def unpack(cls, vector: FloatArray) -> Followers:
        """Return the record of a packed vector.

        Raises:
            UserError: If its length is wrong, or a likelihood is above 1.
        """
        if len(vector) != PACKED_LENGTH or (vector > 0).any():
            raise UserError(f"'shared' has {len(vector)} numbers about followers, not {PACKED_LENGTH} of at most 0")
        return cls(vector.reshape(2, len(SHARES)))

    @property
    def shares(self) -> FloatArray:
        """Expected shares, of other prompts and of easy ones, `[2]`."""
        chance = np.exp(self.log_likelihood - self.log_likelihood.max(axis=1, keepdims=True))
        return (chance * SHARES).sum(axis=1) / chance.sum(axis=1)

    def of(self, success_rate: FloatArray) -> FloatArray:
        """Return the share that holds for each prompt, `[num_prompts]`.

        Args:
            success_rate: If the prompt has stayed where it was, `[num_prompts]`.
        """
        return self.shares[(success_rate >= EASY).astype(np.int64)]

    def updated(self, success_rate: FloatArray, followed: FloatArray, stayed: FloatArray, gap: int) -> Followers:
        """Return the record after an iteration.

        Args:
            success_rate: Of its prompts if they had stayed where they were, `[num_prompts]`.
            followed: L_f, `[num_prompts]`.
            stayed: L_s, `[num_prompts]`.
            gap: RL iterations since the last one.
        """
        likelihood = self.log_likelihood * 0.5 ** (gap / HALF_LIFE)
        mixed = np.log(np.maximum(followed[:, None] * SHARES + stayed[:, None] * (1 - SHARES), 1e-300))
        easy = success_rate >= EASY
        return Followers(likelihood + np.stack([mixed[~easy].sum(axis=0), mixed[easy].sum(axis=0)]))


def mean_drift(state: FloatArray, common: float) -> FloatArray:
    """Return M̄, the mean of M over a prompt's outcomes, `[num_prompts]`; `common` for a prompt without any.

    Args:
        state: Of `LogitFilter`, `[num_columns, num_prompts]`: outcomes that wait count at `common`.
        common: M of the running iteration.
    """
    counts, new = state[0] + state[1], state[4] + state[5]
    total = (state[2] + state[3]) + new * common
    return np.where(counts + new > 0, total / np.maximum(counts + new, 1e-30), common)
