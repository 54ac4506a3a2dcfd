"""An entropy budget: tokens whose update lowers the entropy most are damped, just enough to stay within it.

Departures from DynaMO's stabilisation (arXiv 2602.19208), which damps a fixed share of tokens by a fixed amount
whatever the whole step does to the entropy: the level follows from a bound on the entropy that the step may cost, in
nats, and tokens that raise the entropy are left alone. It is the water level of the allocation, for tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.modulation import ModulatedAdvantages, Modulation, entropy_change
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.types import IterationRecord


def damping_level(changes: Tensor, least_change: float) -> float:
    """Level c with `Σ d_t β_t = least_change`, `β_t = min(1, c/|d_t|)` where `d_t < 0`, else 1.

    With the falling changes sorted by size the left side is linear in c between two of them, so c follows exactly.

    Args:
        changes: d, `[num_tokens]`, of all ranks.
        least_change: At most 0.

    Returns:
        c ≥ 0; infinite if the sum is not below `least_change` without any damping.
    """
    assert least_change <= 0
    changes = changes.double()
    falls = changes[changes < 0].neg().sort().values
    allowed = float(changes.clamp(min=0).sum()) - least_change
    if not len(falls) or float(falls.sum()) <= allowed:
        return math.inf
    # Σ min(|d|, c) at c = each fall: those before it whole, it and those after it at c.
    before = torch.cat([falls.new_zeros(1), falls.cumsum(0)[:-1]])
    remaining = torch.arange(len(falls), 0, -1, dtype=falls.dtype, device=falls.device)
    position = int((before + falls * remaining < allowed).sum())
    return max(0.0, float((allowed - before[position]) / remaining[position]))


class EntropyBudget(Modulation):
    """`A_final = A β` with `β_t = min(1, c/|d_t|)` where `d_t < 0`, else 1, and the level c from `k Σ β_t d_t = −B`.

    Here `d_t = ω_t ΔH_t`: ω_t is the token's weight in the loss and ΔH_t the first-order entropy change of its
    update (`entropy_change`). k turns the sum into nats: every `probe_every` iterations the mean token entropy of
    some rollouts of the batch is measured again after the optimizer steps, and k is the slope of measured against
    predicted changes by least squares, a measurement counting half two measurements later. Before the first one β
    is 1; one without any prediction, or that makes k negative, leaves k as it was. Entropies of different batches
    are never compared: they differ by far more than a step changes.

    Within budget β is 1 everywhere. Tokens of zero advantage, the cut into micro-batches and the number of processes
    change nothing, a larger budget never damps more, and multiplying all advantages by a number changes nothing once k
    has followed.

    With `final_entropy` B follows a path by dual ascent, `B ← max(0, B + dual_rate (H − H*))` after every iteration, H*
    going in a straight line from the first iteration's entropy to `final_entropy` at `final_iteration`. Damping cannot
    raise an entropy: below the path B stops at 0.

    The state, k and B, is in the checkpoint.

    Args:
        budget: B, nats of mean token entropy that an iteration, all of its steps, may cost; with a path the first one.
        probe_every: RL iterations from one measurement of k to the next.
        probe_rollouts: Rollouts that are measured, all ranks together; one forward pass.
        final_entropy: End of the path, nats; `null` keeps B.
        final_iteration: RL iteration of the path's end.
        dual_rate: Nats of budget for a nat of distance from the path.

    Raises:
        UserError: If an option is out of range.
    """

    def __init__(
        self,
        budget: float = 0.005,
        probe_every: int = 4,
        probe_rollouts: int = 64,
        final_entropy: float | None = None,
        final_iteration: int = 100,
        dual_rate: float = 0.01,
    ) -> None:
        for name, value, least in (
            ("budget", budget, 0.0),
            ("probe_every", probe_every, 1),
            ("probe_rollouts", probe_rollouts, 1),
            ("final_entropy", final_entropy or 0.0, 0.0),
            ("final_iteration", final_iteration, 1),
            ("dual_rate", dual_rate, 0.0),
        ):
            if not (value >= least and math.isfinite(value)):
                raise UserError(f"model.loss.modulation.{name}={value} must be a finite number of at least {least:g}")
        self.budget = budget
        self.probe_every = probe_every
        self.probe_rollouts = probe_rollouts
        self.final_entropy = final_entropy
        self.final_iteration = final_iteration
        self.dual_rate = dual_rate
        self.current_budget = budget
        """B of the coming iteration, nats."""
        self.gain: float | None = None
        """k; `None` before the first measurement."""
        self._sums = [0.0, 0.0]  # measured times predicted changes, squared predicted changes
        self._first: list[float] = []  # iteration and entropy that the path begins with
        self._predicted = 0.0

    @override
    def num_probe_rollouts(self, iteration: int) -> int:
        return self.probe_rollouts if iteration % self.probe_every == 0 else 0

    @override
    def __call__(self, inputs: ModulationInputs) -> ModulatedAdvantages:
        changes = inputs.loss_weights() * entropy_change(inputs.statistics, inputs.advantages)
        level = math.inf
        everything = inputs.gather(changes)
        if self.gain is not None:
            level = damping_level(everything, -self.current_budget / self.gain)
        factor = torch.ones_like(changes)
        if math.isfinite(level):
            damped = changes < -level
            factor = torch.where(damped, level / changes.abs().clamp(min=1e-300 if level else 1.0), 1.0)
        all_factors = torch.where(everything < -level, level / everything.abs(), 1.0) if level < math.inf else 1.0
        self._predicted = float((everything.double() * all_factors).sum())
        indicators = {
            "mod/beta_budget_mean": factor,
            "mod/frac_damped": (factor < 1).float(),
            "mod/entropy_budget": torch.full_like(factor, self.current_budget),
        }
        if self.gain is not None:
            indicators["mod/entropy_gain"] = torch.full_like(factor, self.gain)
        return ModulatedAdvantages(inputs.advantages * factor, {"beta_budget": factor}, indicators)

    @override
    def after_iteration(self, record: IterationRecord) -> None:
        measured = record.metrics.get("probe/entropy_change")
        if measured is not None and abs(self._predicted) > 1e-12:
            new = measured * self._predicted, self._predicted**2
            self._sums = [0.5**0.5 * old + added for old, added in zip(self._sums, new, strict=True)]
            gain = self._sums[0] / self._sums[1]
            if gain > 0 and math.isfinite(gain):
                self.gain = gain
        if self.final_entropy is not None:
            self._follow_path(record.batch.iteration, record.entropy, self.final_entropy)

    def _follow_path(self, iteration: int, entropy: float, final_entropy: float) -> None:
        if not self._first:
            self._first = [float(iteration), entropy]
        begin, start = self._first
        progress = min(1.0, (iteration - begin) / max(1.0, self.final_iteration - begin))
        wanted = start + progress * (final_entropy - start)
        self.current_budget = max(0.0, self.current_budget + self.dual_rate * (entropy - wanted))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"budget": self.current_budget, "gain": self.gain, "sums": list(self._sums), "first": list(self._first)}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; without a path the budget is the option's.

        Raises:
            UserError: If it is corrupt.
        """
        if missing := {"budget", "gain", "sums", "first"} - state_dict.keys():
            raise UserError(f"the checkpoint's entropy budget is corrupt: {sorted(missing)} are missing")
        if self.final_entropy is not None:
            self.current_budget = float(state_dict["budget"])
        self.gain = None if state_dict["gain"] is None else float(state_dict["gain"])
        self._sums, self._first = [float(x) for x in state_dict["sums"]], [float(x) for x in state_dict["first"]]
