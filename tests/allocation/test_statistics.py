"""Running statistics: posteriors and the fitted prior by hand, the store joined by id and safe in a checkpoint."""

import warnings

import numpy as np
import pytest
import torch

from dynamo_lightning.allocation import (
    ArcsineKalman,
    BetaPosterior,
    PaperBernoulli,
    PromptStatistics,
    VarianceEstimator,
)


def flat_prior(half_life=32.0):
    """A posterior that keeps Beta(1, 1), to compute by hand with."""
    estimator = BetaPosterior(half_life)
    estimator.fit_population = lambda state, elapsed: (1.0, 1.0)
    return estimator


def through_disk(state_dict, path):
    torch.save(state_dict, path)
    return torch.load(path, weights_only=True)


def test_prior_is_uniform_before_64_rollouts():
    statistics = PromptStatistics(BetaPosterior())
    assert statistics.population == (1.0, 1.0)
    statistics.observe([1, 2, 3], [0, 10, 21], [21, 21, 21], 0)
    assert statistics.population == (1.0, 1.0)
    statistics.observe([4], [1], [1], 0)  # the 64th
    assert statistics.population != (1.0, 1.0)


def test_posterior_by_hand():
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe([5], [3], [4], 0)
    estimate = statistics.estimate([5, 6], 0)
    # Beta(1 + 3, 1 + 1): 4/6 and 4·2/(6·7); unseen Beta(1, 1): 1/2 and 1/6.
    np.testing.assert_allclose(estimate.success_rate, [4 / 6, 1 / 2])
    np.testing.assert_allclose(estimate.bernoulli_variance, [8 / 42, 1 / 6])
    assert estimate.unseen.tolist() == [False, True]


def test_weight_is_the_posterior_mean_of_the_variance():
    statistics = PromptStatistics(flat_prior())
    statistics.observe([5], [6], [16], 0)
    p = (np.arange(200_000) + 0.5) / 200_000
    density = p**6 * (1 - p) ** 10
    expected = (density * p * (1 - p)).sum() / density.sum()
    assert statistics.estimate([5], 0).bernoulli_variance[0] == pytest.approx(expected, rel=1e-6)


def test_old_outcomes_are_discounted_by_iterations_since_the_visit():
    statistics = PromptStatistics(flat_prior(half_life=10))
    statistics.observe([5], [4], [4], 3)
    np.testing.assert_allclose(statistics.estimate([5], 13).success_rate, (1 + 2) / (2 + 2))  # half of 4 of 4
    statistics.observe([5], [0], [2], 23)  # a quarter of 4 of 4, and 0 of 2
    np.testing.assert_allclose(statistics.estimate([5], 23).success_rate, (1 + 1) / (2 + 3))
    np.testing.assert_allclose(statistics.estimate([5], 33).success_rate, (1 + 0.5) / (2 + 1.5))


def test_an_infinite_half_life_counts_all_outcomes_alike():
    statistics = PromptStatistics(flat_prior(half_life=float("inf")))
    statistics.observe([5], [4], [4], 0)
    statistics.observe([5], [0], [4], 1000)
    np.testing.assert_allclose(statistics.estimate([5], 9999).success_rate, 5 / 10)


def test_moment_fit_by_hand():
    # p̂ = .2, .5, .8 from 20, 20, 40 rollouts: m = ½, Σ(p̂ − m)² = .18, c = ⅔ each, noise p̂(1 − p̂)/(n − 1).
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe([1, 2, 3], [4, 10, 32], [20, 20, 40], 0)
    variance = (0.18 - 2 / 3 * (0.16 / 19 + 0.25 / 19 + 0.16 / 39)) / 2
    strength = 0.25 / variance - 1
    np.testing.assert_allclose(statistics.population, [strength / 2, strength / 2])


def test_moment_fit_weighs_prompts_alike_however_many_rollouts_they_had():
    few, many = PromptStatistics(BetaPosterior()), PromptStatistics(BetaPosterior())
    few.observe([1, 2], [20, 90], [100, 100], 0)
    many.observe([1, 2], [20, 9000], [100, 10_000], 0)
    mean = [a / (a + b) for a, b in (few.population, many.population)]
    np.testing.assert_allclose(mean, [0.55, 0.55])


def test_moment_fit_finds_the_prior_that_made_the_data():
    rng = np.random.default_rng(0)
    for a0, b0 in ((0.2, 0.2), (1.0, 1.0), (0.6, 2.4), (5.0, 3.0)):
        rates = rng.beta(a0, b0, 20_000)
        counts = rng.integers(2, 33, 20_000)
        statistics = PromptStatistics(BetaPosterior())
        statistics.observe(np.arange(20_000), rng.binomial(counts, rates), counts, 0)
        np.testing.assert_allclose(statistics.population, [a0, b0], rtol=0.06)


