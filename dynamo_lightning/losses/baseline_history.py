"""Rewards of earlier iterations, weighted like those of a baseline: the prior of `OptimalBaseline`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynamo_lightning.allocation.records import FloatArray, IntArray
from dynamo_lightning.allocation.table import PromptTable
from dynamo_lightning.errors import UserError

COLUMNS = ("weighted_rewards", "weights", "rollouts")
"""Σ w r, Σ w and the number of rollouts, discounted: kept for each prompt and for all together."""


class BaselineHistory:
    """Discounted sums of weighted rewards, for each prompt ever visited and for all of them together.

    A sum halves every `half_life` RL iterations. The prior of a prompt with sums (R, W, n) in a population with sums
    (R₀, W₀, n₀) is the mean of its own rollouts and of `population_rollouts` κ imagined ones of the population,

        m = (R + κ w̄ R₀/W₀) / (W + κ w̄),   with weight v = W + κ w̄,   w̄ = (W + κ W₀/n₀) / (n + κ),

    so that the population's rollouts count like rollouts of the prompt. An unseen prompt has the population's mean with
    κ rollouts; before any outcome v is 0, no prior. Takes 64 bytes per visited prompt.

    Args:
        half_life: RL iterations after which a reward counts half.
        population_rollouts: κ, rollouts that the population counts as.
    """

    def __init__(self, half_life: float, population_rollouts: float) -> None:
        self.half_life = half_life
        self.population_rollouts = population_rollouts
        self.iteration = -1
        """Latest iteration that was observed; −1 before any."""
        self._population = np.zeros(3)
        self._table = PromptTable(len(COLUMNS))

    def __len__(self) -> int:
        """Number of prompts visited so far."""
        return len(self._table)

    def prior(self, prompt_ids: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """Means m and weights v of each rollout's prompt, `[num_rollouts]` each, float64.

        Args:
            prompt_ids: Prompt of each rollout, `[num_rollouts]`, int64.
            iteration: The running iteration.
        """
        ids, inverse = np.unique(prompt_ids.numpy(), return_inverse=True)
        rows = self._table.gather(ids)
        rewards, weights, rollouts = rows.state * np.where(rows.known, self._discount(iteration - rows.last_visit), 0.0)
        total_rewards, total_weights, total_rollouts = self._population
        kappa = self.population_rollouts if total_weights > 0 else 0.0
        mean, weight = (
            (total_rewards / total_weights, total_weights / total_rollouts) if total_weights > 0 else (0.0, 0.0)
        )
        # Without own rollouts and without a population there is no prior: 0/0 is made 0.
        per_rollout = (weights + kappa * weight) / np.maximum(rollouts + kappa, 1e-300)
        strength = weights + kappa * per_rollout
        means = (rewards + kappa * per_rollout * mean) / np.maximum(strength, 1e-300)
        return torch.from_numpy(means[inverse]), torch.from_numpy(strength[inverse])

    def prior_rollouts(self, prompt_ids: Tensor, iteration: int) -> Tensor:
        """Rollouts n + κ that the prior of each rollout's prompt counts as, `[num_rollouts]`, float64; 0 without one.

        Args:
            prompt_ids: Prompt of each rollout, `[num_rollouts]`, int64.
            iteration: The running iteration.
        """
        ids, inverse = np.unique(prompt_ids.numpy(), return_inverse=True)
        rows = self._table.gather(ids)
        own = rows.state[2] * np.where(rows.known, self._discount(iteration - rows.last_visit), 0.0)
        kappa = self.population_rollouts if self._population[1] > 0 else 0.0
        return torch.from_numpy((own + kappa)[inverse])

    def observe(self, rewards: Tensor, weights: Tensor, prompt_ids: Tensor, iteration: int) -> None:
        """Add the rollouts of an iteration: the same ones on every rank, once; a repeated call changes nothing.

        Args:
            rewards: `[num_rollouts]`, float64.
            weights: w, `[num_rollouts]`, float64.
            prompt_ids: `[num_rollouts]`, int64.
            iteration: Of these rollouts.
        """
        if iteration <= self.iteration or not len(rewards):
            return
        ids, inverse = np.unique(prompt_ids.numpy(), return_inverse=True)
        r, w = rewards.numpy(), weights.numpy()
        new = np.stack([np.bincount(inverse, values, len(ids)) for values in (w * r, w, np.ones_like(w))])
        rows = self._table.gather(ids)
        rows.state = rows.state * np.where(rows.known, self._discount(iteration - rows.last_visit), 0.0) + new
        rows.last_visit = np.full(len(ids), iteration)
        self._table.write(rows)
        elapsed = iteration - self.iteration if self.iteration >= 0 else 0
        self._population = self._population * float(self._discount(np.array(elapsed))) + new.sum(1)
        self.iteration = iteration

    def _discount(self, elapsed: IntArray) -> FloatArray:
        """Share of a sum that is left after so many iterations."""
        return np.exp2(-np.maximum(elapsed, 0) / self.half_life)

    def state_dict(self) -> dict[str, Any]:
        """All sums: tensors and primitives only."""
        ids, last_visit, state, _ = self._table.sorted_arrays()
        return {
            "iteration": self.iteration,
            "population": torch.from_numpy(self._population.copy()),
            "prompt_ids": torch.from_numpy(ids),
            "last_visit": torch.from_numpy(last_visit),
            **{name: torch.from_numpy(column.copy()) for name, column in zip(COLUMNS, state, strict=True)},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace all sums by saved ones.

        Raises:
            UserError: If they are corrupt; the history is then unchanged.
        """
        names = ("prompt_ids", "last_visit", *COLUMNS)
        if missing := {"iteration", "population", *names} - state_dict.keys():
            raise UserError(f"the checkpoint's history of baselines is corrupt: {sorted(missing)} are missing")
        values = {name: state_dict[name].cpu().numpy() for name in (*names, "population")}
        ids = values["prompt_ids"]
        if len({len(values[name]) for name in names}) > 1 or values["population"].shape != (len(COLUMNS),):
            raise UserError("the checkpoint's history of baselines is corrupt: its columns differ in length")
        if not all(np.isfinite(column).all() for column in values.values()) or (ids[1:] <= ids[:-1]).any():
            raise UserError("the checkpoint's history of baselines is corrupt: not finite, or ids that are not sorted")
        table = PromptTable(len(COLUMNS))
        rows = table.gather(ids)
        rows.last_visit, rows.state = values["last_visit"], np.stack([values[name] for name in COLUMNS])
        table.write(rows)
        self._table, self._population = table, values["population"].copy()
        self.iteration = int(state_dict["iteration"])
