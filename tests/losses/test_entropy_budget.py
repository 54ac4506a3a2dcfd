"""The entropy budget: its level against brute force, its invariants, and how the gain and the budget follow."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.entropy_budget import EntropyBudget, damping_level
from dynamo_lightning.losses.modulation import DynamoModulation, entropy_change, step_lengthening
from dynamo_lightning.losses.modulation_inputs import ModulationInputs
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.losses.token_statistics import TokenStatistics, statistics_from_logits


def make_inputs(num_tokens=60, seed=0, scale=1.0, gather=None):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_tokens, 9, generator=generator, dtype=torch.float64)
    # Likely tokens that are mostly rewarded: the whole step lowers the entropy.
    statistics = TokenStatistics(*statistics_from_logits(logits, logits.argmax(-1)))
    advantages = scale * (1 + torch.randn(num_tokens, generator=generator, dtype=torch.float64))
    weights = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    options = {} if gather is None else {"gather": gather}
    return ModulationInputs(statistics, advantages, token_weights=lambda: weights, **options)


def changes_of(inputs):
    return inputs.loss_weights() * entropy_change(inputs.statistics, inputs.advantages)


def record(iteration=0, change=None, entropy=1.0):
    metrics = {} if change is None else {"probe/entropy_change": change}
    return SimpleNamespace(metrics=metrics, entropy=entropy, batch=SimpleNamespace(iteration=iteration))


def with_gain(gain, **options):
    budget = EntropyBudget(**options)
    budget.load_state_dict({"budget": budget.budget, "gain": gain, "sums": [gain, 1.0], "first": []})
    return budget


def damped_sum(changes, level):
    return float(torch.where(changes < 0, changes.clamp(min=-level), changes).sum())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_level_spends_exactly_the_budget(share):
    changes = changes_of(make_inputs())
    least = share * float(changes.sum())
    assert float(changes.sum()) < 0
    level = damping_level(changes, least)
    assert damped_sum(changes, level) == pytest.approx(least, abs=1e-12)


def test_level_by_hand():
    # Falls 1, 2, 4 and a rise of 1: min(1, c) + min(2, c) + min(4, c) = 1 + 4 at c = 2.
    changes = torch.tensor([-1.0, -2.0, -4.0, 1.0])
    assert damping_level(changes, -4.0) == pytest.approx(2.0)
    assert damping_level(changes, -6.0) == math.inf
    assert damping_level(torch.tensor([-1.0, -2.0]), 0.0) == 0.0


def test_before_the_first_measurement_and_within_budget_nothing_is_damped():
    inputs = make_inputs()
    for budget in (EntropyBudget(budget=0.0), with_gain(1.0, budget=1e6)):
        found = budget(inputs)
        assert torch.equal(found.advantages, inputs.advantages) and (found.factors["beta_budget"] == 1).all()


def test_the_predicted_change_meets_the_budget_in_nats():
    inputs, gain = make_inputs(), 0.3
    found = with_gain(gain, budget=0.2)(inputs)
    factor = found.factors["beta_budget"]
    assert gain * float((factor * changes_of(inputs)).sum()) == pytest.approx(-0.2)
    assert (factor[changes_of(inputs) >= 0] == 1).all() and (factor <= 1).all() and (factor < 1).any()


def test_a_budget_of_zero_lets_falls_only_make_up_for_rises():
    inputs = make_inputs()
    factor = with_gain(1.0, budget=0.0)(inputs).factors["beta_budget"]
    assert float((factor * changes_of(inputs)).sum()) == pytest.approx(0.0, abs=1e-12)


def test_a_larger_budget_never_damps_more():
    factors = [with_gain(1.0, budget=b)(make_inputs()).factors["beta_budget"] for b in (0.0, 0.1, 0.3, 1.0, 3.0)]
    assert all((small <= large).all() for small, large in pairwise(factors))


def test_tokens_without_an_advantage_change_nothing():
    inputs = make_inputs()
    idle = make_inputs(200, seed=1)
    statistics = TokenStatistics(
        *(
            torch.cat([a, b])
            for a, b in zip(vars(inputs.statistics).values(), vars(idle.statistics).values(), strict=True)
        )
    )
    weights = torch.cat([inputs.loss_weights(), idle.loss_weights()])
    advantages = torch.cat([inputs.advantages, torch.zeros(200, dtype=torch.float64)])
    both = with_gain(1.0, budget=0.2)(ModulationInputs(statistics, advantages, token_weights=lambda: weights))
    alone = with_gain(1.0, budget=0.2)(inputs)
    torch.testing.assert_close(both.advantages[:60], alone.advantages)


def test_ranks_that_share_the_tokens_damp_what_one_damps():
    inputs = make_inputs()
    whole, parts = with_gain(1.0, budget=0.2), []
    expected = whole(inputs).advantages
    everything = changes_of(inputs)
    for rows in (slice(0, 20), slice(20, 60)):
        statistics = TokenStatistics(*(column[rows] for column in vars(inputs.statistics).values()))
        weights = inputs.loss_weights()[rows]
        share = ModulationInputs(
            statistics, inputs.advantages[rows], lambda _: everything, token_weights=lambda w=weights: w
        )
        rank = with_gain(1.0, budget=0.2)
        parts.append(rank(share).advantages)
        rank.after_iteration(record(change=-0.1))
        whole_after = with_gain(1.0, budget=0.2)
        whole_after(inputs)
        whole_after.after_iteration(record(change=-0.1))
        assert rank.gain == pytest.approx(whole_after.gain)
    torch.testing.assert_close(torch.cat(parts), expected)


def test_the_scale_of_advantages_changes_nothing_once_the_gain_has_followed():
    factors = []
    for scale in (1.0, 10.0):
        budget = EntropyBudget(budget=0.02)
        budget(make_inputs(scale=scale))
        budget.after_iteration(record(change=-0.05))  # what the same step changes, whatever its scale
        factors.append(budget(make_inputs(scale=scale)).factors["beta_budget"])
    torch.testing.assert_close(*factors)
    assert (factors[0] < 1).any()


def test_the_gain_is_the_running_ratio_of_measured_to_predicted_change():
    budget, inputs = EntropyBudget(budget=1e6), make_inputs()
    predicted = float(changes_of(inputs).sum())
    budget(inputs)
    budget.after_iteration(record(change=0.5 * predicted))
    assert budget.gain == pytest.approx(0.5)
    budget(inputs)
    budget.after_iteration(record(change=0.2 * predicted))
    old = 0.5**0.5
    assert budget.gain == pytest.approx((0.5 * old + 0.2) / (old + 1))


def test_a_gain_of_the_wrong_sign_and_an_empty_prediction_keep_the_last_one():
    budget = with_gain(0.4, budget=0.1)
    budget(make_inputs())
    budget.after_iteration(record(change=+5.0))
    assert budget.gain == 0.4
    budget(make_inputs(scale=0.0))
    budget.after_iteration(record(change=-1.0))
    assert budget.gain == 0.4


def test_dual_ascent_follows_a_path_and_stops_at_zero():
    budget = EntropyBudget(budget=0.01, final_entropy=0.5, final_iteration=10, dual_rate=0.1)
    budget.after_iteration(record(0, entropy=1.0))  # on the path
    assert budget.current_budget == pytest.approx(0.01)
    budget.after_iteration(record(5, entropy=0.85))  # wanted 0.75
    assert budget.current_budget == pytest.approx(0.02)
    budget.after_iteration(record(20, entropy=0.2))  # wanted 0.5 from iteration 10 on
    assert budget.current_budget == 0.0
    assert EntropyBudget(budget=0.01).current_budget == 0.01


def test_gain_and_budget_are_resumed_exactly_through_the_loss():
    def follow(loss, iterations):
        found = []
        for iteration in iterations:
            found.append(loss.modulation(make_inputs(seed=iteration)).advantages)
            loss.after_iteration(record(iteration, change=-0.01 * (1 + iteration), entropy=1 - 0.03 * iteration))
        return found

    def make():
        return PolicyLoss(modulation=EntropyBudget(budget=0.01, final_entropy=0.3, final_iteration=8))

    through = make()
    expected = follow(through, range(6))
    first, second = make(), make()
    found = follow(first, range(3))
    second.load_state_dict(first.state_dict())
    found += follow(second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert second.state_dict() == through.state_dict()


@pytest.mark.parametrize(("name", "value"), [("budget", -0.1), ("probe_every", 0), ("final_entropy", -1.0)])
def test_impossible_options_are_one_line(name, value):
    with pytest.raises(UserError, match=rf"model\.loss\.modulation\.{name}={value} must be a finite number"):
        EntropyBudget(**{name: value})


# --- compensation at equal step energy --------------------------------------------------------------------------------


def test_equal_step_energy_keeps_the_length_of_the_step():
    inputs = make_inputs()
    options = {"stabilisation_alpha": 0.0}
    ordinary = DynamoModulation(**options)(inputs)
    equal = DynamoModulation(**options, equal_step_energy=True)(inputs)
    q = 1 - 2 * inputs.statistics.logprobs.exp() + inputs.statistics.squared_probs
    energies = [
        float(((inputs.loss_weights() * advantages) ** 2 * q).sum())
        for advantages in (inputs.advantages, ordinary.advantages, equal.advantages)
    ]
    assert energies[1] > energies[0] == pytest.approx(energies[2])
    ratio = ordinary.factors["beta_comp"] / equal.factors["beta_comp"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, (energies[1] / energies[0]) ** 0.5))


def test_a_step_without_advantages_is_not_divided():
    inputs = make_inputs(scale=0.0)
    assert step_lengthening(torch.full((60,), 1.4), inputs) == 1.0


def test_equal_step_energy_needs_the_whole_batch():
    with pytest.raises(UserError, match="equal_step_energy=true does not go with scope=micro_batch"):
        DynamoModulation(scope="micro_batch", equal_step_energy=True)
