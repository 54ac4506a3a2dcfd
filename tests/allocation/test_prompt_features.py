"""Features of prompts in the logit filter: what they gain, what they must not change, and what is refused."""

import importlib.util
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dynamo_lightning.allocation import Allocator, BetaPosterior, LogitFilter, PromptStatistics, RolloutBudget
from dynamo_lightning.allocation.estimators import feature_offsets, population
from dynamo_lightning.allocation.estimators.feature_offsets import FeatureOffsets, offset_derivatives, packed
from dynamo_lightning.allocation.estimators.logit_filter import SHARED_LENGTH, Shared
from dynamo_lightning.allocation.prompt_features import dataset_code, prompt_features
from dynamo_lightning.errors import UserError
from dynamo_lightning.types import Outcome, Prompt, RolloutGroup, Score

ROOT = Path(__file__).parents[2]
BOTH = ("length", "dataset")


def prompt(number, length=3, source="sums"):
    return Prompt(number, f"question {number}", "text", tuple(range(length)), "1", source=source)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def pool(num_prompts=300, seed=0):
    """Logits that rise with the length and differ between two data sets, and the features."""
    rng = np.random.default_rng(seed)
    length, second = rng.normal(4.5, 0.5, num_prompts), rng.random(num_prompts) < 0.4
    theta = -1 + 3 * (length - 4.5) + 2 * second + rng.normal(0, 1, num_prompts)
    return theta, np.stack([length, np.where(second, 7.0, 60_000.0)], axis=1)


def trained(iterations=8, first=0, statistics=None, names=BOTH, seed=0):
    theta, features = pool()
    statistics = PromptStatistics(LogitFilter(features=names)) if statistics is None else statistics
    columns = [BOTH.index(name) for name in names]
    for iteration in range(first, first + iterations):
        rng = np.random.default_rng([seed, iteration])
        ids = rng.choice(200, 40, replace=False)  # the last 100 stay unseen
        statistics.observe(
            ids, rng.binomial(8, sigmoid(theta[ids])), np.full(40, 8), iteration, None, features[ids][:, columns]
        )
    return statistics


def offsets_of(statistics, iteration):
    return FeatureOffsets.unpack(Shared.unpack(np.array(ahead(statistics, iteration))).features)


def ahead(statistics, iteration):
    pool = statistics._pool
    return (
        pool.ahead(np.zeros((len(statistics.estimator.columns), 0)))[1] if iteration > pool.iteration else pool.shared
    )


def assert_same(one, other, iteration):
    features = pool()[1]
    first, second = (statistics.estimate(np.arange(300), iteration, features) for statistics in (one, other))
    np.testing.assert_array_equal(first.success_rate, second.success_rate)
    np.testing.assert_array_equal(first.bernoulli_variance, second.bernoulli_variance)


