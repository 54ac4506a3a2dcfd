"""Scores of hidden states: the regression, what a first epoch gains by them, and what they must not change."""

import numpy as np
import pytest

from dynamo_lightning.allocation import (
    Allocator,
    BetaPosterior,
    LogitFilter,
    PromptStatistics,
    RLOORule,
    RolloutBudget,
    allocate_rollouts,
)
from dynamo_lightning.allocation.groups import make_groups
from dynamo_lightning.allocation.hidden_scores import DIMENSIONS, HALF_LIFE, HiddenScores, project, solve
from dynamo_lightning.errors import UserError
from dynamo_lightning.types import Outcome, Prompt, Score

SIZE, BATCH = 6, 12


def draws(iteration, size=SIZE):
    """Ids, hidden states, successes and counts of an iteration."""
    rng = np.random.default_rng(iteration)
    states = rng.normal(3.0, 2.0, (BATCH, size)).astype(np.float32)
    return 100 * iteration + np.arange(BATCH), states, rng.binomial(8, 0.4, BATCH), np.full(BATCH, 8)


def trained(iterations, size=SIZE, order=None, in_parts=False, scores=None):
    scores = scores or HiddenScores()
    for iteration in iterations:
        ids, states, successes, counts = draws(iteration, size)
        rows = np.arange(BATCH) if order is None else order
        scores.score(ids[rows].tolist(), states[rows], iteration)
        if in_parts:
            scores.observe(ids.tolist(), np.minimum(successes, 1), np.full(BATCH, 4), iteration)
            scores.observe(
                ids[::-1].tolist(), (successes - np.minimum(successes, 1))[::-1], counts[::-1] - 4, iteration
            )
        else:
            scores.observe(ids.tolist(), successes, counts, iteration)
    return scores


def test_scores_are_those_of_a_ridge_regression_within_iterations_that_forgets():
    ids, states, _, _ = draws(2)
    found = trained([0, 1]).score(ids.tolist(), states, 2)
    first = draws(0)[1].astype(np.float64)
    weights, targets, means, weight = [], [], [], []
    for age, iteration in ((1, 0), (0, 1)):
        _, own, successes, _ = draws(iteration)
        x = (own - first.mean(0)) / first.std(0)
        y = np.log((successes + 0.5) / (8 - successes + 0.5))
        kept = 0.5 ** (age / HALF_LIFE)
        means.append(kept * x.mean(0))
        weight.append(kept)
        weights.append(np.sqrt(kept) * (x - x.mean(0)))
        targets.append(np.sqrt(kept) * (y - y.mean()))
    rows, right = np.concatenate(weights), np.concatenate(targets)
    number = BATCH * sum(weight)
    # One pseudo-observation of zero for each standardized direction, as rows of its own.
    penalty = np.sqrt(SIZE * np.diag((rows**2).sum(0) / number))
    beta = np.linalg.lstsq(np.concatenate([rows, penalty]), np.concatenate([right, np.zeros(SIZE)]), rcond=None)[0]
    x = (states - first.mean(0)) / first.std(0)
    np.testing.assert_allclose(found, (x - sum(means) / sum(weight)) @ beta, rtol=1e-9, atol=1e-12)


def test_the_first_scores_are_zero():
    ids, states, _, _ = draws(0)
    assert HiddenScores().score(ids.tolist(), states, 0).tolist() == [0.0] * BATCH


def test_parts_and_order_of_an_iteration_do_not_matter():
    ids, states, _, _ = draws(3)
    whole, shuffled = trained([0, 1, 2]), trained([0, 1, 2], order=np.arange(BATCH)[::-1], in_parts=True)
    np.testing.assert_allclose(
        whole.score(ids.tolist(), states, 3), shuffled.score(ids.tolist(), states, 3), rtol=1e-12, atol=1e-14
    )


def test_scores_of_an_iteration_wait_for_it_and_do_not_know_its_outcomes():
    scores = trained([0, 1])
    ids, states, successes, counts = draws(2)
    found = scores.score(ids.tolist(), states, 2)
    scores.observe(ids.tolist(), successes, counts, 2)
    assert scores.waiting(ids.tolist(), 2).tolist() == found.tolist()
    assert np.isnan(scores.waiting([ids[0], 5], 3)).all()
    assert np.isnan(scores.waiting([999], 2)).all()


