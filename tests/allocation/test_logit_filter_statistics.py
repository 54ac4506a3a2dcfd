"""The logit filter in the store: frozen within an iteration, exact on resume, small, and as fast for any number."""

import warnings

import numpy as np
import pytest
import torch

from dynamo_lightning.allocation import (
    ArcsineKalman,
    BetaPosterior,
    LogitFilter,
    PaperBernoulli,
    PromptStatistics,
    shared_statistics,
)
from dynamo_lightning.allocation import table as prompt_table
from dynamo_lightning.allocation.estimators.logit_filter import Shared
from dynamo_lightning.allocation.estimators.pooled import fixed_sample
from dynamo_lightning.allocation.table import PromptTable
from dynamo_lightning.errors import UserError


def through_disk(state_dict, path):
    torch.save(state_dict, path)
    return torch.load(path, weights_only=True)


def trained(iterations=6, num_prompts=120, seed=0, statistics=None, first=0):
    """Statistics after some iterations of 40 of the prompts."""
    statistics = PromptStatistics(LogitFilter()) if statistics is None else statistics
    for iteration in range(first, first + iterations):
        rng = np.random.default_rng([seed, iteration])
        ids = rng.choice(num_prompts, 40, replace=False)
        counts = rng.integers(2, 17, 40)
        lengths = counts * rng.integers(5, 90, 40)
        statistics.observe(ids, rng.binomial(counts, ids / num_prompts), counts, iteration, lengths)
    return statistics


def assert_same(one, other, ids, iteration):
    for name in ("success_rate", "bernoulli_variance", "unseen", "response_length"):
        np.testing.assert_array_equal(
            getattr(one.estimate(ids, iteration), name), getattr(other.estimate(ids, iteration), name)
        )


