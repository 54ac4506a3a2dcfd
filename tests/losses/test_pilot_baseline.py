"""Score-weighted baselines of a pilot's rollouts: unbiased by enumeration, where the obvious ones are not."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynamo_lightning.allocation import (
    BetaPosterior,
    NeymanRule,
    OptimalBaselineRule,
    PromptStatistics,
    RolloutBudget,
    allocate_commit,
    allocate_rollouts,
    pilot_weights,
)
from dynamo_lightning.losses.advantages import cross_leave_one_out, weighted_leave_one_out
from dynamo_lightning.losses.baseline_history import BaselineHistory
from dynamo_lightning.losses.optimal_baseline import OptimalBaseline
from dynamo_lightning.losses.pilot_baseline import pilot_baselines
from dynamo_lightning.types import GroupedRewards

PILOT, LEAST = 3, 2
NORMS = {0.0: 1.0, 1.0: 4.0}
"""w of wrong and of right responses."""
PRIOR_MEAN, PRIOR_ROLLOUTS, COMMIT_MEAN = 0.7, 3.0, 4.0


def commit_size(pilot):
    """Two if the pilot is all alike, else six."""
    return LEAST if sum(pilot) in (0, PILOT) else 6


def cases():
    """Every outcome of pilot and commit, each as a prompt of its own: rewards, prompts, is_pilot and is_certain."""
    rewards, prompts, is_pilot, is_certain = [], [], [], []
    number = 0
    for pilot in itertools.product((0.0, 1.0), repeat=PILOT):
        size = commit_size(pilot)
        for commit in itertools.product((0.0, 1.0), repeat=size):
            rewards += [*pilot, *commit]
            prompts += [number] * (PILOT + size)
            is_pilot += [True] * PILOT + [False] * size
            is_certain += [False] * PILOT + [index < LEAST for index in range(size)]
            number += 1
    return (
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(prompts),
        torch.tensor(is_pilot),
        torch.tensor(is_certain),
    )


REWARDS, PROMPTS, IS_PILOT, IS_CERTAIN = cases()
WEIGHTS = torch.where(REWARDS > 0, NORMS[1.0], NORMS[0.0]).double()
NUM_CASES = int(PROMPTS.max()) + 1


def sums(values):
    return torch.zeros(NUM_CASES, dtype=torch.float64).index_add(0, PROMPTS, values)


def bias(baselines, rate, part):
    """E Σ (r − b) s / n of a part less ∇J = p(1 − p), for p = sigmoid(θ), whose score is s = r − p."""
    log_chance = (REWARDS * rate + (1 - REWARDS) * (1 - rate)).log()
    members = (part == IS_PILOT).double() if part is not None else torch.ones_like(REWARDS)
    sizes = sums(members)
    gradients = sums(members * (REWARDS - baselines) * (REWARDS - rate)) / sizes
    return float((sums(log_chance).exp() * gradients).sum()) - rate * (1 - rate)


def of_pilot(**options):
    return pilot_baselines(REWARDS, WEIGHTS, PROMPTS, IS_PILOT, IS_CERTAIN, COMMIT_MEAN, **options)


def prior(rollouts=PRIOR_ROLLOUTS):
    full = torch.ones_like(REWARDS)
    return {"prior_means": PRIOR_MEAN * full, "prior_rollouts": rollouts * full}


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("options", [{}, prior()], ids=["weights", "weights_and_prior"])
def test_pilot_and_commit_are_unbiased_though_weights_depend_on_outcomes_and_sizes_on_the_pilot(rate, options):
    assert abs(bias(of_pilot(**options), rate, part=True)) < 1e-12
    weights = PRIOR_ROLLOUTS * torch.ones_like(REWARDS) if options else None
    of_commit = cross_leave_one_out(REWARDS, PROMPTS, IS_PILOT, WEIGHTS, options.get("prior_means"), weights)
    assert abs(bias(of_commit, rate, part=False)) < 1e-12


@pytest.mark.parametrize("rate", [0.2, 0.7])  # at 1/2 the sizes, which are symmetric, say nothing of the score
def test_a_weighted_mean_of_the_whole_commit_biases_the_pilot(rate):
    """Guard: its mean depends on the commit's size, which the pilot decides."""
    everything = pilot_baselines(REWARDS, WEIGHTS, PROMPTS, IS_PILOT, ~IS_PILOT, COMMIT_MEAN)
    assert abs(bias(everything, rate, part=True)) > 0.005 * rate * (1 - rate)


def test_a_prior_that_counts_against_the_size_of_the_commit_biases_the_pilot():
    sizes = sums((~IS_PILOT).double())[PROMPTS]
    share = PRIOR_ROLLOUTS / (PRIOR_ROLLOUTS + sizes)
    assert abs(bias(share * PRIOR_MEAN + (1 - share) * of_pilot(), 0.2, part=True)) > 0.02 * 0.16


def test_a_leave_one_out_of_both_parts_biases_the_pilot():
    everything = weighted_leave_one_out(REWARDS, WEIGHTS, PROMPTS, NUM_CASES)
    assert abs(bias(everything, 0.2, part=True)) > 0.02 * 0.16


def advantages(advantage):
    """Of every case at once, by the advantage's own interface; baselines, float32."""
    groups, rows = 2 * PROMPTS + (~IS_PILOT).long(), torch.arange(len(REWARDS))
    scored = GroupedRewards(REWARDS.float(), groups, PROMPTS, rows, 1, IS_PILOT, IS_CERTAIN, COMMIT_MEAN)
    return REWARDS - advantage.of(scored, WEIGHTS).double()


@pytest.mark.parametrize("part", [True, False], ids=["pilot", "commit"])
def test_the_advantage_is_unbiased(part):
    assert abs(bias(advantages(OptimalBaseline()), 0.3, part)) < 1e-7