def test_a_checkpoint_within_an_iteration_goes_on_exactly():
    scores, resumed = trained([0, 1]), HiddenScores()
    resumed.load_state_dict(scores.state_dict())
    ids, states, _, _ = draws(2)
    assert resumed.score(ids.tolist(), states, 2).tolist() == scores.score(ids.tolist(), states, 2).tolist()
    fresh = HiddenScores()
    fresh.load_state_dict(HiddenScores().state_dict())
    assert fresh.score(ids.tolist(), states, 0).tolist() == [0.0] * BATCH


def test_large_states_are_projected_and_keep_their_distances():
    inputs = np.random.default_rng(0).normal(size=(50, 2000))
    small = project(inputs)
    assert small.shape == (50, DIMENSIONS)
    pairs = np.arange(49)
    before, after = (((v[pairs] - v[pairs + 1]) ** 2).sum(1) for v in (inputs, small))
    assert (after / before * 2000 / DIMENSIONS).mean() == pytest.approx(1.0, abs=0.1)
    assert trained([0, 1], size=100).score(*(lambda d: (d[0].tolist(), d[1]))(draws(2, 100)), 2).std() > 0


def test_solve_is_that_of_a_library():
    rng = np.random.default_rng(1)
    root = rng.normal(size=(9, 9))
    matrix, right = root @ root.T + np.eye(9), rng.normal(size=9)
    np.testing.assert_allclose(solve(matrix, right), np.linalg.solve(matrix, right), rtol=1e-10)


def test_states_that_cannot_be_used_are_refused():
    scores = trained([0])
    ids, states, _, _ = draws(1)
    with pytest.raises(UserError, match="hidden states of 5 coordinates, but the checkpoint has learned from 6"):
        scores.score(ids.tolist(), states[:, :5], 1)
    states[3, 2] = np.nan
    with pytest.raises(UserError, match=f"hidden state of prompt id {ids[3]} is not finite"):
        scores.score(ids.tolist(), states, 1)
    with pytest.raises(UserError, match=r"scores of hidden states are corrupt: \['scores'\] are missing"):
        HiddenScores().load_state_dict({k: v for k, v in scores.state_dict().items() if k != "scores"})


# --- the allocator ----------------------------------------------------------------------------------------------------


def prompt(number):
    return Prompt(number, f"question {number}", "text", (1, 2, 3), "1", source="sums")


class Policy:
    """Hidden states that hold the logits of prompts, among noise, and the prompts that were asked for."""

    def __init__(self, informative=True, num_prompts=2000):
        rng = np.random.default_rng(5)
        self.states = rng.normal(size=(num_prompts, 12))
        logits = 2.0 * self.states[:, 1] - 2.0 * self.states[:, 4] + rng.normal(size=num_prompts)
        self.rates = 1 / (1 + np.exp(-logits))
        self.states = self.states if informative else rng.normal(size=self.states.shape)
        self.asked = []

    def __call__(self, prompts):
        numbers = [prompt.prompt_id for prompt in prompts]
        self.asked += numbers
        return self.states[numbers]


def make_allocator(policy, features=("hidden_state",), **options):
    budget = RolloutBudget(8, 2, 24, **options)
    allocator = Allocator(budget, LogitFilter(features=list(features)))
    allocator.read_hidden_states = policy
    return allocator


def visit(allocator, policy, numbers, iteration, rng):
    """Plan, sample and observe, with a pilot in two parts; the plans."""
    plans = allocator.plan([prompt(number) for number in numbers], iteration)
    every = list(plans)
    for part in (plans, None):
        part = allocator.plan_commit(plans, iteration) if part is None else part
        outcomes = [
            Outcome(*key, Score(float(rng.random() < policy.rates[key[0]]), {}), 5, False)
            for plan in part
            for key in plan.keys
        ]
        if part:
            allocator.observe(make_groups(part, (), outcomes), iteration)
        every += part if part is not plans else []
    return every


def first_epoch(informative, **options):
    """Variance relative to equal groups after the first eight iterations of a first epoch."""
    policy = Policy(informative)
    allocator, rng = make_allocator(policy, **options), np.random.default_rng(0)
    found, equal = 0.0, 0.0
    for iteration in range(40):
        numbers = range(32 * iteration, 32 * (iteration + 1))
        plans = visit(allocator, policy, numbers, iteration, rng)
        variances = (policy.rates * (1 - policy.rates))[list(numbers)]
        if iteration >= 8:
            found += (variances / (np.array([plan.size for plan in plans]) - 1)).sum()
            equal += (variances / 7).sum()
    return found / equal


