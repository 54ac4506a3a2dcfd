import pytest
import torch

from dynamo_lightning.losses.entropy_advantages import EntropyAdvantages
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.token_statistics import TokenStatistics


def test_bonus_by_hand():
    entropy = torch.tensor([1.0, 5.0, 1.0, 5.0, 3.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    statistics = TokenStatistics(torch.zeros(5), entropy, torch.zeros(5))
    modulated = EntropyAdvantages(alpha=0.4, kappa=2.0)(ModulationInputs(statistics, advantages))
    # min(0.4 · 1, 1/2) = 0.4; min(0.4 · 5, 1/2) = 0.5; nothing where the advantage is 0
    torch.testing.assert_close(modulated.advantages, torch.tensor([1.4, 1.5, -0.6, -0.5, 0.0]))


def test_bonus_never_changes_the_sign():
    advantages = torch.linspace(-2, 2, 41)
    statistics = TokenStatistics(torch.zeros(41), torch.full((41,), 100.0), torch.zeros(41))
    modulated = EntropyAdvantages()(ModulationInputs(statistics, advantages)).advantages
    assert torch.equal(modulated.sign(), advantages.sign())


@pytest.mark.parametrize("settings", [{"alpha": -1.0}, {"kappa": 1.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="entropy advantages need"):
        EntropyAdvantages(**settings)
