import math

import pytest
import torch

from dynamo_lightning.losses.engine_mismatch import EngineMismatch, engine_weights, mismatch_metrics

LOG2, LOG3 = math.log(2), math.log(3)
OLD = torch.tensor([-1.0, -1.0, -1.0, -2.0, -2.0])
ENGINE = torch.tensor([-1.0, -1.0 - LOG3, -1.0 + LOG2, -2.0 - LOG2, -2.0 - LOG2])
SEQUENCES = torch.tensor([0, 0, 0, 1, 1])  # token ratios 1, 3, 1/2 | 2, 2; sequence ratios 3/2 | 4


def weigh(**options):
    return engine_weights(OLD, ENGINE, SEQUENCES, EngineMismatch(**options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 1 / 2, 2, 2]),
        ({"method": "mask", "cap": 2.5}, [1, 0, 1 / 2, 2, 2]),
        ({"method": "off"}, [1, 1, 1, 1, 1]),
        ({"cap": 10.0}, [1, 3, 1 / 2, 2, 2]),
        ({"level": "sequence"}, [1.5, 1.5, 1.5, 2, 2]),
        ({"level": "sequence", "method": "mask"}, [1.5, 1.5, 1.5, 0, 0]),
        ({"level": "sequence", "cap": 5.0}, [1.5, 1.5, 1.5, 4, 4]),
    ],
)
def test_weights_by_hand(options, expected):
    torch.testing.assert_close(weigh(**options)[0], torch.tensor(expected, dtype=torch.float32))


def test_metrics_by_hand_over_two_ranks():
    _, first = weigh(cap=2.5)
    _, second = engine_weights(torch.zeros(1), torch.tensor([LOG2]), torch.tensor([0]), EngineMismatch())
    metrics = mismatch_metrics([first, second])
    assert metrics == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": (LOG3 + 4 * LOG2) / 6,
            "sampling/sampling_logp_difference/max": LOG3,
            "sampling/importance_sampling_ratio/min": 1 / 2,
            "sampling/importance_sampling_ratio/mean": (1 + 3 + 1 / 2 + 2 + 2 + 1 / 2) / 6,
            "sampling/importance_sampling_ratio/max": 3,
            "sampling/frac_cut": 1 / 6,
        },
        rel=1e-6,
    )


def test_an_engine_that_agrees_changes_nothing():
    weights, summary = engine_weights(OLD, OLD, SEQUENCES, EngineMismatch(level="sequence", method="mask"))
    assert weights.tolist() == [1.0] * 5
    assert (summary.difference_max, summary.num_cut) == (0.0, 0)


def test_a_rank_without_tokens_joins_in():
    nothing = torch.zeros(0)
    weights, summary = engine_weights(nothing, nothing, nothing.long(), EngineMismatch(level="sequence"))
    assert weights.shape == (0,)
    assert mismatch_metrics([summary, weigh()[1]]) == mismatch_metrics([weigh()[1]])
    assert mismatch_metrics([summary]) == {}


@pytest.mark.parametrize("method", ["truncate", "mask"])
def test_ratios_beyond_floating_point_stay_finite(method):
    old, engine = torch.zeros(4), torch.full((4,), -500.0)
    weights, summary = engine_weights(old, engine, torch.zeros(4).long(), EngineMismatch("sequence", method))
    assert weights.tolist() == [2.0 if method == "truncate" else 0.0] * 4
    assert math.isfinite(summary.ratio_sum)


def test_truncated_weights_make_the_expectation_unbiased_up_to_the_cap():
    """Σ_a π_engine(a) w(a) f(a) = Σ_a π_old(a) f(a), exactly, where no ratio exceeds the cap."""
    torch.manual_seed(0)
    old, engine = torch.randn(2, 50).double().mul(0.3).log_softmax(-1)
    values = torch.randn(50).double()
    weights, summary = engine_weights(old, engine, torch.arange(50), EngineMismatch(cap=100.0))
    assert summary.num_cut == 0
    torch.testing.assert_close((engine.exp() * weights * values).sum(), (old.exp() * values).sum())


def test_impossible_cap_is_refused():
    with pytest.raises(ValueError, match=r"model\.loss\.engine_mismatch\.cap must be at least 1, got 0.5"):
        EngineMismatch(cap=0.5)