def assert_same_checkpoint(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first["settings"] == second["settings"] and first["iteration"] == second["iteration"]
    for key in ("prompt_ids", "last_visit", "shared"):
        assert torch.equal(first[key], second[key])
    for column, values in first["columns"].items():
        assert torch.equal(values, second["columns"][column])


# --- without features nothing changes ---------------------------------------------------------------------------------


def test_without_features_numbers_and_checkpoint_are_those_before_there_were_any():
    """Numbers recorded with the version that had no features; bit by bit the same on the machine that recorded them."""
    rng = np.random.default_rng(14)
    theta = rng.normal(-1, 2, 300)
    statistics = PromptStatistics(LogitFilter())
    for iteration in range(12):
        ids = rng.choice(300, 40, replace=False)
        p = 1 / (1 + np.exp(-theta[ids] - 0.2 * iteration))
        statistics.observe(ids, rng.binomial(4, p), np.full(40, 4), iteration, np.full(40, 100))
        statistics.observe(ids[:20], rng.binomial(6, p[:20]), np.full(20, 6), iteration)
    ids = np.arange(290, 301)
    ignored = statistics.estimate(ids, 13, features=np.ones((11, 2))).bernoulli_variance
    np.testing.assert_array_equal(statistics.estimate(ids, 13).bernoulli_variance, ignored)
    recorded = [
        0.1047381960836448,
        0.05324446400913935,
        0.0454363709095736,
        0.14033810133706245,
        0.14033810133706245,
        0.07363037790180099,
        0.16783657513781244,
        0.10390703770017753,
        0.033021430779896,
        0.039888030720242884,
        0.14033810133706245,
    ]
    np.testing.assert_allclose(ignored, recorded, rtol=1e-6)
    state = statistics.state_dict()
    shared = [10.0, -4.0, 1.0414521438000088, 3.429746467642797e-05, 0.005807463328264361, 0.037266936758814304]
    np.testing.assert_allclose(state["shared"][[0, 1, 17, 18, 40, 60]].numpy(), shared, rtol=1e-6)
    assert state["columns"]["success_drift"].double().sum().item() == pytest.approx(614.4050331786275, rel=1e-6)
    assert list(state) == ["estimator", "settings", "prompt_ids", "last_visit", "columns", "shared", "iteration"]
    columns = ["successes", "failures", "success_drift", "failure_drift", "new_successes", "new_failures"]
    assert list(state["columns"]) == [*columns, "response_tokens", "responses"]
    assert state["settings"] == {"common_drift": 0.15, "prompt_drift": 0.05}
    assert state["shared"].shape == (83,)


# --- the coefficients -------------------------------------------------------------------------------------------------


def test_derivatives_are_those_of_the_log_marginal_likelihood():
    rng = np.random.default_rng(1)
    estimator, num_prompts, h = LogitFilter(features=["length"]), 50, 1e-4
    state = np.zeros((7, num_prompts))
    state[:2] = rng.integers(0, 6, (2, num_prompts))
    state[2:4] = 0.3 * state[:2]
    elapsed, offsets = rng.integers(0, 30, num_prompts).astype(float), rng.normal(0, 1, num_prompts)

    def evidence(shift):
        likelihood = estimator.log_likelihood(state, elapsed, population.GRID, offsets + shift)
        return np.log((population.UNIFORM_RATE * np.exp(likelihood)).sum(axis=1))

    kept = estimator._kept(state, elapsed)
    slope, information = offset_derivatives(state[:4], kept, offsets, population.UNIFORM_RATE, population.GRID)
    np.testing.assert_allclose(slope, (evidence(h) - evidence(-h)) / (2 * h), atol=1e-6)
    second = (evidence(h) - 2 * evidence(0) + evidence(-h)) / h**2
    np.testing.assert_allclose(information, np.maximum(-second, 0), atol=1e-5)


def test_a_step_is_the_ridge_regression_step_by_dense_algebra():
    rng = np.random.default_rng(2)
    code = packed(np.stack([rng.normal(4, 0.5, 80), rng.choice([3.0, 5.0, 9.0], 80)], axis=1), BOTH)
    before = FeatureOffsets.initial().standardized(code)._replace(slope=0.2)
    slope, information = rng.normal(0, 0.2, 80), rng.random(80)
    after = before.updated(code, slope, information)
    length = (code % 256 - 1) / 16
    x = np.column_stack([(length - length.mean()) / length.std(), code[:, None] // 256 == [3, 5, 9]])
    beta = np.array([0.2, 0, 0, 0])
    step = np.linalg.solve((x * information[:, None]).T @ x + np.eye(4), x.T @ slope - beta)
    assert np.abs(step).max() < 1  # else it is cut
    assert after.slope == pytest.approx(0.2 + step[0])
    centered = step[1:] - (x[:, 1:].mean(axis=0) * step[1:]).sum()
    np.testing.assert_allclose(after.intercepts, centered)
    assert after.of(code).mean() == pytest.approx(0, abs=1e-12)


def test_the_coefficients_are_found():
    """Against least squares on the true logits of the 200 visited prompts: 3 logits per nat, 2 between data sets."""
    theta, features = pool()
    x = np.column_stack([np.ones(200), features[:200, 0], features[:200, 1] == 7])
    true = np.linalg.lstsq(x, theta[:200])[0]
    found = offsets_of(trained(40), 40)
    assert found.slope / found.scale == pytest.approx(true[1], abs=0.3)
    assert found.intercepts[0] - found.intercepts[1] == pytest.approx(true[2], abs=0.4)
    assert found.codes.tolist() == [7, 60_000]


def test_unseen_prompts_are_told_apart_and_a_new_data_set_or_none_is_average():
    statistics = trained(20)
    theta, features = pool()
    unseen = statistics.estimate(np.arange(200, 300), 20, features[200:])
    assert unseen.unseen.all()
    assert np.corrcoef(unseen.success_rate, sigmoid(theta[200:]))[0, 1] > 0.75
    nothing = statistics.estimate([900], 20).success_rate
    found = offsets_of(statistics, 20)
    new = packed(np.array([[4.5, 123.0]]), BOTH)
    assert found.of(new) == pytest.approx(found.slope * ((new % 256 - 1) / 16 - found.mean) / found.scale)
    assert found.of(np.zeros(1)).tolist() == [0.0]
    assert 0.05 < nothing[0] < 0.95


def test_a_visited_prompt_has_the_shifted_population_as_its_prior():
    statistics = trained(20)
    statistics.observe([250, 251], [2, 2], [4, 4], 20, None, [[3.5, 7.0], [5.5, 7.0]])  # same outcomes, other features
    short, long = statistics.estimate([250, 251], 21).success_rate  # features are remembered
    assert short < long
    shared = Shared.unpack(ahead(statistics, 21))
    offset = shared.offsets(np.array([[0.0] * 6 + [packed(np.array([[5.5, 7.0]]), BOTH)[0]]]).T)[0]
    common_then, kept = shared.at(20), 1 / (1 + 0.05**2 * 1 * 4 * 0.25)
    p_then, steps = sigmoid(shared.thetas + offset + common_then), np.linspace(-6, 6, 2001)
    chances = shared.weights * (p_then**2 * (1 - p_then) ** 2) ** kept
    step = np.exp(-(steps**2) / 2)
    mean = (sigmoid(shared.next_logits[:, None] + offset + 0.15 * steps) * step).sum(axis=1) / step.sum()
    assert long == pytest.approx((chances * mean).sum() / chances.sum(), rel=1e-5)


# --- what it is fed with ----------------------------------------------------------------------------------------------


def test_neither_order_nor_parts_matter_and_new_data_sets_may_come_in_any_order():
    theta, features = pool()
    features[:30, 1], features[30:60, 1] = 9, 4
    whole, parts = trained(3), trained(3)
    for iteration in (3, 4):
        rng = np.random.default_rng(iteration)
        ids = np.arange(60) + 20 * (iteration - 3)
        k = rng.binomial(8, sigmoid(theta[ids]))
        whole.observe(ids, k, np.full(60, 8), iteration, None, features[ids])
        for part in np.split(rng.permutation(60), 3):
            parts.observe(ids[part], k[part], np.full(20, 8), iteration, None, features[ids[part]])
    assert_same(whole, parts, 5)
    assert_same_checkpoint(whole, parts)


def test_outcomes_of_the_same_iteration_do_not_show_in_other_prompts():
    statistics = trained(6)
    features = pool()[1]
    others = np.arange(250, 300)
    before = statistics.estimate(others, 6, features[others]).bernoulli_variance
    statistics.observe(np.arange(200, 240), np.full(40, 8), np.full(40, 8), 6, None, features[200:240])
    np.testing.assert_array_equal(statistics.estimate(others, 6, features[others]).bernoulli_variance, before)
    assert np.abs(statistics.estimate(others, 7, features[others]).bernoulli_variance - before).max() > 1e-3


@pytest.mark.parametrize("names", [("length",), ("dataset",), BOTH])
def test_resume_is_exact(tmp_path, names):
    columns = [BOTH.index(name) for name in names]
    uninterrupted = trained(5, names=names)
    torch.save(uninterrupted.state_dict(), tmp_path / "statistics.pt")
    resumed = PromptStatistics(LogitFilter(features=names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(torch.load(tmp_path / "statistics.pt", weights_only=True))
    for statistics in (uninterrupted, resumed):
        trained(4, first=5, statistics=statistics, names=names)
    features = pool()[1][:, columns]
    first, second = (statistics.estimate(np.arange(300), 9, features) for statistics in (uninterrupted, resumed))
    np.testing.assert_array_equal(first.bernoulli_variance, second.bernoulli_variance)
    assert_same_checkpoint(uninterrupted, resumed)


def test_a_checkpoint_with_other_features_is_taken_up_without_them():
    plain = PromptStatistics(LogitFilter())
    with pytest.warns(UserWarning, match=r"goes on with .* but old outcomes were added up with .*features"):
        plain.load_state_dict(trained(6).state_dict())
    trained(2, first=6, statistics=plain, names=())
    some = PromptStatistics(LogitFilter(features=["length"]))
    with pytest.warns(UserWarning, match="goes on with"):
        some.load_state_dict(plain.state_dict())
    trained(20, first=8, statistics=some, names=("length",))
    assert offsets_of(some, 28).slope > 0.5
    counts = PromptStatistics(BetaPosterior())
    counts.observe(np.arange(40), np.full(40, 3), np.full(40, 8), 0)
    converted = PromptStatistics(LogitFilter(features=BOTH))
    with pytest.warns(UserWarning, match="LogitFilter goes on with the outcomes that BetaPosterior"):
        converted.load_state_dict(counts.state_dict())
    trained(2, first=1, statistics=converted)


def test_at_most_64_bytes_per_visited_prompt():
    rng = np.random.default_rng(0)
    statistics = PromptStatistics(LogitFilter(features=BOTH))
    ids = rng.integers(0, 2**63 - 1, 20_000)
    for iteration, some in enumerate(np.split(ids, 10)):
        features = np.stack([rng.normal(5, 1, 2000), rng.integers(1, 6, 2000)], axis=1)
        statistics.observe(some, np.zeros(2000), np.full(2000, 8), iteration, None, features)
        shared = 8 * (SHARED_LENGTH + 3 + 2 * 5)
        assert statistics.nbytes <= 64 * len(statistics) + shared


# --- from prompts to plans --------------------------------------------------------------------------------------------


def test_the_allocator_hands_on_the_features_of_its_prompts():
    budget = RolloutBudget(rollouts_per_prompt=4, min_rollouts=2, max_rollouts=8)
    allocator = Allocator(budget, LogitFilter(features=BOTH))
    for iteration in range(12):
        prompts = [prompt(100 * iteration + number, 4 if number % 2 else 60, "ab"[number % 2]) for number in range(24)]
        groups = []
        for plan in allocator.plan(prompts, iteration):
            # Short prompts of data set b: half of the rollouts are right. Long ones of data set a: none is.
            rewards = [float(number % 2 and plan.prompt.source == "b") for number in range(plan.size)]
            outcomes = tuple(
                Outcome(plan.prompt.prompt_id, row, Score(r, {}), 5, False) for row, r in enumerate(rewards)
            )
            groups.append(RolloutGroup(plan, (), outcomes))
        allocator.observe(groups, iteration)
    hard, easy = allocator.plan([prompt(9001, 60, "a"), prompt(9002, 4, "b")], 12)
    assert hard.unseen and easy.unseen
    assert hard.success_rate < 0.15 and easy.success_rate > 0.3
    assert easy.size > hard.size and easy.size + hard.size == 8
    plain = Allocator(budget, LogitFilter())
    assert plain._features([prompt(1)], 0) is None


def test_features_of_prompts_by_hand():
    values = prompt_features([prompt(1, 20, "a"), prompt(2, 1, "b")], BOTH)
    assert values[:, 0].tolist() == [math.log(20), 0.0]
    assert values[0, 1] == dataset_code(prompt(3, 9, "a")) != values[1, 1]
    assert ((values[:, 1] >= 1) & (values[:, 1] <= 65_535)).all()
    code = packed(values, BOTH)
    assert code.tolist() == [1 + round(16 * math.log(20)) + 256 * values[0, 1], 1 + 256 * values[1, 1]]
    assert code.astype(np.float32).astype(float).tolist() == code.tolist()
    assert packed(np.array([[99.0, 65_535.0]]), BOTH)[0] == 2**24 - 1 == np.float32(2**24 - 1)
    assert feature_offsets.FEATURES == (*BOTH, "hidden_state")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["lenght"], ["length", "length"], ["length", "hidden_states"], "source"])
def test_unknown_or_repeated_features_are_refused(names):
    with pytest.raises(UserError, match=r"features=.* distinct names among \['length', 'dataset', 'hidden_state'\]"):
        LogitFilter(features=names)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, "the features are missing"),
        ([[1.0, 2.0]], r"features of shape \(1, 2\) for 2 prompts"),
        ([[1.0, 2.0], [math.nan, 2.0]], "prompt id 6 has .*nan.* not finite"),
        ([[math.inf, 2.0], [1.0, 2.0]], "prompt id 5 has .*inf.* not finite"),
    ],
)
def test_missing_features_are_refused_and_change_nothing(features, message):
    statistics = trained(2)
    with pytest.raises(UserError, match=rf"data\.estimator\.features=\['length', 'dataset'\]: {message}") as caught:
        statistics.observe([5, 6], [1, 1], [2, 2], 3, None, features)
    assert "\n" not in str(caught.value)
    assert_same_checkpoint(statistics, trained(2))
    if features is not None:
        with pytest.raises(UserError, match=message):
            statistics.estimate([5, 6], 3, features)