def assert_same_checkpoint(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for key in ("prompt_ids", "last_visit", "shared"):
        assert torch.equal(first[key], second[key])
    for column, values in first["columns"].items():
        assert torch.equal(values, second["columns"][column])
    assert first["iteration"] == second["iteration"]


def test_resume_is_exact_at_any_iteration(tmp_path):
    for stop in (1, 4):
        uninterrupted = trained(stop)
        resumed = PromptStatistics(LogitFilter())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.load_state_dict(through_disk(uninterrupted.state_dict(), tmp_path / "statistics.pt"))
        assert_same(uninterrupted, resumed, np.arange(130), stop)
        for statistics in (uninterrupted, resumed):
            trained(5, statistics=statistics, first=stop)
        assert_same(uninterrupted, resumed, np.arange(130), stop + 5)
        assert_same_checkpoint(uninterrupted, resumed)


def test_resume_within_an_iteration_is_exact(tmp_path):
    """Between a pilot's outcomes and the commit's."""
    uninterrupted, resumed = trained(), PromptStatistics(LogitFilter())
    uninterrupted.observe([1, 2, 500], [1, 0, 2], [4, 4, 4], 6)
    resumed.load_state_dict(through_disk(uninterrupted.state_dict(), tmp_path / "statistics.pt"))
    assert_same(uninterrupted, resumed, np.arange(130), 6)
    for statistics in (uninterrupted, resumed):
        statistics.observe([1, 2, 500], [3, 2, 9], [9, 8, 10], 6)
    assert_same(uninterrupted, resumed, [1, 2, 3, 500, 501], 7)
    trained(2, statistics=uninterrupted, first=7)
    trained(2, statistics=resumed, first=7)
    assert_same_checkpoint(uninterrupted, resumed)


def test_neither_order_nor_parts_of_an_iteration_matter():
    rng = np.random.default_rng(0)
    ids, counts = rng.permutation(200)[:60], rng.integers(4, 17, 60)
    successes = rng.binomial(counts, 0.4)
    pilot = rng.hypergeometric(successes, counts - successes, 3)
    whole, parts, shuffled = trained(), trained(), trained()
    whole.observe(ids, successes, counts, 6)
    for some in (slice(0, 20), slice(20, 60)):  # pilot first, commit later
        parts.observe(ids[some], pilot[some], np.full(60, 3)[some], 6)
    for some in (slice(40, 60), slice(0, 40)):
        parts.observe(ids[some], (successes - pilot)[some], (counts - 3)[some], 6)
    order = rng.permutation(60)
    shuffled.observe(ids[order], successes[order], counts[order], 6)
    for other in (parts, shuffled):
        assert_same(whole, other, np.arange(210), 6)
        assert_same(whole, other, np.arange(210), 7)
        trained(2, statistics=other, first=7)
    trained(2, statistics=whole, first=7)
    assert_same_checkpoint(whole, parts)
    assert_same_checkpoint(whole, shuffled)


def test_a_pilot_changes_its_own_prompts_only_within_the_iteration():
    statistics = trained()
    others = np.setdiff1d(np.arange(130), [3, 4])
    before = statistics.estimate(others, 6)
    own = statistics.estimate([3, 4], 6)
    population = None
    for part in range(2):
        statistics.observe([3, 4], [4, 4], [4, 4], 6)
        after = statistics.estimate(others, 6)
        np.testing.assert_array_equal(after.success_rate, before.success_rate)
        np.testing.assert_array_equal(after.bernoulli_variance, before.bernoulli_variance)
        assert (statistics.estimate([3, 4], 6).success_rate > own.success_rate).all()
        assert part == 0 or statistics.population == population
        population = statistics.population
    assert (statistics.estimate(others, 7).success_rate != before.success_rate).all()


def test_one_step_of_drift_per_iteration_however_many_parts():
    once, twice = PromptStatistics(LogitFilter()), PromptStatistics(LogitFilter())
    for iteration in range(5):
        once.observe([1, 2], [6, 7], [8, 8], iteration)
        twice.observe([1, 2], [3, 3], [4, 4], iteration)
        twice.observe([2, 1], [4, 3], [4, 4], iteration)
    assert_same(once, twice, [1, 2, 3], 5)
    path = Shared.unpack(np.array(twice.population)).path
    assert np.count_nonzero(path) == 4  # iterations 0 to 3 are closed, 4 is open


def test_asking_ahead_changes_nothing():
    asked, plain = trained(), trained()
    asked.estimate(np.arange(50), 6)
    asked.estimate(np.arange(50), 9)
    for statistics in (asked, plain):
        statistics.observe([7, 300], [1, 2], [4, 4], 5)  # more outcomes of the iteration that is open
    assert_same(asked, plain, np.arange(130), 6)
    assert_same_checkpoint(asked, plain)


def test_a_late_outcome_counts_at_the_iteration_that_sampled_it():
    """The policy has improved by two logits since; the outcome of the weak policy says that the prompt is easier."""
    rng = np.random.default_rng(0)
    statistics = PromptStatistics(LogitFilter(common_drift=0.4))
    theta = rng.normal(0, 1, 300)
    for iteration in range(12):
        rates = 1 / (1 + np.exp(-theta[:200] - 0.2 * iteration))
        statistics.observe(np.arange(200), rng.binomial(16, rates), np.full(200, 16), iteration)
    statistics.observe([1000], [8], [16], 11)
    statistics.observe([1001], [8], [16], 1)  # eleven iterations ago
    now, then = statistics.estimate([1000, 1001], 12).success_rate
    logit = np.log(then / (1 - then)) - np.log(now / (1 - now))
    assert logit == pytest.approx(2.0, abs=0.6)


def test_it_does_not_depend_on_the_number_of_processes():
    rng = np.random.default_rng(0)
    ids, counts = rng.permutation(400)[:90], rng.integers(2, 17, 90)
    successes = rng.binomial(counts, 0.3)
    reference = trained()
    reference.observe(ids, successes, counts, 6)
    for world_size in (2, 3):
        order = np.concatenate([np.arange(rank, 90, world_size) for rank in range(world_size)])
        gathered = trained()
        gathered.observe(ids[order], successes[order], counts[order], 6)
        assert_same(reference, gathered, np.arange(410), 7)
        assert_same_checkpoint(reference, gathered)


def test_a_changed_dataset_keeps_what_is_known(tmp_path):
    before, after = trained(), PromptStatistics(LogitFilter())
    after.load_state_dict(through_disk(before.state_dict(), tmp_path / "statistics.pt"))
    estimate = after.estimate([5000, 30, 6000, 10], 6)
    assert estimate.unseen.tolist() == [True, False, True, False]
    np.testing.assert_array_equal(estimate.success_rate[[1, 3]], before.estimate([30, 10], 6).success_rate)


def test_at_most_64_bytes_per_visited_prompt_in_memory_and_in_the_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    statistics = PromptStatistics(LogitFilter())
    assert statistics.nbytes == 0
    ids = rng.integers(0, 2**63 - 1, 40_000)
    for iteration, some in enumerate(np.split(ids, 10)):
        statistics.observe(some, rng.binomial(8, 0.4, 4000), np.full(4000, 8), iteration, np.full(4000, 800))
    statistics.estimate(ids, 10)
    assert len(statistics) == 40_000
    assert statistics.nbytes <= 64 * 40_000
    torch.save(statistics.state_dict(), tmp_path / "statistics.pt")
    assert (tmp_path / "statistics.pt").stat().st_size <= 64 * 40_000
    columns = statistics.state_dict()["columns"]
    assert sum(values.element_size() for values in columns.values()) + 16 == 56
    size = statistics.nbytes
    statistics.observe(ids[:4000], np.zeros(4000), np.full(4000, 8), 10, np.full(4000, 800))
    assert statistics.nbytes == size  # visiting again adds nothing


@pytest.mark.parametrize("visited", [500, 4000, 9000, 20_000])
@pytest.mark.parametrize("batches", [1, 20])
def test_the_limit_of_64_bytes_holds_for_any_number_of_prompts_and_iterations(visited, batches):
    statistics = PromptStatistics(LogitFilter())
    for iteration, some in enumerate(np.split(np.arange(visited) * 77, batches)):
        statistics.observe(some, np.zeros(len(some)), np.full(len(some), 8), iteration)
        assert statistics.nbytes <= 64 * len(statistics) + 664  # the shared vector: the same for any number


def test_kept_ids_show_in_nothing(monkeypatch):
    """Whether ids of the open iteration and the sample are kept or looked up is a matter of memory only."""
    outcomes = []
    for many, few in ((8, 4), (0, 0), (10**9, 10**9)):
        monkeypatch.setattr(shared_statistics, "MANY", many)
        monkeypatch.setattr(shared_statistics, "FEW", few)
        monkeypatch.setattr(LogitFilter, "sample_size", 70)
        monkeypatch.setattr(LogitFilter, "visited_size", 30)
        outcomes.append(trained(10, num_prompts=300))
        again = PromptStatistics(LogitFilter())
        again.load_state_dict(outcomes[-1].state_dict())
        assert_same(outcomes[-1], again, np.arange(310), 11)
    assert_same_checkpoint(outcomes[0], outcomes[1])
    assert_same_checkpoint(outcomes[0], outcomes[2])
    assert_same(outcomes[0], outcomes[2], np.arange(310), 10)


def test_counts_of_other_estimators_are_converted(tmp_path):
    for estimator in (BetaPosterior(half_life=float("inf")), PaperBernoulli()):
        other = trained(statistics=PromptStatistics(estimator))
        own = PromptStatistics(LogitFilter())
        with pytest.warns(UserWarning, match=f"LogitFilter goes on with the outcomes that {type(estimator).__name__}"):
            own.load_state_dict(through_disk(other.state_dict(), tmp_path / "statistics.pt"))
        assert len(own) == len(other)
        ids = np.arange(120)
        np.testing.assert_array_equal(own.estimate(ids, 6).unseen, other.estimate(ids, 6).unseen)
        seen = ids[~own.estimate(ids, 6).unseen]
        difference = own.estimate(seen, 6).success_rate - other.estimate(seen, 6).success_rate
        assert np.abs(difference).mean() < 0.06
        np.testing.assert_array_equal(own.estimate(ids, 6).response_length, other.estimate(ids, 6).response_length)
        trained(2, statistics=own, first=6)
        again = PromptStatistics(LogitFilter())
        again.load_state_dict(own.state_dict())
        assert_same(own, again, ids, 8)


def test_what_holds_no_counts_is_refused_in_one_line():
    saved = trained(statistics=PromptStatistics(ArcsineKalman())).state_dict()
    statistics = trained(2)
    with pytest.raises(UserError, match="statistics of 'ArcsineKalman', not of 'LogitFilter'") as caught:
        statistics.load_state_dict(saved)
    assert "\n" not in str(caught.value)
    assert_same(statistics, trained(2), np.arange(120), 2)
    with pytest.raises(UserError, match="statistics of 'LogitFilter', not of 'ArcsineKalman'"):
        PromptStatistics(ArcsineKalman()).load_state_dict(trained().state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared": torch.zeros(3, dtype=torch.float64)}, "'shared' has 3 numbers, not 83"),
        ({"shared": torch.full((83,), torch.nan, dtype=torch.float64)}, "'shared' is not finite"),
        ({"shared": torch.zeros(83, dtype=torch.float64)}, "population that is no distribution"),
        ({"shared": [0.0] * 83}, "'shared' is not a vector of torch.float64"),
        ({"iteration": 2}, "'iteration' is 2, but a prompt was visited in 5"),
        ({"successes": torch.full((120,), -1, dtype=torch.float32)}, "'successes' has"),
        ({"failures": torch.zeros(120, dtype=torch.float64)}, "'failures' is not a vector of torch.float32"),
    ],
)
def test_corrupt_statistics_are_refused_and_change_nothing(change, message):
    saved = trained(num_prompts=120)
    saved.observe(np.arange(120), np.zeros(120), np.ones(120), 5)
    state = saved.state_dict()
    for key, value in change.items():
        (state if key in state else state["columns"])[key] = value
    statistics = trained(2)
    with pytest.raises(UserError, match=message):
        statistics.load_state_dict(state)
    assert_same(statistics, trained(2), np.arange(120), 2)


