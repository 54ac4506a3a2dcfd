"""How hard unseen prompts look to the policy: a score of each, learned online from hidden states.

A ridge regression predicts the empirical logit `y = log((s + ½)/(f + ½))` of a prompt's s successes and f failures from
the policy's last hidden state at the end of the prompt. Its predictions are a feature for `LogitFilter`, which learns
their slope. A score is made before any outcome of its own prompt, so that this slope says what scores are worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dynamo_lightning.allocation.records import FloatArray
from dynamo_lightning.errors import UserError

DIMENSIONS = 64
"""Directions that larger hidden states are projected on."""

HALF_LIFE = 100.0
"""RL iterations after which what was learned counts half: hidden states change with the policy."""

LARGEST_SCORE = 8.0
"""Bound of the scores, in logits."""

NAMES = ("center", "scale", "means", "covariance", "products")


class HiddenScores:
    """Scores of unseen prompts, and the regression that they come from.

    **Inputs.** Hidden states minus mean over standard deviation of each coordinate in the first batch, then projected
    on `DIMENSIONS` fixed random directions if there are more coordinates than that.

    **Regression.** Inputs and empirical logits count relative to their means within their iteration, so that what all
    prompts have in common, such as a better policy, is left to the filter. Of these the sums `Σ x xᵀ` and `Σ x y` are
    kept, halved every `HALF_LIFE` RL iterations: `(Σ x xᵀ + D diag(Σ x xᵀ)/n) β = Σ x y` with D directions and n
    prompts, a penalty of one pseudo-observation for each standardized direction. An iteration's outcomes are added when
    the next one begins, whatever parts they came in.

    All sums are NumPy's own and the solution is Gaussian elimination, so that all ranks have the same scores.
    """

    def __init__(self) -> None:
        self.iteration = -1
        """RL iteration of the prompts that wait for their outcomes; −1 before any."""
        self._ids = np.empty(0, dtype=np.int64)
        self._inputs = np.empty((0, 0))
        self._scores = np.empty(0)
        self._outcomes = np.empty((0, 2))
        self._num_prompts = 0.0
        self._arrays: dict[str, FloatArray] = {}

    def waiting(self, prompt_ids: Sequence[int], iteration: int) -> FloatArray:
        """Scores of prompts that this iteration has scored already, `[num_prompts]`; NaN for the others."""
        position = {number: row for row, number in enumerate(self._ids.tolist())} if iteration == self.iteration else {}
        rows = [position.get(prompt_id, -1) for prompt_id in prompt_ids]
        return np.append(self._scores, np.nan)[rows]

    def score(self, prompt_ids: Sequence[int], states: FloatArray, iteration: int) -> FloatArray:
        """Scores of further prompts in logits, relative to an average prompt's, `[num_prompts]`.

        Args:
            prompt_ids: Distinct ids of prompts without any outcome, `[num_prompts]`.
            states: Their hidden states, `[num_prompts, hidden_size]`.
            iteration: The coming RL iteration.

        Raises:
            UserError: If a state is not finite, or of another size than earlier ones.
        """
        states = np.asarray(states, dtype=np.float64)
        if not np.isfinite(states).all():
            bad = np.flatnonzero(~np.isfinite(states).all(axis=1))[0]
            raise UserError(
                f"data.estimator.features: the policy's hidden state of prompt id {prompt_ids[bad]} is not finite; "
                "remove 'hidden_state'"
            )
        if iteration > self.iteration:
            self._learn()
            self.iteration = iteration
        if not self._arrays:
            self._begin(states)
        if states.shape[1] != len(self._arrays["center"]):
            raise UserError(
                f"data.estimator.features: hidden states of {states.shape[1]} coordinates, but the checkpoint has "
                f"learned from {len(self._arrays['center'])}: it is another policy's; remove 'hidden_state'"
            )
        inputs = project((states - self._arrays["center"]) / self._arrays["scale"])
        scores = ((inputs - self._arrays["means"]) * self.coefficients()).sum(1)
        scores = np.clip(scores, -LARGEST_SCORE, LARGEST_SCORE)
        self._ids = np.concatenate([self._ids, np.asarray(prompt_ids, dtype=np.int64)])
        self._inputs = np.concatenate([self._inputs.reshape(-1, inputs.shape[1]), inputs])
        self._scores = np.concatenate([self._scores, scores])
        self._outcomes = np.concatenate([self._outcomes, np.zeros((len(scores), 2))])
        return scores

    def observe(self, prompt_ids: Sequence[int], successes: FloatArray, counts: FloatArray, iteration: int) -> None:
        """Add outcomes, in parts or at once; those of prompts that this iteration has not scored are left out."""
        if iteration != self.iteration:
            return
        position = {number: row for row, number in enumerate(self._ids.tolist())}
        for prompt_id, right, count in zip(prompt_ids, successes, counts, strict=True):
            if prompt_id in position:
                self._outcomes[position[prompt_id]] += right, count - right

    def coefficients(self) -> FloatArray:
        """β, `[num_directions]`; 0 before any outcome."""
        covariance, products = self._arrays["covariance"], self._arrays["products"]
        if self._num_prompts == 0:
            return np.zeros_like(products)
        scales = covariance.diagonal() / self._num_prompts
        penalty = np.diag(len(products) * np.maximum(scales, 1e-9))
        return solve(covariance + penalty, products)

    def _begin(self, states: FloatArray) -> None:
        """Fix center and scale of the coordinates."""
        size = min(states.shape[1], DIMENSIONS)
        spread = states.std(axis=0)
        self._arrays = {
            "center": states.mean(axis=0),
            "scale": np.where(spread > 1e-6, spread, 1.0),
            "means": np.zeros(size),
            "covariance": np.zeros((size, size)),
            "products": np.zeros(size),
        }

    def _learn(self) -> None:
        """Add the outcomes that wait."""
        order = np.argsort(self._ids, kind="stable")
        order = order[self._outcomes[order].sum(axis=1) > 0]
        if len(order):
            inputs, (right, wrong) = self._inputs[order], self._outcomes[order].T
            logits = np.log((right + 0.5) / (wrong + 0.5))
            mean = inputs.mean(axis=0)
            x, y = inputs - mean, logits - logits.mean()
            kept = 0.5 ** (1 / HALF_LIFE)
            before, self._num_prompts = kept * self._num_prompts, kept * self._num_prompts + len(order)
            arrays = self._arrays
            arrays["means"] = (before * arrays["means"] + len(order) * mean) / self._num_prompts
            arrays["covariance"] = kept * arrays["covariance"] + np.stack(
                [(x * column).sum(0) for column in x.T[..., None]]
            )
            arrays["products"] = kept * arrays["products"] + (x * y[:, None]).sum(0)
        self._ids, self._inputs = self._ids[:0], self._inputs[:0]
        self._scores, self._outcomes = self._scores[:0], self._outcomes[:0]

    def state_dict(self) -> dict[str, Any]:
        """All that was learned and that waits: tensors and primitives only."""
        arrays = {**self._arrays, "inputs": self._inputs, "scores": self._scores, "outcomes": self._outcomes}
        return {
            "iteration": self.iteration,
            "num_prompts": self._num_prompts,
            "prompt_ids": torch.from_numpy(self._ids.copy()),
            **{name: torch.from_numpy(np.ascontiguousarray(values).copy()) for name, values in arrays.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            UserError: If it is corrupt; nothing is changed then.
        """
        needed = {"iteration", "num_prompts", "prompt_ids", "inputs", "scores", "outcomes"}
        found = {name for name in NAMES if name in state_dict}
        if missing := needed - state_dict.keys() | (set(NAMES) - found if found else set()):
            raise UserError(f"the checkpoint's scores of hidden states are corrupt: {sorted(missing)} are missing")
        arrays = {name: state_dict[name].cpu().numpy().copy() for name in (*found, "inputs", "scores", "outcomes")}
        if not all(np.isfinite(values).all() for values in arrays.values()):
            raise UserError("the checkpoint's scores of hidden states are corrupt: not finite")
        self.iteration, self._num_prompts = int(state_dict["iteration"]), float(state_dict["num_prompts"])
        self._ids = state_dict["prompt_ids"].cpu().numpy().copy()
        self._inputs, self._scores, self._outcomes = (arrays.pop(name) for name in ("inputs", "scores", "outcomes"))
        self._arrays = arrays


def project(inputs: FloatArray) -> FloatArray:
    """Inputs on `DIMENSIONS` fixed random directions, `[num_prompts, num_directions]`; unchanged if they are fewer."""
    size = inputs.shape[1]
    if size <= DIMENSIONS:
        return inputs
    directions = np.random.default_rng(0).choice([-1.0, 1.0], size=(DIMENSIONS, size)) / np.sqrt(size)
    return np.stack([(inputs * direction).sum(axis=1) for direction in directions], axis=1)


def solve(matrix: FloatArray, right: FloatArray) -> FloatArray:
    """Solution of a positive definite system, `[size]`, by Gaussian elimination."""
    matrix, right = matrix.copy(), right.copy()
    for row in range(len(right)):
        factors = matrix[row + 1 :, row] / matrix[row, row]
        matrix[row + 1 :] -= factors[:, None] * matrix[row]
        right[row + 1 :] -= factors * right[row]
    solution = np.zeros_like(right)
    for row in reversed(range(len(right))):
        solution[row] = (right[row] - (matrix[row, row + 1 :] * solution[row + 1 :]).sum()) / matrix[row, row]
    return solution
