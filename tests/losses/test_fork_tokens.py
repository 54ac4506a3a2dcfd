import pytest
import torch

from dynamo_lightning.losses.fork_tokens import ForkTokens
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.token_statistics import TokenStatistics


def statistics_of(entropies):
    entropy = torch.tensor(entropies)
    return TokenStatistics(torch.zeros_like(entropy), entropy, torch.zeros_like(entropy))


def test_only_the_fifth_of_highest_entropy_keeps_its_advantage():
    entropies = [0.1, 2.0, 0.3, 0.2, 1.5, 0.0, 0.4, 0.5, 0.6, 0.7]
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])
    modulated = ForkTokens()(ModulationInputs(statistics_of(entropies), advantages))
    assert modulated.advantages.tolist() == [0, -1, 0, 0, 0.5, 0, 0, 0, 0, 0]
    assert float(modulated.indicators["mod/frac_fork_tokens"].mean()) == pytest.approx(0.2)


def test_the_kept_tokens_are_those_in_the_denominators():
    modulated = ForkTokens(0.5)(ModulationInputs(statistics_of([0.1, 2.0, 0.3, 0.2]), torch.zeros(4)))
    assert modulated.kept.tolist() == [False, True, True, False]


def test_threshold_is_that_of_all_ranks():
    """The other rank has the tokens of highest entropy: none of ours is a fork."""
    everything = torch.tensor([0.1, 0.2, 0.3, 0.4, 5.0])
    modulated = ForkTokens()(
        ModulationInputs(statistics_of([0.1, 0.2, 0.3, 0.4]), torch.ones(4), lambda values: everything)
    )
    assert modulated.advantages.tolist() == [0, 0, 0, 0]


def test_equal_entropies_at_the_threshold_all_count():
    modulated = ForkTokens()(ModulationInputs(statistics_of([1.0] * 10), torch.ones(10)))
    assert modulated.advantages.tolist() == [1.0] * 10


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_impossible_shares_are_refused(share):
    with pytest.raises(ValueError, match=rf"fork_share in \(0, 1\], got {share}"):
        ForkTokens(share)
