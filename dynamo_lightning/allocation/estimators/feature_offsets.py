"""Offsets of prompts' logits that follow from features, and their coefficients' update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dynamo_lightning.allocation import prompt_features
from dynamo_lightning.allocation.estimators import population as grid
from dynamo_lightning.allocation.hidden_scores import LARGEST_SCORE
from dynamo_lightning.allocation.records import BoolArray, FloatArray, IntArray
from dynamo_lightning.errors import UserError

FEATURES = (*prompt_features.FEATURES, prompt_features.HIDDEN_STATE)
"""Names of the features."""

LEVELS = 256
"""Values of a packed length or score, 0 being an unknown one."""

RESOLUTION = 16
"""Levels per nat of a log-length: they are 6 % apart, and reach 8 million tokens. Per logit of a score."""

PRIOR_VARIANCE = 1.0
"""Prior variance of each coefficient, in logits²: of one standard deviation of the log-length, or of one data set."""

LARGEST_STEP = 1.0
"""Largest change of a coefficient in one iteration, in logits."""


def checked_names(features: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of features that an estimator was given.

    Raises:
        UserError: If one is unknown or named twice, or two are in each other's place.
    """
    names = [features] if isinstance(features, str) else list(features)
    if len(set(names)) < len(names) or not set(names) <= set(FEATURES):
        raise UserError(f"data.estimator.features={names} must be distinct names among {list(FEATURES)}")
    if {"length", prompt_features.HIDDEN_STATE} <= set(names):
        raise UserError(
            f"data.estimator.features={names}: a hidden state knows the prompt's length already; leave one of "
            "'length' and 'hidden_state' out"
        )
    return tuple(names)


def packed(features: FloatArray, names: Sequence[str]) -> FloatArray:
    """Return each prompt's features as one integer below 2²⁴, exact in float32, `[num_prompts]`; 0 is unknown.

    Args:
        features: `[num_prompts, num_features]`: `length` in nats, `dataset` as a code from 1 to 65,535, `hidden_state`
            as a score in logits, NaN where it is unknown; it takes the place of a length.
        names: The features' names, `[num_features]`.
    """
    values = dict(zip(names, features.T, strict=True))
    code = np.zeros(len(features))
    if "length" in values:
        code += np.clip(1 + np.rint(values["length"] * RESOLUTION), 1, LEVELS - 1)
    if prompt_features.HIDDEN_STATE in values:
        score = values[prompt_features.HIDDEN_STATE] + LARGEST_SCORE
        level = np.clip(1 + np.rint(np.where(np.isnan(score), 0.0, score) * RESOLUTION), 1, LEVELS - 1)
        code += np.where(np.isnan(score), 0.0, level)
    if "dataset" in values:
        code += LEVELS * values["dataset"]
    return code