def test_the_advantage_uses_what_was_known_of_each_prompt_before():
    advantage = OptimalBaseline(half_life=50.0)
    ones = torch.ones(3, dtype=torch.float64)
    advantage.history.observe(torch.tensor([1.0, 0.0, 1.0]).double(), 4.0 * ones, torch.tensor([0, 5, 9]), 0)
    known = {
        "prior_means": advantage.history.prior(PROMPTS, 1)[0],
        "prior_rollouts": advantage.history.prior_rollouts(PROMPTS, 1),
    }
    assert len(set(known["prior_rollouts"].tolist())) == 2
    found = advantages(advantage)
    torch.testing.assert_close(found[IS_PILOT], of_pilot(**known)[IS_PILOT], rtol=0, atol=1e-6)


def one(rewards, weights, commit_mean=4.0, **options):
    """Baseline of the pilot: two pilot rollouts, wrong and right, then the commit, of which two are certain."""
    rewards = torch.tensor([0.0, 1.0, *rewards], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, *weights], dtype=torch.float64)
    index = torch.arange(len(rewards))
    options = {name: torch.full_like(rewards, value) for name, value in options.items()}
    found = pilot_baselines(
        rewards, weights, torch.zeros_like(index), index < 2, (index >= 2) & (index < 4), commit_mean, **options
    )
    return found[:2].tolist()


def test_by_hand():
    # Plain mean 3/4; of the first two the weighted mean is 1·3/(3 + 1) = 3/4 and the plain one 1/2: 3/4 + 1/4 = 1.
    assert one([1, 0, 1, 1], [3, 1, 1, 1]) == [1.0, 1.0]
    # A prior of 0.2 that counts as 12 rollouts against 4: 3/4 · 0.2 + 1/4 · 1.
    assert one([1, 0, 1, 1], [3, 1, 1, 1], prior_means=0.2, prior_rollouts=12.0) == pytest.approx([0.4, 0.4])


def test_weights_of_zero_correct_nothing():
    assert one([1, 0, 1, 1], [0, 0, 5, 5]) == [0.75, 0.75]


def test_without_a_commit_the_prior_is_the_baseline_and_without_either_the_other_pilot_rollout():
    assert one([], [], prior_means=0.2, prior_rollouts=1.0) == pytest.approx([0.2, 0.2])
    assert one([], []) == [1.0, 0.0]


def test_a_prior_counts_as_its_own_rollouts_and_the_populations():
    history = BaselineHistory(half_life=10.0, population_rollouts=4.0)
    ids = torch.tensor([3, 3, 3, 8])
    assert history.prior_rollouts(ids, 0).tolist() == [0.0] * 4
    ones = torch.ones(4, dtype=torch.float64)
    history.observe(ones, ones, ids, 0)
    # Three rollouts, half of them left after the half-life, and four of the population; prompt 5 is unseen.
    assert history.prior_rollouts(torch.tensor([3, 5]), 10).tolist() == [5.5, 4.0]


BUDGET = RolloutBudget(16, 2, 64, pilot=4, pilot_baseline="cross")


@pytest.mark.parametrize("baseline", ["group", "history"])
def test_shares_are_the_best_for_the_baselines_that_the_rule_says(baseline):
    ids = list(range(3))
    statistics = PromptStatistics(BetaPosterior(half_life=100.0))
    statistics.observe(ids, [1, 8, 15], [16] * 3, 0)
    before = statistics.estimate(ids, 1)
    budget = replace(BUDGET, rule=OptimalBaselineRule(baseline, score_ratio=3.0))
    weights = pilot_weights(before, ids, budget)
    known = OptimalBaselineRule("history", score_ratio=3.0)
    m = allocate_rollouts(before, ids, 3 * 12, 2, 60, known)
    assert len(set(m.tolist())) == 3
    noise = 0.0 if baseline == "history" else 1.0

    def variance(w):
        return w**2 * (1 + noise / m) / 4 + (1 - w) ** 2 * (1 + noise / (3 + m)) / m

    for other in torch.linspace(0.01, 0.99, 99).tolist():
        assert (variance(weights) <= variance(other) + 1e-15).all()
    # The commit minimizes what the shares leave, by the rule's own a.
    sizes = allocate_commit(before, ids, weights, budget)
    a, _ = known.coefficients(before)
    factor = (1 - weights) ** 2 + noise * weights**2 / 4
    every = (torch.tensor(c).numpy() for c in itertools.product(range(2, 33), repeat=3) if sum(c) == 36)
    assert (factor * a / sizes).sum() == pytest.approx(min((factor * a / c).sum() for c in every))


def test_equal_score_norms_give_the_shares_of_leave_one_out():
    ids = [1, 2]
    before = PromptStatistics(BetaPosterior()).estimate(ids, 0)
    of_group = pilot_weights(before, ids, replace(BUDGET, rule=OptimalBaselineRule("group")))
    assert of_group == pytest.approx(pilot_weights(before, ids, replace(BUDGET, rule=NeymanRule())))


def test_weights_and_history_pay_where_scores_differ_and_cost_little_where_they_do_not(monkeypatch):
    """A piece of the benchmark's table `weighted_pilot`: paired replications."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import pilot_baselines as benchmark

    def difference(score_ratio, known):
        pools = [benchmark.Pool(0.2, score_ratio, seed) for seed in range(8)]
        arms = [[benchmark.squared_gradient(p, "weighted", known, b) for p in pools] for b in ("built", "plain")]
        return sum(arms[0]) / 8 - sum(arms[1]) / 8

    assert difference(4.0, "own rollouts") < -0.02
    assert abs(difference(1.0, "nothing")) < 0.03
