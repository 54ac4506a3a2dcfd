"""A filter on logits: one drift that all prompts share, and a population of any shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dynamo_lightning.allocation.estimators import population as grid
from dynamo_lightning.allocation.estimators.feature_offsets import (
    LEVELS,
    FeatureOffsets,
    checked_names,
    offset_derivatives,
    packed,
)
from dynamo_lightning.allocation.estimators.followers import PACKED_LENGTH, Followers, mean_drift
from dynamo_lightning.allocation.estimators.pooled import PooledEstimator
from dynamo_lightning.allocation.estimators.shared_logits import (
    FEATURE_COLUMN,
    PATH_LENGTH,
    SHARED_LENGTH,
    Shared,
)
from dynamo_lightning.allocation.prompt_features import HIDDEN_STATE
from dynamo_lightning.allocation.records import BoolArray, FloatArray
from dynamo_lightning.errors import UserError

NEWTON_STEPS = 6
"""Steps of Newton's method for M; its objective is close to a parabola."""

NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()
"""Gauss-Hermite quadrature for the normal step of M that is still to come."""


class LogitFilter(PooledEstimator):
    """Filter on logits, `logit p_i = θ_i + M`: for policies that improve, and pools of any shape.

    Training moves all prompts at once, which counts kept per prompt see one visit late. Here M, one number, follows
    that motion, estimated from all prompts of an iteration; θ_i is what remains of a prompt, with a population of any
    shape as its prior.

    **Prompt.** The likelihood of θ from earlier outcomes is kept as `s log σ(θ + M_s) + f log σ(−θ − M_f)`: s
    successes and f failures, and M_s and M_f, the means of M over them. It is exact while M stands still, and in both
    tails always; in between, M's spread within the prompt's memory enters to second order. θ walks by `prompt_drift`,
    so before a visit Δ iterations later, s and f shrink by `1/(1 + prompt_drift² Δ I)`, `I = n p̂(1 − p̂)` their
    information, `p̂ = (s + 1/2)/(n + 1)`: as the variance 1/I of a normal likelihood grows. Prompts that are always
    wrong hold little information, and keep it long.

    **Common drift.** After each iteration, M moves by the step that is most probable given all its outcomes
    (Newton's method on the sum of the prompts' log marginal likelihoods), with the prior
    `N(trend, common_drift²)` per iteration; the trend is the mean step of the last 15 iterations. Outcomes count at M
    of their own iteration. M is then taken as known: an error in it recurs in the θ learned at that time.

    **Population.** A distribution over a grid of logits from −8 to 8 around −M, spacing 1/4, refitted in each
    iteration by smoothed EM to a fixed random sample of 2,048 visited prompts. So its cost does not depend on the
    number of prompts ever visited; up to 2,048, the fit uses all. An unseen prompt has this population.

    **Estimate.** `E[p]` and `E[p(1 − p)]` over the prompt's posterior on the grid, with M at its last value plus the
    trend, ± `common_drift`. Within an iteration, as after a pilot, a prompt's own new outcomes count, at that M; M and
    the population stay as they were when the iteration began.

    **Features.** With `features`, `logit p_i = θ_i + β · x_i + M`: the population is that of what the features leave
    unexplained. An unseen prompt then has the population shifted by β · x_i, and a visited one has that as its prior.
    After each iteration β takes one step of Newton's method on the sum of the log marginal likelihoods of all outcomes
    of the population's sample, with the prior N(0, 1) of each coefficient: it forgets as fast as these prompts do.

    **Followers.** Not all prompts follow M: while hard ones improve, easy ones may be at their ceiling, and M alone
    calls them solved. With `all_follow: false` a prompt follows with chance φ, learned from how prompts do when they
    come back (`Followers`), and is else where its outcomes were: the estimate is the mixture. M itself, the
    likelihoods and the population are unchanged.

    Sources: assumed-density filtering and quadrature as in dynamic generalized linear models (West, Harrison and
    Migon, 1985); the nonparametric population as in Laird (1978), its smoothing as in Silverman et al. (1990).

    Args:
        common_drift: Standard deviation of M's step around the trend, in logits per RL iteration; variances add up
            over iterations.
        prompt_drift: Standard deviation of a prompt's own step, in logits per RL iteration. The default makes the
            information of 16 rollouts at p = 1/2 count half after 100 iterations.
        features: Features that say something of unseen prompts: `length`, the logarithm of the prompt's tokens,
            `dataset`, the data set that it is from, and in place of `length` `hidden_state`, a score made of what the
            policy makes of the prompt, which takes a forward pass over it. None by default.
        all_follow: Take all prompts to follow M; if not, learn which share does.

    Raises:
        UserError: If a drift is not positive and finite, or a feature is unknown or named twice.
    """

    columns: tuple[str, ...] = (
        "successes",
        "failures",
        "success_drift",
        "failure_drift",
        "new_successes",
        "new_failures",
    )
    dtype = np.float32

    prior_prompts: ClassVar[float] = 2.0
    """Prompts with a uniform success rate that the population's fit adds to the visited ones."""

    em_steps: ClassVar[int] = 20
    """EM steps per iteration, from the last population."""

    smoothing: ClassVar[float] = 0.2
    """Share of a grid point's count that an EM step spreads to its neighbors."""

    def __init__(
        self,
        common_drift: float = 0.15,
        prompt_drift: float = 0.05,
        features: Sequence[str] = (),
        all_follow: bool = True,
    ) -> None:
        for name, value in (("common_drift", common_drift), ("prompt_drift", prompt_drift)):
            if not (value > 0 and math.isfinite(value)):
                raise UserError(
                    f"data.estimator.init_args.{name}={value} must be a positive, finite number of logits per "
                    f"RL iteration; data.estimator=BetaPosterior with half_life=.inf assumes no drift at all"
                )
        self.common_drift = float(common_drift)
        self.prompt_drift = float(prompt_drift)
        self.features = checked_names(features)
        self.all_follow = all_follow
        if self.features:
            self.columns = (*type(self).columns, "features")

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments; `features` and `all_follow` only where they are not the defaults."""
        features: dict[str, Any] = {"features": list(self.features)} if self.features else {}
        follow: dict[str, Any] = {} if self.all_follow else {"all_follow": False}
        return {"common_drift": self.common_drift, "prompt_drift": self.prompt_drift, **features, **follow}

    def with_features(self, state: FloatArray, features: FloatArray) -> FloatArray:
        """Return states with these features, `[num_prompts, num_features]`, in place of the remembered ones."""
        if not self.features:
            return state
        code = packed(features, self.features)
        if HIDDEN_STATE in self.features:  # NaN: the score that the prompt had when it was unseen stays
            unknown = np.isnan(features[:, self.features.index(HIDDEN_STATE)])
            code = np.where(unknown, code + state[FEATURE_COLUMN] % LEVELS, code)
        return np.concatenate([state[:FEATURE_COLUMN], code[None]])

    def adapted(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a checkpoint with other features without them: those of its prompts are unknown until visited.

        Shares of followers start anew where the checkpoint has none, and are dropped where they are not asked for.
        """
        columns, shared = dict(state_dict["columns"]), state_dict.get("shared")
        saved_length = 0 if state_dict["settings"].get("all_follow", True) else PACKED_LENGTH
        if saved_length != self._num_followers and isinstance(shared, Tensor):
            followers = torch.from_numpy(self._initial_followers()).to(shared)
            shared = torch.cat([shared[:SHARED_LENGTH], followers, shared[SHARED_LENGTH + saved_length :]])
            state_dict = {**state_dict, "shared": shared}
        if state_dict["settings"].get("features", []) == list(self.features) or "successes" not in columns:
            return state_dict
        columns.pop("features", None)
        if self.features:
            columns["features"] = torch.zeros_like(columns["successes"])
        if isinstance(shared, Tensor):
            length = SHARED_LENGTH + self._num_followers
            initial = torch.from_numpy(self.initial_shared()[length:])
            shared = torch.cat([shared[:length], initial.to(shared)])
        return {**state_dict, "columns": columns, "shared": shared}

    def check_state(self, state: FloatArray) -> None:
        """Raise a UserError if a count is negative, or a drift is recorded without outcomes."""
        for column, values in zip(self.columns, state, strict=True):
            if column.endswith(("successes", "failures")) and (values < 0).any():
                raise UserError(f"{column!r} has the negative value {values.min()}")
        if ((state[:2] == 0) & (state[2:4] != 0)).any():
            raise UserError("'success_drift' or 'failure_drift' is not 0 where there are no outcomes")
        code = state[FEATURE_COLUMN:]
        if ((code < 0) | (code >= 2**24) | (code != np.rint(code))).any():
            raise UserError("'features' has numbers that are no packed features")

    def converted_columns(self, estimator: str, columns: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return columns made of the counts of `BetaPosterior` or `PaperBernoulli`, as if made at M = 0."""
        if estimator == "BetaPosterior" and {"successes", "failures"} <= columns.keys():
            successes, failures = columns["successes"], columns["failures"]
        elif estimator == "PaperBernoulli" and {"successes", "counts"} <= columns.keys():
            successes, failures = columns["successes"], columns["counts"] - columns["successes"]
        else:
            return None
        nothing = torch.zeros_like(successes, dtype=torch.float32)
        converted = dict.fromkeys(self.columns, nothing)
        return {**converted, "successes": successes.to(torch.float32), "failures": failures.to(torch.float32)}

    # --- one prompt ---------------------------------------------------------------------------------------------------

    def _kept(self, state: FloatArray, elapsed: FloatArray) -> FloatArray:
        """Return the share of the information in old outcomes that is left after `elapsed`, `[num_prompts]`."""
        successes, failures = state[:2]
        counts = successes + failures
        rate = (successes + 0.5) / (counts + 1)
        return 1 / (1 + self.prompt_drift**2 * elapsed * counts * rate * (1 - rate))

    def update(self, state: FloatArray, successes: FloatArray, counts: FloatArray, elapsed: FloatArray) -> FloatArray:
        """Discount the earlier outcomes and add the new ones to those that wait for the end of the iteration."""
        return np.concatenate(
            [
                state[:4] * self._kept(state, elapsed),
                state[4:6] + np.stack([successes, counts - successes]),
                state[FEATURE_COLUMN:],
            ]
        )

    def fold(self, state: FloatArray, shared: FloatArray, iteration: int) -> FloatArray:
        """Merge the outcomes that wait with the earlier ones, at the common logit of their iteration."""
        new = state[4:6]
        common = self._shared(shared).at(iteration)
        merged = np.concatenate(
            [state[:2] + new, state[2:4] + new * common, np.zeros_like(new), state[FEATURE_COLUMN:]]
        )
        return merged.astype(self.dtype).astype(np.float64)  # as it will be stored, so that storing changes nothing

    def waiting(self, state: FloatArray) -> BoolArray:
        """Return which prompts have new successes or failures."""
        return (state[4] > 0) | (state[5] > 0)

    def log_likelihood(
        self, state: FloatArray, elapsed: FloatArray, thetas: FloatArray, offsets: FloatArray | None = None
    ) -> FloatArray:
        """Return the log-likelihood of the earlier outcomes at each θ + offset, `[num_prompts, num_points]`."""
        kept = self._kept(state, elapsed)
        successes, failures, success_drift, failure_drift = state[:4]
        at_success = success_drift / np.maximum(successes, 1e-30)
        at_failure = failure_drift / np.maximum(failures, 1e-30)
        if offsets is not None:
            at_success, at_failure = at_success + offsets, at_failure + offsets
        # log σ(θ + M) = −log(1 + e^−θ e^−M): one logarithm per point, no exponential
        right = np.log1p(np.exp(-np.clip(at_success, -60, 60))[:, None] * np.exp(-thetas))
        wrong = np.log1p(np.exp(np.clip(at_failure, -60, 60))[:, None] * np.exp(thetas))
        return -(kept * successes)[:, None] * right - (kept * failures)[:, None] * wrong

    # --- all prompts --------------------------------------------------------------------------------------------------

    def initial_shared(self) -> FloatArray:
        """Return M = 0 and success rates uniform on (0, 1)."""
        features = FeatureOffsets.initial().pack() if self.features else np.empty(0)
        return Shared(-1, 0, np.zeros(PATH_LENGTH), grid.UNIFORM_RATE, features, self._initial_followers()).pack()

    def _initial_followers(self) -> FloatArray:
        """Return packed `Followers` of whom nothing is known; nothing if all prompts follow."""
        return np.empty(0) if self.all_follow else Followers.initial().pack()

    @property
    def _num_followers(self) -> int:
        return 0 if self.all_follow else PACKED_LENGTH

    def _shared(self, vector: FloatArray) -> Shared:
        """Return the record of a packed vector of this estimator."""
        return Shared.unpack(vector, self._num_followers)

    def check_shared(self, shared: FloatArray) -> None:
        """Raise a UserError if the vector is too short or long, or the population no distribution."""
        length = SHARED_LENGTH + self._num_followers
        if len(shared) < length or not (self.features or len(shared) == length):
            raise UserError(f"'shared' has {len(shared)} numbers, not {length}")
        record = self._shared(shared)
        if self.features:
            FeatureOffsets.unpack(record.features)
        if not self.all_follow:
            Followers.unpack(record.followers)
        weights = record.weights
        if not ((weights > 0).all() and abs(weights.sum() - 1) < 1e-6):
            raise UserError("'shared' holds a population that is no distribution")

    def advance(
        self, shared: FloatArray, iteration: int, visited: FloatArray, sample: FloatArray, elapsed: FloatArray
    ) -> FloatArray:
        """Estimate the iteration's step of M, recenter the grid, update the features' β, and refit the population."""
        old = self._shared(shared)
        gap = max(iteration - old.iteration, 1) if old.iteration >= 0 else 1
        common = old.common + self._step(old, visited, gap)
        path = np.concatenate([old.path, np.full(min(gap, PATH_LENGTH) - 1, old.common), [common]])[-PATH_LENGTH:]
        origin = -round(common / grid.SPACING)
        weights = grid.shifted(old.weights, origin - old.origin)
        followers = old.followers if self.all_follow else self._compared(old, common, visited, gap).pack()
        moved = Shared(iteration, origin, path, weights, old.features, followers)
        folded = self.fold(sample, moved.pack(), iteration)
        if self.features and folded.shape[1]:
            moved = moved._replace(features=self._regressed(moved, folded, elapsed).pack())
        likelihood = self.log_likelihood(folded, elapsed, moved.thetas, moved.offsets(folded))
        weights = grid.refit(moved.weights, likelihood, self.em_steps, self.prior_prompts, self.smoothing)
        return moved._replace(weights=weights).pack()

    def _regressed(self, shared: Shared, sample: FloatArray, elapsed: FloatArray) -> FeatureOffsets:
        """Return the features' coefficients after one more step, given all outcomes of the sampled prompts."""
        code = sample[FEATURE_COLUMN]
        features = FeatureOffsets.unpack(shared.features).standardized(code)
        kept, offsets = self._kept(sample, elapsed), features.of(code)
        derivatives = offset_derivatives(sample[:4], kept, offsets, shared.weights, shared.thetas)
        return features.updated(code, *derivatives)

    def _compared(self, shared: Shared, common: float, visited: FloatArray, gap: int) -> Followers:
        """Return the followers after an iteration at M = `common`, by how its earlier visited prompts did."""
        seen = visited[:, visited[0] + visited[1] > 0]
        offsets = shared.offsets(seen)
        before = self.log_likelihood(seen, np.zeros(seen.shape[1]), shared.thetas, offsets)
        chances, (successes, failures) = grid.posterior(shared.weights, before), seen[4:6, :, None]
        earlier = np.concatenate([seen[:4], np.zeros_like(seen[4:6])])
        thetas = shared.thetas + (np.zeros(seen.shape[1]) if offsets is None else offsets)[:, None]
        rates = [1 / (1 + np.exp(-thetas - common)), 1 / (1 + np.exp(-thetas - mean_drift(earlier, common)[:, None]))]
        followed, stayed = (
            _mean(chances, np.exp(successes * np.log(rate) + failures * np.log1p(-rate))) for rate in rates
        )
        return Followers.unpack(shared.followers).updated(_mean(chances, rates[1]), followed, stayed, gap)

    def _step(self, shared: Shared, visited: FloatArray, gap: int) -> float:
        """Return the most probable change of M over `gap` iterations, given the outcomes that wait in `visited`."""
        if visited.shape[1] == 0:
            return 0.0
        now = np.zeros(visited.shape[1])
        offsets = shared.offsets(visited)
        before = grid.posterior(shared.weights, self.log_likelihood(visited, now, shared.thetas, offsets))
        successes, failures = visited[4:6, :, None]
        counts = (successes + failures)[:, 0]
        logits, variance = shared.thetas + shared.common + shared.expected_step(gap), gap * self.common_drift**2
        if offsets is not None:
            logits = logits + offsets[:, None]
        step, limit = 0.0, 4 * math.sqrt(variance)
        for _ in range(NEWTON_STEPS):
            rate = 1 / (1 + np.exp(-logits - step))
            log_likelihood = successes * np.log(rate) + failures * np.log1p(-rate)
            after = grid.posterior(before, log_likelihood)
            mean, second = _mean(after, rate), _mean(after, rate**2)
            slope = (successes[:, 0] - counts * mean).sum() - step / variance
            curvature = (counts * (mean - second) - counts**2 * (second - mean**2)).sum() + 1 / variance
            step += float(np.clip(slope / max(curvature, 1 / variance), -limit / 2, limit / 2))
            step = float(np.clip(step, -limit, limit))
        return shared.expected_step(gap) + step

    # --- estimates ----------------------------------------------------------------------------------------------------

    def posterior(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return the distribution of each prompt's θ, without its offset, on the grid, `[num_prompts, num_points]`."""
        shared = self._shared(np.asarray(population))
        offsets = shared.offsets(state)
        likelihood = self.log_likelihood(state, elapsed, shared.thetas, offsets)
        new = state[4:6]
        if new.any():  # within a running iteration: at the common logit that was known when it began
            logits = shared.next_logits if offsets is None else shared.next_logits + offsets[:, None]
            rate = 1 / (1 + np.exp(-logits))
            likelihood = likelihood + new[0][:, None] * np.log(rate) + new[1][:, None] * np.log1p(-rate)
        return grid.posterior(shared.weights, likelihood)

    def moments(
        self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]
    ) -> tuple[FloatArray, FloatArray]:
        """Return `E[p]` and `E[p(1 − p)]` in the coming iteration, for which M may take one more step."""
        shared = self._shared(np.asarray(population))
        chances, offsets = self.posterior(state, elapsed, population), shared.offsets(state)
        followed = self._followed(shared, chances, offsets)
        if self.all_follow:
            return followed
        at = mean_drift(state, shared.common + shared.trend)
        rate = 1 / (1 + np.exp(-shared.thetas - (at if offsets is None else at + offsets)[:, None]))
        stayed = _mean(chances, rate), _mean(chances, rate * (1 - rate))
        share = np.where(state[:2].sum(axis=0) + state[4:6].sum(axis=0) > 0, self._share(shared, stayed[0]), 1.0)
        return share * followed[0] + (1 - share) * stayed[0], share * followed[1] + (1 - share) * stayed[1]

    def _share(self, shared: Shared, success_rate: FloatArray) -> FloatArray:
        """Return the share of followers among prompts like these, `[num_prompts]`."""
        return Followers.unpack(shared.followers).of(success_rate)

    def _followed(
        self, shared: Shared, chances: FloatArray, offsets: FloatArray | None
    ) -> tuple[FloatArray, FloatArray]:
        """Return `E[p]` and `E[p(1 − p)]` of prompts that follow M."""
        if offsets is None:
            rate = 1 / (1 + np.exp(-shared.next_logits[:, None] - self.common_drift * NODES))
            mean, variance = (rate * NODE_WEIGHTS).sum(axis=1), (rate * (1 - rate) * NODE_WEIGHTS).sum(axis=1)
            return _mean(chances, mean), _mean(chances, variance)
        mean, variance = np.zeros((2, len(offsets)))
        odds = np.exp(-shared.next_logits) * np.exp(-offsets)[:, None]
        for node, weight in zip(NODES, NODE_WEIGHTS, strict=True):  # one at a time, for there are nine
            rate = 1 / (1 + odds * math.exp(-self.common_drift * node))
            mean += weight * _mean(chances, rate)
            variance += weight * _mean(chances, rate * (1 - rate))
        return mean, variance

    def success_rate(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return `E[p]`, `[num_prompts]`."""
        return self.moments(state, elapsed, population)[0]

    def bernoulli_variance(self, state: FloatArray, elapsed: FloatArray, population: tuple[float, ...]) -> FloatArray:
        """Return `E[p(1 − p)]`, `[num_prompts]`."""
        return self.moments(state, elapsed, population)[1]


def _mean(chances: FloatArray, values: FloatArray) -> FloatArray:
    """Return each prompt's mean of values that depend on the point, `[num_points]`, or on the prompt too."""
    return np.einsum("ng,g->n" if values.ndim == 1 else "ng,ng->n", chances, values)
