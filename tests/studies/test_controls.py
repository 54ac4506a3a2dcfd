"""Controls keep what they say and change what they say."""

import numpy as np
import pytest
import torch

pytest.importorskip("studies", reason="needs a checkout, and `python -m pytest` from its root")

from dynamo_lightning.allocation import BetaPosterior
from dynamo_lightning.losses.modulation import DynamoModulation
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.token_statistics import TokenStatistics
from studies.controls import PermutedBetaPosterior, ScalarModulation, ShuffledModulation


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 7, generator=generator)
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    tokens = torch.multinomial(probs, 1, generator=generator)[:, 0]
    entropy = -(probs * logprobs).sum(-1)
    statistics = TokenStatistics(
        logprobs=logprobs.gather(1, tokens[:, None])[:, 0],
        entropy=entropy,
        squared_prob_lambda=(probs**2 * (logprobs + entropy[:, None])).sum(-1),
        squared_probs=(probs**2).sum(-1),
    )
    advantages = torch.tensor([0.5, -0.5, 0.0, 1.0]).repeat(100)
    return ModulationInputs(statistics, advantages)


def factors(modulation, inputs):
    counted = inputs.advantages != 0
    return (modulation(inputs).advantages[counted] / inputs.advantages[counted]).double()


def test_shuffled_factors_are_the_same_factors_on_other_tokens(inputs):
    ours, shuffled = factors(DynamoModulation(), inputs), factors(ShuffledModulation(), inputs)
    assert len(ours.unique()) > 50
    torch.testing.assert_close(shuffled.sort().values, ours.sort().values, rtol=1e-5, atol=0)
    assert (shuffled != ours).double().mean() > 0.9


def test_scalar_factors_are_all_the_mean_factor(inputs):
    ours, scalar = factors(DynamoModulation(), inputs), factors(ScalarModulation(), inputs)
    torch.testing.assert_close(scalar, ours.mean().expand(len(ours)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("modulation", [ScalarModulation, ShuffledModulation])
def test_tokens_without_advantage_keep_none(inputs, modulation):
    assert (modulation()(inputs).advantages[inputs.advantages == 0] == 0).all()


def test_permuted_weights_are_the_same_weights_of_other_prompts():
    state, elapsed = np.stack([np.arange(50.0), np.arange(50.0)[::-1]]), np.ones(50)
    weights = BetaPosterior(100).bernoulli_variance(state, elapsed, (1.0, 1.0))
    estimator = PermutedBetaPosterior(100)
    first, second = (estimator.bernoulli_variance(state, elapsed, (1.0, 1.0)) for _ in range(2))
    np.testing.assert_array_equal(np.sort(first), np.sort(weights))
    assert (first != weights).any() and (first != second).any()