def test_moment_fit_is_not_misled_by_allocation():
    # Where p is near ½, allocation gives 40 rollouts instead of 4: the fitted prior must not lean there.
    rng = np.random.default_rng(0)
    rates = rng.beta(0.5, 0.5, 20_000)
    counts = np.where(abs(rates - 0.5) < 0.3, 40, 4)
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe(np.arange(20_000), rng.binomial(counts, rates), counts, 0)
    np.testing.assert_allclose(statistics.population, [0.5, 0.5], rtol=0.04)


def test_moment_fit_follows_the_policy():
    # Visited at iteration 0: rates .1 and .3; at iteration 100, ten half-lives later: .6 and .8.
    statistics = PromptStatistics(BetaPosterior(half_life=10))
    statistics.observe([1, 2], [10, 30], [100, 100], 0)
    statistics.observe([3, 4], [60, 80], [100, 100], 100)
    a0, b0 = statistics.population
    assert a0 / (a0 + b0) == pytest.approx((0.4 / 1024 + 1.4) / (2 / 1024 + 2))


@pytest.mark.parametrize(
    ("successes", "why"),
    [([0, 0, 0, 0], "all wrong"), ([32] * 4, "all right"), ([16] * 4, "no more spread than noise"), ([], "nothing")],
)
def test_prior_is_uniform_where_the_moment_fit_is_undefined(successes, why):
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe(range(len(successes)), successes, [32] * len(successes), 0)
    assert statistics.population == (1.0, 1.0)


def test_prior_is_uniform_if_no_prompt_has_two_rollouts():
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe(range(100), [0, 1] * 50, [1] * 100, 0)
    assert statistics.population == (1.0, 1.0)


def test_fitted_prior_is_clipped():
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe(range(100), [0, 32] * 50, [32] * 100, 0)  # only all or nothing
    np.testing.assert_allclose(statistics.population, [0.05, 0.05])
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe(range(1000), [32] + [0] * 999, [32] * 1000, 0)  # mean 0.001
    np.testing.assert_allclose(statistics.population, [0.001, 0.099])
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe([1, 2], [490_000, 510_000], [1_000_000, 1_000_000], 0)  # nearly all alike
    np.testing.assert_allclose(statistics.population, [50, 50])


def test_an_unseen_prompt_has_the_variance_of_the_population():
    rng = np.random.default_rng(0)
    rates = rng.beta(0.2, 0.2, 5000)
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe(np.arange(5000), rng.binomial(16, rates), np.full(5000, 16), 0)
    unseen = statistics.estimate([10**9], 1)
    assert unseen.unseen.tolist() == [True]
    assert unseen.bernoulli_variance[0] == pytest.approx((rates * (1 - rates)).mean(), rel=0.05)
    assert unseen.success_rate[0] == pytest.approx(rates.mean(), rel=0.05)


def test_paper_estimator_by_hand():
    statistics = PromptStatistics(PaperBernoulli())
    statistics.observe([1, 2, 3], [1, 4, 1], [4, 4, 1], 0)
    statistics.observe([1], [3], [4], 50)  # lifetime counts: 4 of 8, nothing is forgotten
    estimate = statistics.estimate([1, 2, 3, 4], 500)
    np.testing.assert_allclose(estimate.bernoulli_variance, [4 * 4 / (8 * 7), 0, 0.5, 0.5])
    np.testing.assert_allclose(estimate.success_rate, [0.5, 1.0, 1.0, 0.5])
    assert estimate.unseen.tolist() == [False, False, False, True]


def test_paper_estimator_weighs_no_seen_prompt_more_than_an_unseen_one():
    k, n = np.meshgrid(np.arange(65.0), np.arange(65.0))
    k, n = k[k <= n], n[k <= n]
    weights = PaperBernoulli().bernoulli_variance(np.stack([k, n]), np.zeros(len(k)), ())
    assert weights.max() == 0.5


