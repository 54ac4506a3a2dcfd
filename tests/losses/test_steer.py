import math

import pytest
import torch

from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.steer import Steer
from dynamo_lightning.losses.token_statistics import TokenStatistics

PROBS = torch.tensor([0.5, 0.25, 0.5], dtype=torch.float64)
ENTROPY = torch.tensor([1.0, 2.0, math.log(2.0)], dtype=torch.float64)
STATISTICS = TokenStatistics(PROBS.log(), ENTROPY, torch.zeros(3, dtype=torch.float64))
ADVANTAGES = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("exponent", [1, 2])
def test_weights_by_hand(exponent):
    weight = Steer(min_weight=0.8, exponent=exponent)(ModulationInputs(STATISTICS, ADVANTAGES)).advantages
    # |Ω| = |A| (1 − π)^e |log π + H|; the last token's log π + H is 0
    first = 0.5**exponent * (1.0 - math.log(2.0))
    second = 2.0 * 0.75**exponent * (2.0 - math.log(4.0))
    expected = [0.8 ** (first / second), -2.0 * 0.8, 3.0]
    assert weight.tolist() == pytest.approx(expected)


def test_scale_is_that_of_all_ranks():
    whole = Steer()(ModulationInputs(STATISTICS, ADVANTAGES))
    part = TokenStatistics(PROBS[:1].log(), ENTROPY[:1], torch.zeros(1))
    largest = torch.tensor([2.0 * 0.75**2 * (2.0 - math.log(4.0))], dtype=torch.float64)
    alone = Steer()(ModulationInputs(part, ADVANTAGES[:1], lambda values: torch.cat([values, largest])))
    torch.testing.assert_close(alone.advantages, whole.advantages[:1])


def test_tiny_changes_are_hardly_damped():
    weight = Steer(smallest_change=0.02)(ModulationInputs(STATISTICS, 1e-6 * ADVANTAGES)).factors["steer_weight"]
    assert weight.min() > 0.9999


@pytest.mark.parametrize("settings", [{"min_weight": 0.0}, {"exponent": 0}, {"smallest_change": 0.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="STEER needs"):
        Steer(**settings)
