import math

import pytest
import torch

from dynamo_lightning.losses.modulation import (
    DynamoModulation,
    compensation_factor,
    entropy_change,
    nearest_rank_quantile,
    stabilisation_factor,
)
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.token_statistics import TokenStatistics, statistics_from_logits


def entropy_of(logits):
    return -(torch.softmax(logits, -1) * torch.log_softmax(logits, -1)).sum(-1)


@pytest.mark.parametrize("advantage", [1.0, -0.7])
def test_entropy_change_equals_finite_differences(advantage):
    """ΔH is the derivative of H along `advantage · ∇_z log π(a)`, the token's own policy gradient on its logits."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(6, 9, generator=generator, dtype=torch.float64)
    actions = torch.randint(9, (6,), generator=generator)
    statistics = TokenStatistics(*statistics_from_logits(logits, actions))
    gradient = torch.nn.functional.one_hot(actions, 9) - torch.softmax(logits, -1)
    step = 1e-6
    numeric = (entropy_of(logits + step * advantage * gradient) - entropy_of(logits - step * advantage * gradient)) / (
        2 * step
    )
    ours = entropy_change(statistics, torch.full((6,), advantage, dtype=torch.float64))
    torch.testing.assert_close(ours, numeric, atol=1e-7, rtol=1e-6)


def test_expectation_is_over_the_vocabulary_and_not_over_the_sequence():
    """Guard: tokens of equal distributions have equal Σπ²Λ whatever was sampled around them."""
    logits = torch.tensor([[2.0, 0.0, -1.0]]).repeat(3, 1)
    first = statistics_from_logits(logits, torch.tensor([0, 0, 0]))[2]
    second = statistics_from_logits(logits, torch.tensor([0, 1, 2]))[2]
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_compensation_by_hand():
    entropy = torch.tensor([0.0, 0.5, 1.0, 0.0, 2.0])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0])
    factor = compensation_factor(entropy, advantages, alpha=0.4, entropy_min=0.0, entropy_max=1.0)
    torch.testing.assert_close(factor, torch.tensor([1.4, 1.2, 1.0, 1.0, 1.0]))


def test_compensation_is_one_where_all_entropies_are_equal():
    factor = compensation_factor(torch.ones(3), torch.ones(3), alpha=0.4, entropy_min=1.0, entropy_max=1.0)
    assert factor.tolist() == [1.0, 1.0, 1.0]


def test_stabilisation_by_hand():
    change = torch.tensor([0.0, -0.9, 1.0, 5.0])
    factor = stabilisation_factor(change, alpha=0.4, gamma=50.0, tau=0.9, change_max=1.0)
    at_largest = 0.6 + 0.4 / (1 + math.exp(50 * 0.1))
    torch.testing.assert_close(factor, torch.tensor([1.0, 0.8, at_largest, at_largest]), atol=1e-6, rtol=0)


def test_stabilisation_is_one_where_no_entropy_changes():
    assert stabilisation_factor(torch.zeros(2), alpha=0.4, gamma=50.0, tau=0.9, change_max=0.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1.0), (0.01, 1.0), (0.99, 99.0), (1.0, 100.0), (0.501, 51.0)])
def test_quantile_is_the_nearest_rank(q, expected):
    values = torch.arange(1.0, 101.0)[torch.randperm(100)]
    assert nearest_rank_quantile(values, q) == expected


def make_statistics(num_tokens=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.rand(num_tokens, 1, generator=generator) * torch.randn(num_tokens, 7, generator=generator)
    targets = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator).squeeze(-1)
    advantages = torch.randn(num_tokens, generator=generator)
    return TokenStatistics(*statistics_from_logits(logits, targets)), advantages


def part_of(statistics, rows):
    return TokenStatistics(*(column[rows] for column in vars(statistics).values()))


@pytest.mark.parametrize("normaliser", ["max", "quantile"])
def test_modulation_does_not_depend_on_how_tokens_are_spread_over_ranks(normaliser):
    """Guard: normalisers are those of all ranks, never of one micro-batch or rank."""
    statistics, advantages = make_statistics()
    modulation = DynamoModulation(normaliser=normaliser)
    whole = modulation(ModulationInputs(statistics, advantages)).advantages
    parts = []
    for rows in (slice(0, 100), slice(100, 400)):
        # What a rank gathers is the same column of all tokens: entropies first, then entropy changes.
        columns = iter([statistics.entropy, entropy_change(statistics, advantages).abs()])
        parts.append(
            modulation(
                ModulationInputs(part_of(statistics, rows), advantages[rows], lambda _, c=columns: next(c))
            ).advantages
        )
    torch.testing.assert_close(torch.cat(parts), whole, atol=0, rtol=0)


@pytest.mark.parametrize("num_idle", [0, 300, 9_700, 30_000])
def test_damping_does_not_depend_on_how_many_tokens_have_no_advantage(num_idle):
    """300 tokens with an advantage: the quantile of their entropy changes is the 297th of them, by sorting."""
    statistics, advantages = make_statistics(300)
    idle, _ = make_statistics(num_idle, seed=1) if num_idle else (part_of(statistics, slice(0, 0)), None)
    both = TokenStatistics(
        *(torch.cat([a, b]) for a, b in zip(vars(statistics).values(), vars(idle).values(), strict=True))
    )
    found = DynamoModulation(compensation_alpha=0.0)(
        ModulationInputs(both, torch.cat([advantages, torch.zeros(num_idle)]))
    )
    changes = entropy_change(statistics, advantages).abs()
    largest = sorted(changes.tolist())[296]
    expected = stabilisation_factor(changes, alpha=0.4, gamma=50.0, tau=0.9, change_max=largest)
    torch.testing.assert_close(found.factors["beta_stab"][:300], expected, atol=0, rtol=0)
    assert int((expected < 0.8).sum()) >= 4


def test_below_a_hundred_changes_the_quantile_is_their_maximum():
    statistics, advantages = make_statistics(99)
    quantile, largest = (
        DynamoModulation(compensation_alpha=0.0, normaliser=kind)(ModulationInputs(statistics, advantages)).factors[
            "beta_stab"
        ]
        for kind in ("quantile", "max")
    )
    assert torch.equal(quantile, largest) and quantile.min() < 0.61


def test_each_factor_switches_off_on_its_own():
    statistics, advantages = make_statistics()
    neither = DynamoModulation(compensation_alpha=0.0, stabilisation_alpha=0.0)(
        ModulationInputs(statistics, advantages)
    )
    assert torch.equal(neither.advantages, advantages)
    only_first = DynamoModulation(stabilisation_alpha=0.0)(ModulationInputs(statistics, advantages)).factors
    assert only_first["beta_comp"].max() > 1.1 and set(only_first["beta_stab"].tolist()) == {1.0}
    only_second = DynamoModulation(compensation_alpha=0.0)(ModulationInputs(statistics, advantages)).factors
    assert only_second["beta_stab"].min() < 0.9 and set(only_second["beta_comp"].tolist()) == {1.0}


def test_quantile_normaliser_resists_an_outlier():
    statistics, advantages = make_statistics()
    outlier = advantages.clone()
    outlier[entropy_change(statistics, advantages).abs().argmax()] *= 1000
    for normaliser, least in (("max", 0), ("quantile", 4)):
        damped = (
            DynamoModulation(normaliser=normaliser)(ModulationInputs(statistics, outlier)).factors["beta_stab"] < 0.8
        )
        assert int(damped.sum()) >= least
    assert (
        int(
            (DynamoModulation(normaliser="max")(ModulationInputs(statistics, outlier)).factors["beta_stab"] < 0.8).sum()
        )
        == 1
    )


@pytest.mark.parametrize("settings", [{"compensation_alpha": -0.1}, {"stabilisation_alpha": 1.5}, {"quantile": 0.2}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="modulation needs"):
        DynamoModulation(**settings)