def test_outcomes_are_joined_by_id_whatever_the_order_or_company():
    together, apart = PromptStatistics(BetaPosterior()), PromptStatistics(BetaPosterior())
    together.observe([9, 3, 7], [1, 2, 3], [4, 4, 4], 0)
    together.observe([3, 5], [0, 1], [4, 2], 1)
    for prompt_id, k, n in ((7, 3, 4), (3, 2, 4), (9, 1, 4)):
        apart.observe([prompt_id], [k], [n], 0)
    for prompt_id, k, n in ((5, 1, 2), (3, 0, 4)):
        apart.observe([prompt_id], [k], [n], 1)
    for column in ("success_rate", "bernoulli_variance", "unseen"):
        expected = getattr(apart.estimate([3, 5, 7, 9, 11], 2), column)
        np.testing.assert_array_equal(getattr(together.estimate([3, 5, 7, 9, 11], 2), column), expected)
        np.testing.assert_array_equal(getattr(together.estimate([11, 9, 7, 5, 3], 2), column), expected[::-1])
    assert len(together) == 4


def test_ids_of_63_bits_are_told_apart():
    statistics = PromptStatistics(BetaPosterior())
    top = 2**63 - 1
    statistics.observe([top, top - 1], [4, 0], [4, 4], 0)
    np.testing.assert_allclose(statistics.estimate([top - 1, top], 0).success_rate, [1 / 6, 5 / 6])
    with pytest.raises(ValueError, match="vector of integers, got float64"):
        statistics.observe([float(top)], [1], [4], 1)


def test_a_prompt_without_rollouts_counts_as_not_visited():
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe([1, 2], [0, 1], [0, 2], 0)
    assert statistics.estimate([1, 2], 0).unseen.tolist() == [True, False]
    statistics.observe([], [], [], 1)
    assert len(statistics) == 1


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        (([1, 2, 1], [0, 0, 0], [1, 1, 1]), "prompt id 1 occurs more than once"),
        (([1, 2], [0, 3], [2, 2]), "prompt id 2 has 3 successes in 2 rollouts"),
        (([1, 2], [-1, 0], [2, 2]), "prompt id 1 has -1 successes"),
        (([1], [0], [-2]), "prompt id 1 has 0 successes in -2"),
        (([1], [float("nan")], [2]), "prompt id 1 has nan"),
        (([1, 2], [0], [2]), r"differ in shape: \(2,\), \(1,\), \(1,\)"),
    ],
)
def test_impossible_outcomes_are_refused_and_change_nothing(outcomes, message):
    statistics = PromptStatistics(BetaPosterior())
    with pytest.raises(ValueError, match=message):
        statistics.observe(*outcomes, 0)
    assert len(statistics) == 0


def test_time_does_not_run_backwards():
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe([7], [1], [2], 10)
    with pytest.raises(ValueError, match="iteration 9 lies before iteration 10, in which prompt id 7"):
        statistics.observe([7], [1], [2], 9)
    with pytest.raises(ValueError, match="iteration 9 lies before iteration 10"):
        statistics.estimate([7], 9)


@pytest.mark.parametrize(
    "estimator", [BetaPosterior(half_life=5), PaperBernoulli(), ArcsineKalman()], ids=lambda e: type(e).__name__
)
def test_statistics_survive_resume_bit_for_bit(estimator, tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2**63 - 1, 50)
    uninterrupted = PromptStatistics(estimator)
    for iteration in range(4):
        batch = ids[iteration::3]
        lengths = rng.integers(8, 999, len(batch))
        uninterrupted.observe(batch, rng.integers(0, 9, len(batch)), [8] * len(batch), iteration, lengths)
    resumed = PromptStatistics(estimator)
    resumed.load_state_dict(through_disk(uninterrupted.state_dict(), tmp_path / "statistics.pt"))
    for statistics in (uninterrupted, resumed):
        statistics.observe(ids[:20], np.arange(20) % 9, [8] * 20, 4)
    assert resumed.population == uninterrupted.population
    for column in ("success_rate", "bernoulli_variance", "unseen", "response_length"):
        expected = getattr(uninterrupted.estimate(ids, 6), column)
        np.testing.assert_array_equal(getattr(resumed.estimate(ids, 6), column), expected)


def test_statistics_survive_added_and_removed_prompts(tmp_path):
    before = PromptStatistics(BetaPosterior())
    before.observe([10, 20, 30], [0, 4, 8], [8, 8, 8], 0)
    after = PromptStatistics(BetaPosterior())
    after.load_state_dict(through_disk(before.state_dict(), tmp_path / "statistics.pt"))
    # The data set now has 5 and 25 added, 20 removed, and another order: 10 and 30 keep their own outcomes.
    estimate = after.estimate([30, 25, 5, 10], 1)
    assert estimate.unseen.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(estimate.success_rate[[0, 3]], before.estimate([30, 10], 1).success_rate)
    after.observe([25, 5], [1, 1], [2, 2], 1)
    np.testing.assert_array_equal(
        after.estimate([20], 1).bernoulli_variance, before.estimate([20], 1).bernoulli_variance
    )


