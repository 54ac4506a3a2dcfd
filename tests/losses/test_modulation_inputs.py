"""What modulations and penalties are given, and what they are refused."""

import pytest
import torch

from dynamo_lightning.losses.covariance import ClipCov
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.token_statistics import TokenStatistics

ADVANTAGES = torch.tensor([1.0, -2.0])
STATISTICS = TokenStatistics(torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 1.5]), torch.zeros(2))


def test_update_sizes_are_the_advantages_before_the_first_update():
    assert ModulationInputs(STATISTICS, ADVANTAGES).sizes is ADVANTAGES
    clipped = torch.tensor([0.0, -2.0])
    assert ModulationInputs(STATISTICS, ADVANTAGES, update_sizes=clipped).sizes is clipped


def test_a_micro_batch_has_no_random_numbers():
    """Clip-Cov draws tokens at random: called on a micro-batch it says so instead of drawing others in each."""
    with pytest.raises(TypeError, match="once for a batch of rollouts"):
        ClipCov()(ModulationInputs(STATISTICS, ADVANTAGES))
    inputs = ModulationInputs(STATISTICS, ADVANTAGES, token_keys=lambda: torch.tensor([3, 1]))
    assert inputs.keys().tolist() == [3, 1]


def test_the_example_of_the_record_by_hand():
    """Above the mean entropy of all ranks, (0.5 + 1.5 + 0.1) / 3 = 0.7, is the second token only."""
    everything = ModulationInputs(STATISTICS, ADVANTAGES, lambda values: torch.cat([values, torch.tensor([0.1])]))
    above = everything.statistics.entropy > everything.gather(everything.statistics.entropy).mean()
    assert (everything.advantages * above).tolist() == [0.0, -2.0]
