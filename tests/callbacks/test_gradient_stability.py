import math
from dataclasses import replace

import pytest

from dynamo_lightning.callbacks import GradientStabilityMonitor


def test_measures_by_hand(train, make_record):
    norms = [(1.0, 2.0), (), (4.0, 1.0)]  # the second iteration taught nothing

    def script(iteration):
        return replace(make_record(iteration), gradient_norms=norms[iteration])

    logged = train([GradientStabilityMonitor()], script=script, epoch_length=3).logged
    # mean 2, deviations −1, 0, 2, −1: variance 6/3
    assert logged["stability/grad_norm_cv"][-1] == pytest.approx(math.sqrt(2) / 2)
    # log ratios ln 2 · (1, 1, −2): mean 0, variance 6/2 · ln² 2
    assert logged["stability/log_grad_norm_sd"][-1] == pytest.approx(math.sqrt(3) * math.log(2))
    # sorted 1, 1, 2, 4: median 1.5; 99 % at rank 2.97: 2 + 0.97 · 2
    assert logged["stability/grad_norm_p99_over_p50"][-1] == pytest.approx(3.94 / 1.5)


def test_measures_wait_until_they_are_defined():
    monitor = GradientStabilityMonitor()
    monitor._norms.extend([1.0])
    assert monitor.measures() == {}
    monitor._norms.extend([3.0])
    assert monitor.measures()["stability/grad_norm_cv"] == pytest.approx(math.sqrt(2) / 2)
    assert "stability/log_grad_norm_sd" not in monitor.measures()


def test_norms_without_a_logarithm_are_skipped(train, make_record):
    monitor = GradientStabilityMonitor()
    norms = (0.0, 1.0, math.inf, math.nan, 2.0)
    train([monitor], script=lambda i: replace(make_record(i), gradient_norms=norms), epoch_length=1)
    assert monitor.state_dict() == {"norms": [1.0, 2.0]}


def test_window_forgets_and_survives_its_state():
    monitor = GradientStabilityMonitor(window=3)
    monitor._norms.extend([9.0, 1.0, 2.0, 4.0])
    resumed = GradientStabilityMonitor(window=3)
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.state_dict() == {"norms": [1.0, 2.0, 4.0]}
    assert resumed.measures() == monitor.measures()