def test_statistics_do_not_depend_on_the_number_of_processes():
    # Each process brings the outcomes of its share of the rollouts; every process adds up what all have brought.
    rng = np.random.default_rng(0)
    prompts, rights = rng.integers(0, 9, 96), rng.integers(0, 2, 96)

    def gathered(world_size):
        statistics = PromptStatistics(BetaPosterior())
        shares = [np.arange(rank, 96, world_size) for rank in range(world_size)]
        order = np.concatenate(shares)
        ids = list(dict.fromkeys(prompts[order].tolist()))
        counts = [(prompts[order] == prompt_id).sum() for prompt_id in ids]
        successes = [rights[order][prompts[order] == prompt_id].sum() for prompt_id in ids]
        statistics.observe(ids, successes, counts, 0, response_tokens=[10 * n for n in counts])
        return statistics

    def flat(statistics):
        saved = statistics.state_dict()
        return [saved["prompt_ids"], saved["last_visit"], *saved["columns"].values()]

    for world_size in (2, 3, 5):
        assert all(torch.equal(a, b) for a, b in zip(flat(gathered(1)), flat(gathered(world_size)), strict=True))


def test_state_dict_is_a_snapshot_of_tensors_and_primitives():
    statistics = PromptStatistics(BetaPosterior(half_life=7))
    statistics.observe([4, 2], [1, 2], [3, 3], 6)
    saved = statistics.state_dict()
    statistics.observe([4, 3], [1, 1], [3, 3], 7)
    assert saved["estimator"] == "BetaPosterior"
    assert saved["settings"] == {"half_life": 7.0}
    assert saved["prompt_ids"].tolist() == [2, 4]
    assert saved["last_visit"].tolist() == [6, 6]
    assert {key: values.tolist() for key, values in saved["columns"].items()} == {
        "successes": [2.0, 1.0],
        "failures": [1.0, 2.0],
        "response_tokens": [0.0, 0.0],
        "responses": [0.0, 0.0],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "PaperBernoulli"}, "statistics of 'PaperBernoulli', not of 'BetaPosterior'"),
        ({"prompt_ids": torch.tensor([2, 2])}, "'prompt_ids' are not sorted or occur twice"),
        ({"prompt_ids": torch.tensor([4, 2])}, "'prompt_ids' are not sorted or occur twice"),
        ({"prompt_ids": torch.tensor([2])}, "'last_visit' has length 2, 'prompt_ids' 1"),
        ({"prompt_ids": torch.tensor([2.0, 4.0])}, "'prompt_ids' is not a vector of torch.int64"),
        ({"last_visit": torch.tensor([3, -1])}, "'last_visit' has the negative value -1"),
        ({"successes": torch.tensor([1.0], dtype=torch.float64)}, "'successes' has length 1"),
        ({"successes": torch.tensor([1.0, float("nan")], dtype=torch.float64)}, "'successes' is not finite"),
        ({"failures": torch.tensor([-1.0, 2.0], dtype=torch.float64)}, "'failures' has the negative value -1.0"),
        ({"failures": [1.0, 2.0]}, "'failures' is not a vector of torch.float64"),
        ({"counts": torch.ones(2, dtype=torch.float64)}, r"columns \['counts', 'failures', 'respo"),
        ({"responses": torch.tensor([0.0, -1.0], dtype=torch.float64)}, "0 'response_tokens' in -1 'responses'"),
        ({"responses": torch.tensor([0.0, 2.0], dtype=torch.float64)}, "0 'response_tokens' in 2 'responses'"),
        ({"last_visit": None}, r"missing \['last_visit'\]"),
    ],
)
def test_corrupt_or_foreign_statistics_are_refused_and_change_nothing(change, message):
    saved = PromptStatistics(BetaPosterior())
    saved.observe([2, 4], [1, 2], [3, 3], 0)
    state = saved.state_dict()
    for key, value in change.items():
        (state if key in state else state["columns"])[key] = value
    state = {key: value for key, value in state.items() if value is not None}
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe([9], [1], [2], 0)
    with pytest.raises(ValueError, match=message):
        statistics.load_state_dict(state)
    assert statistics.state_dict()["prompt_ids"].tolist() == [9]


def test_changed_settings_are_announced_on_resume():
    saved = PromptStatistics(BetaPosterior(half_life=8)).state_dict()
    with pytest.warns(UserWarning, match=r"goes on with {'half_life': 32.0}.*{'half_life': 8.0}"):
        PromptStatistics(BetaPosterior()).load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptStatistics(BetaPosterior(half_life=8)).load_state_dict(saved)