def test_changed_settings_are_announced():
    with pytest.warns(UserWarning, match=r"goes on with {'common_drift': 0.3.*'common_drift': 0.15"):
        PromptStatistics(LogitFilter(common_drift=0.3)).load_state_dict(trained().state_dict())


def test_blocks_of_the_table_show_in_nothing(monkeypatch):
    whole = trained(12, num_prompts=150)
    monkeypatch.setattr(prompt_table, "BLOCK_SIZE", 16)
    blocks = trained(12, num_prompts=150)
    assert len(blocks._table._blocks) > 5
    assert_same(whole, blocks, np.arange(160)[::-1], 12)
    assert_same_checkpoint(whole, blocks)


def test_the_table_against_a_dictionary(monkeypatch):
    monkeypatch.setattr(prompt_table, "BLOCK_SIZE", 50)
    rng = np.random.default_rng(0)
    table, expected = PromptTable(2), {}
    for number in range(30):
        ids = rng.choice(400, 37, replace=False)
        rows = table.gather(ids)
        for row, prompt_id in enumerate(ids.tolist()):
            assert rows.known[row] == (prompt_id in expected)
            assert rows.state[0, row] == expected.get(prompt_id, 0)
        rows.state = np.stack([ids + 1000.0 * number, -1.0 * ids])
        rows.last_visit = np.full(37, number)
        table.write(rows)
        expected.update({prompt_id: prompt_id + 1000.0 * number for prompt_id in ids.tolist()})
    ids, last_visit, state, lengths = table.sorted_arrays()
    assert ids.tolist() == sorted(expected)
    assert state[0].tolist() == [expected[prompt_id] for prompt_id in sorted(expected)]
    assert (last_visit == (state[0] - ids) / 1000).all() and lengths.shape == (2, len(ids))
    assert len(table) == len(expected) and table.nbytes == len(expected) * 48


def test_the_fixed_sample_depends_on_the_set_alone_and_is_fair():
    ids = np.random.default_rng(0).permutation(100_000)
    sample = fixed_sample(ids, 2000)
    assert len(sample) == 2000
    np.testing.assert_array_equal(fixed_sample(np.sort(ids), 2000), sample)
    parts = [fixed_sample(part, 2000) for part in np.split(ids, 4)]
    np.testing.assert_array_equal(fixed_sample(np.concatenate(parts), 2000), sample)
    assert sample.mean() == pytest.approx(50_000, abs=4 * 100_000 / np.sqrt(12 * 2000))
    np.testing.assert_array_equal(fixed_sample(ids[:5], 2000), np.sort(ids[:5]))