class FeatureOffsets(NamedTuple):
    """Coefficients β of the features, `o_i = β · x_i`, as of the last iteration that was closed.

    `x` is the log-length minus its mean over its standard deviation, both over the sampled prompts, and for data sets
    an indicator of each. The data sets' coefficients have mean zero over the sampled prompts, so that the offset of an
    unknown length or of a new data set, which is zero, is that of an average prompt.
    """

    mean: float
    """Mean log-length, in nats."""
    scale: float
    """Standard deviation of the log-length, in nats."""
    slope: float
    """Coefficient of the standardized log-length, in logits."""
    codes: IntArray
    """Data sets seen so far, ascending, `[num_datasets]`."""
    intercepts: FloatArray
    """Their coefficients, in logits, `[num_datasets]`."""

    @classmethod
    def initial(cls) -> FeatureOffsets:
        """Return no offsets."""
        return cls(0.0, 1.0, 0.0, np.empty(0, dtype=np.int64), np.empty(0))

    def pack(self) -> FloatArray:
        """Return all numbers in one vector, `[3 + 2 num_datasets]`."""
        return np.concatenate([[self.mean, self.scale, self.slope], self.codes, self.intercepts])

    @classmethod
    def unpack(cls, vector: FloatArray) -> FeatureOffsets:
        """Return the record of a packed vector.

        Raises:
            UserError: If it is none.
        """
        num_datasets = (len(vector) - 3) // 2
        if num_datasets < 0 or len(vector) != 3 + 2 * num_datasets or not vector[1] > 0:
            raise UserError(f"'shared' holds {len(vector)} numbers about features that do not belong together")
        codes = vector[3 : 3 + num_datasets].astype(np.int64)
        return cls(float(vector[0]), float(vector[1]), float(vector[2]), codes, vector[3 + num_datasets :])

    def of(self, code: FloatArray) -> FloatArray:
        """Return the offsets of prompts by their packed features, in logits, `[num_prompts]`."""
        x = _log_length(code)
        x = np.where(np.isnan(x), 0.0, (x - self.mean) / self.scale)
        column, known = self._columns(code)
        intercepts = np.append(self.intercepts, 0.0)[np.where(known, column, len(self.codes))]
        return self.slope * x + intercepts

    def standardized(self, code: FloatArray) -> FeatureOffsets:
        """Return the same slope per nat, for mean and standard deviation of these prompts; new data sets at 0."""
        lengths = _log_length(code)
        lengths = lengths[~np.isnan(lengths)]
        mean, scale = (float(lengths.mean()), float(lengths.std())) if len(lengths) else (self.mean, self.scale)
        scale = scale if scale > 1e-3 else self.scale
        datasets = np.unique(code.astype(np.int64) // LEVELS)
        codes = np.union1d(self.codes, datasets[datasets > 0])
        intercepts = np.zeros(len(codes))
        intercepts[np.searchsorted(codes, self.codes)] = self.intercepts
        return FeatureOffsets(mean, scale, self.slope * scale / self.scale, codes, intercepts)

    def updated(self, code: FloatArray, slope: FloatArray, information: FloatArray) -> FeatureOffsets:
        """Return coefficients after one step of Newton's method for the most probable ones.

        Args:
            code: Packed features of the sampled prompts, `[num_prompts]`.
            slope: Derivative of each prompt's log marginal likelihood by its offset, `[num_prompts]`.
            information: Minus the second derivative, at least 0, `[num_prompts]`.
        """
        x = _log_length(code)
        x = np.where(np.isnan(x), 0.0, (x - self.mean) / self.scale)
        column, known = self._columns(code)

        def by_dataset(values: FloatArray) -> FloatArray:
            sums: FloatArray = np.bincount(column[known], values[known], len(self.codes)).astype(np.float64)
            return sums

        # All sums are NumPy's own, not BLAS's, so all ranks agree. Data sets exclude each other: an arrowhead matrix.
        gradient = (slope * x).sum() - self.slope / PRIOR_VARIANCE
        own = (information * x * x).sum() + 1 / PRIOR_VARIANCE
        gradients = by_dataset(slope) - self.intercepts / PRIOR_VARIANCE
        owns, cross = by_dataset(information) + 1 / PRIOR_VARIANCE, by_dataset(information * x)
        step = (gradient - (cross * gradients / owns).sum()) / (own - (cross**2 / owns).sum())
        steps = (gradients - cross * step) / owns
        intercepts = self.intercepts + np.clip(steps, -LARGEST_STEP, LARGEST_STEP)
        share = by_dataset(np.ones(len(code)))
        if len(share) and share.sum():
            intercepts = intercepts - (share * intercepts).sum() / share.sum()
        return self._replace(
            slope=self.slope + float(np.clip(step, -LARGEST_STEP, LARGEST_STEP)), intercepts=intercepts
        )

    def _columns(self, code: FloatArray) -> tuple[IntArray, BoolArray]:
        """Return each prompt's position in `codes`, and whether its data set is there."""
        datasets = code.astype(np.int64) // LEVELS
        column = np.searchsorted(self.codes, datasets)
        known = np.append(self.codes, -1)[column] == datasets
        return column, known


def _log_length(code: FloatArray) -> FloatArray:
    """Return the log-lengths in packed features, in nats, `[num_prompts]`; NaN where unknown."""
    level = code % LEVELS
    return np.where(level > 0, (level - 1) / RESOLUTION, np.nan)


def offset_derivatives(
    state: FloatArray, kept: FloatArray, offsets: FloatArray, weights: FloatArray, thetas: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return slope and information of each prompt's log marginal likelihood by its offset, `[num_prompts]` each.

    With `ℓ(θ)` the log-likelihood at θ + offset, the slope is `E ℓ'` over the prompt's posterior and the information
    `E(−ℓ'') − Var ℓ'` (Louis, 1982), which may be negative where the population has several modes: then it is 0, for
    an ascent that is too short instead of one that goes astray.

    Args:
        state: Successes, failures, and M summed over each, `[4, num_prompts]`.
        kept: Share of the information in them that is left, `[num_prompts]`.
        offsets: In logits, `[num_prompts]`.
        weights: The population, `[num_points]`.
        thetas: Its grid, `[num_points]`.
    """
    successes, failures = kept * state[:2]
    common = state[2:4] / np.maximum(state[:2], 1e-30) + offsets
    right = np.exp(-np.clip(common[0], -60, 60))[:, None] * np.exp(-thetas)
    wrong = np.exp(np.clip(common[1], -60, 60))[:, None] * np.exp(thetas)
    log_likelihood = -successes[:, None] * np.log1p(right) - failures[:, None] * np.log1p(wrong)
    chances = grid.posterior(weights, log_likelihood)
    wrong_rate, right_rate = right / (1 + right), wrong / (1 + wrong)  # 1 − p at successes' M, p at failures' M
    first = successes[:, None] * wrong_rate - failures[:, None] * right_rate
    second = successes[:, None] * wrong_rate * (1 - wrong_rate) + failures[:, None] * right_rate * (1 - right_rate)
    slope = np.einsum("ng,ng->n", chances, first)
    information = np.einsum("ng,ng->n", chances, second - first**2) + slope**2
    return slope, np.maximum(information, 0.0)