@pytest.mark.parametrize("half_life", [0, -1, float("nan")])
def test_half_life_must_be_positive(half_life):
    with pytest.raises(ValueError, match="half_life="):
        BetaPosterior(half_life)


def test_a_new_estimator_needs_only_its_columns_and_three_functions():
    class LastOutcome(VarianceEstimator):
        columns = ("rate",)

        def initial_state(self):
            return (0.5,)

        def update(self, state, successes, counts, elapsed):
            return (successes / counts)[None]

        def success_rate(self, state, elapsed, population):
            return state[0]

        def bernoulli_variance(self, state, elapsed, population):
            return state[0] * (1 - state[0])

    statistics = PromptStatistics(LastOutcome())
    statistics.observe([1], [3], [4], 0)
    assert statistics.estimate([1, 2], 0).bernoulli_variance.tolist() == [0.1875, 0.25]
    assert statistics.state_dict()["columns"]["rate"].tolist() == [0.75]


def test_expected_response_length_by_hand():
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe([1, 2], [0, 1], [4, 2], 0, response_tokens=[400, 20])
    estimate = statistics.estimate([2, 1, 3], 0)
    np.testing.assert_allclose(estimate.response_length, [10, 100, 55])  # unseen: the mean over prompts
    statistics.observe([1], [0], [4], 1, response_tokens=[100])  # (200 + 100)/(2 + 4)
    np.testing.assert_allclose(statistics.estimate([1], 1).response_length, [50])
    statistics.observe([1], [0], [2], 1, response_tokens=[300])  # the same iteration: nothing is halved again
    np.testing.assert_allclose(statistics.estimate([1], 1).response_length, [600 / 8])


def test_response_length_is_unknown_until_one_is_seen():
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe([1], [0], [4], 0)
    assert np.isnan(statistics.estimate([1, 2], 0).response_length).all()
    statistics.observe([2], [0], [4], 0, response_tokens=[40])
    np.testing.assert_allclose(statistics.estimate([1, 2, 3], 0).response_length, [10, 10, 10])


@pytest.mark.parametrize(("tokens", "message"), [([7, 3], "prompt id 2 has 3 tokens in 4"), ([7], r"\(2,\), \(1,\)")])
def test_impossible_lengths_are_refused_and_change_nothing(tokens, message):
    statistics = PromptStatistics(BetaPosterior())
    with pytest.raises(ValueError, match=message):
        statistics.observe([1, 2], [0, 0], [4, 4], 0, response_tokens=tokens)
    with pytest.raises(ValueError, match="prompt id 1 has nan tokens"):
        statistics.observe([1], [0], [4], 0, response_tokens=[float("nan")])
    assert len(statistics) == 0


def test_only_visited_prompts_take_memory_and_room_in_the_checkpoint(tmp_path):
    statistics = PromptStatistics(BetaPosterior())
    statistics.estimate(np.arange(10_000), 0)
    assert (len(statistics), statistics.nbytes) == (0, 0)
    sizes = []
    for iteration in range(4):
        ids = np.arange(100) if iteration == 3 else 1_000_000 * iteration + np.arange(100)
        statistics.observe(ids, np.zeros(100), np.full(100, 8), iteration, np.full(100, 80))
        torch.save(statistics.state_dict(), tmp_path / "statistics.pt")
        sizes.append((tmp_path / "statistics.pt").stat().st_size)
    assert len(statistics) == 300
    assert statistics.nbytes == 300 * 48  # id, last visit, two columns, tokens and responses: 8 bytes each
    # 100 more prompts add 4,800 bytes but for padding; visiting the same ones again adds none.
    assert abs(sizes[1] - sizes[0] - 4800) < 600 and abs(sizes[2] - sizes[1] - 4800) < 600
    assert sizes[3] == sizes[2]


def test_ids_of_ten_million_prompts_fit_into_200_megabytes():
    statistics = PromptStatistics(BetaPosterior())
    statistics.observe(np.arange(1000), np.zeros(1000), np.full(1000, 8), 0)
    assert statistics.state_dict()["prompt_ids"].nbytes * 10_000 <= 200e6


def test_more_successes_than_rollouts_in_a_checkpoint_are_refused():
    saved = PromptStatistics(PaperBernoulli())
    saved.observe([1], [1], [2], 0)
    state = saved.state_dict()
    state["columns"]["successes"][0] = 3
    with pytest.raises(ValueError, match="corrupt: 3 successes in 2 rollouts"):
        PromptStatistics(PaperBernoulli()).load_state_dict(state)
