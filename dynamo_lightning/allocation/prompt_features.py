"""Features of prompts for estimators that ask for some: what is known of a prompt before any outcome."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.errors import UserError
from dynamo_lightning.types import Prompt

NUM_CODES = 2**16 - 1
"""Codes of data sets, 1 to this. Two of ten names have the same one in 1 of 1,500 cases, and share a coefficient."""


def log_length(prompt: Prompt) -> float:
    """Return the logarithm of the prompt's number of tokens, in nats."""
    return math.log(len(prompt.token_ids)) if prompt.token_ids else math.nan


def dataset_code(prompt: Prompt) -> float:
    """Return a number for the data set's name, the same in every run whatever other data sets there are."""
    digest = hashlib.blake2b(prompt.source.encode(), digest_size=8).digest()
    return float(1 + int.from_bytes(digest, "big") % NUM_CODES) if prompt.source else math.nan


HIDDEN_STATE = "hidden_state"
"""The feature that the policy is asked for: a score made of its hidden state, see `hidden_scores`."""

FEATURES: dict[str, tuple[Callable[[Prompt], float], str]] = {
    "length": (log_length, "has no tokens"),
    "dataset": (dataset_code, "has no name of a data set (`source`)"),
}
"""Feature names: the function, and what is wrong with a prompt for which it is not a number."""


def prompt_features(prompts: Sequence[Prompt], names: Sequence[str], scores: FloatArray | None = None) -> FloatArray:
    """Return the features of prompts, `[num_prompts, num_features]`.

    Args:
        prompts: `[num_prompts]`.
        names: The features, keys of `FEATURES`, or `hidden_state`.
        scores: Of hidden states, in logits, `[num_prompts]`; NaN leaves what is remembered of a prompt.

    Raises:
        UserError: If a prompt lacks a feature.
    """
    features = np.empty((len(prompts), len(names)))
    for column, name in enumerate(names):
        if name == HIDDEN_STATE:
            features[:, column] = np.nan if scores is None else scores
            continue
        function, fault = FEATURES[name]
        features[:, column] = [function(prompt) for prompt in prompts]
        for row in np.flatnonzero(~np.isfinite(features[:, column])).tolist():
            prompt = prompts[row]
            raise UserError(
                f"data.estimator.features={list(names)}: prompt id {prompt.prompt_id} {prompt.place} {fault}; "
                f"remove {name!r} from the features, or the prompt from the data set"
            )
    return features