def test_a_first_epoch_gains_by_states_that_know_something_and_loses_nothing_by_others():
    assert first_epoch(informative=True) < 0.93
    assert first_epoch(informative=False) == pytest.approx(1.0, abs=0.01)


def test_each_prompt_is_passed_through_the_policy_once_before_its_first_visit():
    policy = Policy()
    allocator, rng = make_allocator(policy, pilot=2), np.random.default_rng(0)
    visit(allocator, policy, [1, 2, 3], 0, rng)
    visit(allocator, policy, [3, 4, 1], 1, rng)
    visit(allocator, policy, [2, 4, 5], 2, rng)
    assert policy.asked == [1, 2, 3, 4, 5]


def test_a_visited_prompt_keeps_the_score_of_its_first_visit():
    policy = Policy()
    allocator, rng = make_allocator(policy), np.random.default_rng(0)
    for iteration in range(6):
        visit(allocator, policy, range(20 * iteration, 20 * iteration + 20), iteration, rng)
    table = allocator.statistics._table
    before = table.gather(np.array([105])).state[-1]
    visit(allocator, policy, [105, 110], 6, rng)
    assert before > 0 and table.gather(np.array([105])).state[-1] == before


def test_memory_stays_within_64_bytes_per_prompt_with_a_data_set_too():
    policy = Policy()
    allocator = make_allocator(policy, features=("hidden_state", "dataset"))
    visit(allocator, policy, range(2000), 0, np.random.default_rng(0))
    plain = PromptStatistics(LogitFilter())
    plain.observe(np.arange(2000), np.zeros(2000), np.ones(2000), 0)
    assert (allocator.statistics.nbytes - plain.nbytes) / 2000 <= 4.1
    assert allocator.statistics._table.nbytes / 2000 <= 64


def test_a_resumed_run_plans_the_same():
    policy = Policy()
    whole, rng = make_allocator(policy), np.random.default_rng(0)
    for iteration in range(5):
        visit(whole, policy, range(20 * iteration, 20 * iteration + 20), iteration, rng)
    resumed = make_allocator(policy)
    resumed.load_state_dict(whole.state_dict())
    prompts = [prompt(number) for number in (*range(90, 100), *range(100, 120))]
    plans = whole.plan(prompts, 5)
    assert resumed.plan(prompts, 5) == plans
    assert len({plan.bernoulli_variance for plan in plans[10:]}) > 5, "unseen prompts must differ"


def test_without_the_feature_no_policy_is_asked_and_the_checkpoint_is_as_before():
    policy = Policy()
    for estimator in (LogitFilter(), BetaPosterior()):
        allocator = Allocator(RolloutBudget(8, 2, 24), estimator)
        allocator.read_hidden_states = policy
        visit(allocator, policy, [1, 2, 3], 0, np.random.default_rng(0))
        assert policy.asked == [] and "hidden_scores" not in allocator.state_dict()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="leave one of 'length' and 'hidden_state' out"):
        LogitFilter(features=["length", "hidden_state"])
    allocator = Allocator(RolloutBudget(8, 2, 24), LogitFilter(features=["hidden_state"]))
    with pytest.raises(UserError, match="'hidden_state' is read from the policy that is trained"):
        allocator.plan([prompt(1)], 0)
    statistics = PromptStatistics(LogitFilter(features=["hidden_state"]))
    with pytest.raises(UserError, match="not finite"):
        statistics.observe([1], [0], [1], 0, features=[[np.inf]])


def test_sizes_follow_the_scores():
    """Guard: an unseen prompt that looks like those that were always wrong gets the least."""
    policy = Policy()
    allocator, rng = make_allocator(policy), np.random.default_rng(0)
    for iteration in range(20):
        visit(allocator, policy, range(32 * iteration, 32 * iteration + 32), iteration, rng)
    numbers = list(range(700, 900))
    plans = allocator.plan([prompt(number) for number in numbers], 20)
    variances = (policy.rates * (1 - policy.rates))[numbers]
    sizes = np.array([plan.size for plan in plans])
    assert np.corrcoef(sizes, variances)[0, 1] > 0.4
    equal = allocate_rollouts(np.ones(200), numbers, 1600, 2, 24, RLOORule())
    assert (variances / (sizes - 1)).sum() < 0.95 * (variances / (equal - 1)).sum()