@pytest.mark.parametrize(
    ("bad", "fault"), [(prompt(1, 0), "has no tokens"), (prompt(1, 3, ""), "no name of a data set")]
)
def test_a_prompt_without_the_feature_is_refused(bad, fault):
    allocator = Allocator(
        RolloutBudget(rollouts_per_prompt=4, min_rollouts=2, max_rollouts=8), LogitFilter(features=BOTH)
    )
    with pytest.raises(UserError, match=rf"data\.estimator\.features=.*prompt id 1 .*{fault}.*; remove"):
        allocator.plan([prompt(2), bad], 0)


@pytest.mark.parametrize("change", ["column", "length", "scale"])
def test_a_corrupt_checkpoint_is_refused(change):
    state = trained(2).state_dict()
    if change == "column":
        state["columns"]["features"][0] = 0.5
    elif change == "length":
        state["shared"] = state["shared"][:-1]
    else:
        state["shared"][SHARED_LENGTH + 1] = 0.0
    with pytest.raises(UserError, match=r"corrupt: .*features"):
        PromptStatistics(LogitFilter(features=BOTH)).load_state_dict(state)


# --- what it gains ----------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    spec = importlib.util.spec_from_file_location("feature_pools", ROOT / "benchmarks" / "feature_pools.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_half_of_the_spread_explained_gains_in_the_first_epoch_and_noise_costs_nothing(benchmark):
    """One epoch of 1,100 prompts: equal groups without features."""
    ratio = {}
    for explained in (0.5, 0.0):
        runs = [benchmark.train("length", explained, 0.0, "features", seed, iterations=34)[::2] for seed in range(3)]
        ratio[explained] = np.mean(runs, axis=0)
    assert 0.95 < ratio[0.5][0] < 0.985 and ratio[0.5][1] > 0.08
    assert ratio[0.0][0] < 1.004 and abs(ratio[0.0][1]) < 0.02


def test_the_shipped_table_shows_the_gain():
    table = json.loads((ROOT / "benchmarks" / "results" / "allocation.json").read_text())["features"]
    rows = {(row["feature"], row["explained"], row["rise"], row["arm"]): row for row in table}
    assert len(rows) == len(table) == 15
    for (feature, explained, rise, arm), row in rows.items():
        if arm == "features":
            none = rows[feature, explained, rise, "none"]
            assert none["first"] == pytest.approx(1.0, abs=0.001)
            if explained:
                assert row["first_high"] < 0.99 and row["ratio"] < none["ratio"] and row["unseen_r2"] > 0.08
            else:
                assert row["first"] < 1.002 and row["ratio"] < none["ratio"] + 0.003
