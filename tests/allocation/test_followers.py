"""Shares of prompts that follow the common drift: learned where some do not, without effect where all do."""

import numpy as np
import pytest
import torch

from dynamo_lightning.allocation import LogitFilter, PromptStatistics
from dynamo_lightning.allocation.estimators.followers import SHARES, Followers, mean_drift
from dynamo_lightning.allocation.estimators.shared_logits import SHARED_LENGTH
from dynamo_lightning.errors import UserError

GROUP, BATCH, NUM_PROMPTS = 8, 60, 600


def followers(statistics):
    estimator = statistics.estimator
    vector = statistics._pool.ahead(np.zeros((6, 0)))[1]
    return Followers.unpack(estimator._shared(vector).followers)


def simulate(ceiling, iterations=40):
    """Hard prompts rise by 4 logits, easy ones only without a ceiling; statistics and true success rates at the end."""
    rng = np.random.default_rng(0)
    theta = np.where(rng.random(NUM_PROMPTS) < 0.5, -2.5, 2.0) + rng.normal(0, 0.3, NUM_PROMPTS)
    statistics = {follow: PromptStatistics(LogitFilter(all_follow=follow)) for follow in (True, False)}
    order = np.concatenate([rng.permutation(NUM_PROMPTS) for _ in range(iterations * BATCH // NUM_PROMPTS)])
    speed = np.where(ceiling & (theta > 0), 0.0, 0.1)
    for iteration in range(iterations):
        ids = np.sort(order[iteration * BATCH : (iteration + 1) * BATCH])
        rates = 1 / (1 + np.exp(-theta[ids] - speed[ids] * iteration))
        successes = rng.binomial(GROUP, rates)
        for store in statistics.values():
            store.observe(ids, successes, np.full(BATCH, GROUP), iteration)
    rates = 1 / (1 + np.exp(-theta - speed * iterations))
    easy = theta > 0
    weights = {name: store.estimate(np.arange(NUM_PROMPTS), iterations) for name, store in statistics.items()}
    return statistics[False], weights, rates, easy


def test_before_any_outcome_all_shares_are_equally_likely():
    assert Followers.initial().shares == pytest.approx([0.5, 0.5])


def test_the_posterior_of_a_share_is_that_of_a_mixture():
    # One easy prompt and one other; L_f and L_s as given, 11 equally likely shares.
    found = Followers.initial().updated(np.array([0.9, 0.2]), np.array([0.05, 0.3]), np.array([0.2, 0.1]), gap=1)
    easy, other = 0.05 * SHARES + 0.2 * (1 - SHARES), 0.3 * SHARES + 0.1 * (1 - SHARES)
    assert found.shares == pytest.approx([(SHARES * other).sum() / other.sum(), (SHARES * easy).sum() / easy.sum()])
    assert found.shares[1] < 0.5 < found.shares[0]
    assert found.of(np.array([0.1, 0.75, 0.99])) == pytest.approx(found.shares[[0, 1, 1]])


def test_outcomes_of_64_iterations_ago_count_half():
    once = Followers.initial().updated(np.array([0.2]), np.array([0.3]), np.array([0.1]), gap=1)
    nothing = np.empty(0)
    later = once.updated(nothing, nothing, nothing, gap=64)
    np.testing.assert_allclose(later.log_likelihood, once.log_likelihood / 2)


def test_mean_drift_is_the_mean_over_all_outcomes():
    # 3 successes at M = 1 and 1 failure at M = 2; 2 outcomes that wait count at M = 4; a prompt without outcomes.
    state = np.array([[3.0, 0.0], [1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    assert mean_drift(state, 4.0) == pytest.approx([(3 + 2 + 2 * 4) / 6, 4.0])


def test_easy_prompts_at_their_ceiling_are_not_called_solved():
    statistics, weights, rates, easy = simulate(ceiling=True)
    true = (rates * (1 - rates))[easy].mean()
    assert weights[True].bernoulli_variance[easy].mean() < 0.5 * true
    assert weights[False].bernoulli_variance[easy].mean() == pytest.approx(true, rel=0.25)
    others, easy_ones = followers(statistics).shares
    assert easy_ones < 0.4 and others > 0.8


def test_where_all_follow_the_estimate_hardly_changes():
    statistics, weights, rates, _ = simulate(ceiling=False)
    # Where M hardly changes a solved prompt's chances, outcomes cannot tell: only the weights have to agree.
    assert followers(statistics).shares[0] > 0.9
    true = (rates * (1 - rates)).mean()
    assert weights[False].bernoulli_variance.mean() == pytest.approx(true, rel=0.15)


def test_by_default_all_follow_and_nothing_is_kept_of_it():
    estimator = LogitFilter()
    assert estimator.all_follow and "all_follow" not in estimator.settings()
    assert len(estimator.initial_shared()) == SHARED_LENGTH


@pytest.mark.parametrize("features", [[], ["length"]])
def test_a_checkpoint_resumes_exactly(features):
    rng = np.random.default_rng(1)
    whole = PromptStatistics(LogitFilter(features=features, all_follow=False))

    def observe(statistics, iteration, ids, successes):
        known = np.full((len(ids), 1), 4.0) + ids[:, None] % 3 if features else None
        statistics.observe(ids, successes, np.full(len(ids), GROUP), iteration, features=known)

    batches = [(np.sort(rng.choice(100, 40, replace=False)), rng.integers(0, GROUP + 1, 40)) for _ in range(12)]
    for iteration, batch in enumerate(batches[:6]):
        observe(whole, iteration, *batch)
    resumed = PromptStatistics(LogitFilter(features=features, all_follow=False))
    resumed.load_state_dict(whole.state_dict())
    for iteration, batch in enumerate(batches[6:], start=6):
        observe(whole, iteration, *batch)
        observe(resumed, iteration, *batch)
    assert whole.population == resumed.population
    estimates = [s.estimate(np.arange(100), 12).bernoulli_variance for s in (whole, resumed)]
    np.testing.assert_array_equal(*estimates)


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_of_the_other_setting_is_taken_up(saved):
    before = PromptStatistics(LogitFilter(features=["length"], all_follow=saved))
    before.observe([1, 2], [8, 0], [8, 8], 0, features=[[4.0], [5.0]])
    before.observe([1, 2], [7, 4], [8, 8], 1, features=[[4.0], [5.0]])
    after = PromptStatistics(LogitFilter(features=["length"], all_follow=not saved))
    with pytest.warns(UserWarning, match="goes on with"):
        after.load_state_dict(before.state_dict())
    kept = [s.estimator._shared(np.array(s.population)) for s in (before, after)]
    np.testing.assert_array_equal(kept[0].weights, kept[1].weights)
    np.testing.assert_array_equal(kept[0].features, kept[1].features)
    assert len(kept[1].followers) == (0 if not saved else 2 * len(SHARES))


def test_corrupt_followers_are_refused():
    statistics = PromptStatistics(LogitFilter(all_follow=False))
    statistics.observe([1], [4], [8], 0)
    state = statistics.state_dict()
    with pytest.raises(UserError, match="followers"):
        statistics.load_state_dict({**state, "shared": torch.cat([state["shared"][:-1], torch.ones(1).double()])})
    with pytest.raises(UserError, match="numbers, not"):
        statistics.load_state_dict({**state, "shared": state["shared"][:-1]})
