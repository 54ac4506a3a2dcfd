"""A distribution of prompts over logits: a grid, its refit by smoothed EM, and posteriors on it."""

from __future__ import annotations

import numpy as np

from dynamo_lightning.allocation.records import FloatArray

GRID = np.linspace(-8.0, 8.0, 65)
"""Logits of the grid relative to its origin, `[num_points]`: success rates from 0.0003 to 0.9997."""

SPACING = float(GRID[1] - GRID[0])
"""Distance between two points of the grid, in logits."""

UNIFORM_RATE = 1 / (2 + np.exp(GRID) + np.exp(-GRID))
"""Density of a logit whose success rate is uniform on (0, 1), that is `p(1 − p)`, normalized below."""
UNIFORM_RATE = UNIFORM_RATE / UNIFORM_RATE.sum()


def posterior(weights: FloatArray, log_likelihood: FloatArray) -> FloatArray:
    """Return each prompt's distribution on the grid, `[num_prompts, num_points]`.

    Args:
        weights: The population, `[num_points]`, positive.
        log_likelihood: Of each prompt's outcomes at each point, `[num_prompts, num_points]`.
    """
    scaled = weights * np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    return scaled / scaled.sum(axis=1, keepdims=True)


def refit(
    weights: FloatArray, log_likelihood: FloatArray, steps: int, prior_prompts: float, smoothing: float
) -> FloatArray:
    """Return the population after `steps` of smoothed EM (Silverman et al., 1990, "EMS") from `weights`.

    A step counts every prompt at each point by its posterior probability there, spreads the counts over neighboring
    points, adds `prior_prompts` prompts whose success rate is uniform, and normalizes. Without spreading, EM would
    end in a few isolated points (the nonparametric maximum likelihood; Laird, 1978), which overstates what is known.

    Args:
        weights: The population so far, `[num_points]`.
        log_likelihood: Of the sampled prompts, `[num_prompts, num_points]`.
        steps: EM steps.
        prior_prompts: Weight of the uniform success rate, in prompts.
        smoothing: Share of a point's count that goes to its two neighbors, in [0, 1).
    """
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    for _ in range(steps):
        # einsum instead of BLAS: its sums do not depend on the number of threads, so all ranks agree.
        evidence = np.einsum("ng,g->n", likelihood, weights)
        counts = weights * np.einsum("ng,n->g", likelihood, 1 / evidence)
        padded = np.concatenate([counts[:1], counts, counts[-1:]])
        counts = (1 - smoothing) * counts + smoothing / 2 * (padded[:-2] + padded[2:])
        counts = counts + prior_prompts * UNIFORM_RATE
        weights = counts / counts.sum()
    return weights


def shifted(weights: FloatArray, points: int) -> FloatArray:
    """Return the population on a grid whose origin lies `points` further right; what falls off an end joins it."""
    if points == 0:
        return weights
    result = np.zeros_like(weights)
    target = np.clip(np.arange(len(weights)) - points, 0, len(weights) - 1)
    np.add.at(result, target, weights)
    result += 1e-12  # no point may be impossible: EM could never bring it back
    return result / result.sum()
