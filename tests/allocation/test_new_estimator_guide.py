"""The estimator of docs/new_estimator.md is what the page says: complete, short, and at home in the store."""

import importlib.util
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from dynamo_lightning.allocation import PromptStatistics, RLOORule, allocate_rollouts, variance_ratio

PAGE = Path(__file__).parents[2] / "docs" / "new_estimator.md"


@pytest.fixture(scope="module")
def code():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return block


@pytest.fixture(scope="module")
def smoothed_rate(code, tmp_path_factory):
    path = tmp_path_factory.mktemp("guide") / "smoothed_rate.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("smoothed_rate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SmoothedRate


def test_a_new_estimator_is_a_file_of_about_50_lines(code):
    assert len(code.splitlines()) <= 60


def test_the_example_by_hand(smoothed_rate):
    statistics = PromptStatistics(smoothed_rate(memory=8, shrinkage=2))
    statistics.observe([1, 2], [3, 1], [4, 4], 0)
    # Rates 3/4 and 1/4, mean 1/2: (4 · 3/4 + 2 · 1/2)/6 = 2/3; an unseen prompt has 1/2.
    np.testing.assert_allclose(statistics.estimate([1, 3], 1).success_rate, [2 / 3, 1 / 2])
    np.testing.assert_allclose(statistics.estimate([1, 3], 1).bernoulli_variance, [2 / 9, 1 / 4])
    statistics.observe([1], [0], [4], 1)
    np.testing.assert_allclose(statistics.state_dict()["columns"]["rate"], [3 / 8, 1 / 4])


def test_the_example_survives_resume_and_tells_of_changed_options(smoothed_rate):
    statistics = PromptStatistics(smoothed_rate())
    statistics.observe([1, 2], [3, 1], [4, 4], 0)
    resumed = PromptStatistics(smoothed_rate())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(statistics.state_dict())
    np.testing.assert_array_equal(resumed.estimate([1], 1).success_rate, statistics.estimate([1], 1).success_rate)
    with pytest.warns(UserWarning, match="'memory': 64"):
        PromptStatistics(smoothed_rate(memory=64)).load_state_dict(statistics.state_dict())


def test_the_example_refuses_impossible_options(smoothed_rate):
    with pytest.raises(ValueError, match="memory=0"):
        smoothed_rate(memory=0)


def test_the_example_allocates_better_than_equal_groups(smoothed_rate):
    rng = np.random.default_rng(0)
    rates = rng.beta(0.5, 0.5, 512)
    statistics = PromptStatistics(smoothed_rate())
    statistics.observe(np.arange(512), rng.binomial(48, rates), np.full(512, 48), 0)
    variances = statistics.estimate(np.arange(512), 1).bernoulli_variance
    sizes = allocate_rollouts(variances, np.arange(512), 512 * 16, 4, 32, RLOORule())
    assert variance_ratio(rates * (1 - rates), sizes) < 0.95
