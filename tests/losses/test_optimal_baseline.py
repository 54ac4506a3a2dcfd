"""The baseline of least variance: by hand, against brute force, and its history over iterations and checkpoints."""

import itertools

import numpy as np
import pytest
import torch

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.advantages import RLOO, weighted_leave_one_out
from dynamo_lightning.losses.baseline_history import BaselineHistory
from dynamo_lightning.losses.optimal_baseline import OptimalBaseline, rollout_score_norms
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.types import GroupedRewards

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
GROUPS = torch.tensor([0, 0, 0, 1, 1])
NORMS = torch.tensor([1.0, 2.0, 4.0, 1.0, 3.0], dtype=torch.float64)


def scored(rewards, groups, iteration=0, is_pilot=None, prompt_ids=None):
    groups = torch.as_tensor(groups)
    ids = groups + 10 if prompt_ids is None else torch.as_tensor(prompt_ids)
    return GroupedRewards(torch.as_tensor(rewards), groups, ids, torch.arange(len(groups)), iteration, is_pilot)


def test_weighted_leave_one_out_by_hand():
    # Others of the first rollout are both wrong; of the second (1·1 + 4·0)/5; of the third (1·1 + 2·0)/3.
    expected = [1.0, -1 / 5, -1 / 3, 0.0, 0.0]
    torch.testing.assert_close(OptimalBaseline().of(scored(REWARDS, GROUPS), NORMS), torch.tensor(expected))


def test_equal_weights_give_leave_one_out():
    found = OptimalBaseline().of(scored(REWARDS, GROUPS), torch.full((5,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(found, RLOO()(REWARDS, GROUPS))


def test_a_rollouts_own_weight_does_not_change_its_baseline():
    """Guard: with its own reward or weight in the sum, as in verl's, the gradient would be biased."""
    other = NORMS.clone()
    other[1] = 50.0
    first, second = (OptimalBaseline().of(scored(REWARDS, GROUPS), norms) for norms in (NORMS, other))
    assert first[1] == second[1] and first[0] == second[0] and first[2] != second[2]


def test_weights_of_the_others_that_add_up_to_zero_give_their_plain_mean():
    norms = torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    # Of the third rollout the others weigh nothing: their plain mean 1/2. The first two see the third alone.
    assert OptimalBaseline().of(scored(rewards, GROUPS), norms).tolist() == [0.0, -1.0, 0.5, 1.0, -1.0]


def test_equal_rewards_and_groups_of_one_give_exactly_zero_without_a_prior():
    rewards, norms = torch.full((7,), 0.1), torch.rand(7, dtype=torch.float64)
    assert OptimalBaseline().of(scored(rewards, [0] * 6 + [1]), norms).tolist() == [0.0] * 7
    # The first iteration of a history knows nothing either.
    assert OptimalBaseline(half_life=10).of(scored(rewards, [0] * 6 + [1]), norms).tolist() == [0.0] * 7


def test_with_a_prior_groups_of_one_and_of_equal_rewards_have_a_signal():
    advantage = OptimalBaseline(half_life=1e9, population_rollouts=0.0)
    assert not advantage.equal_rewards_give_zero and OptimalBaseline().equal_rewards_give_zero
    ones = torch.ones(4, dtype=torch.float64)
    advantage.of(scored([1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]), ones)
    found = advantage.of(scored([1.0, 0.0, 0.0], [0, 1, 1], iteration=1, prompt_ids=[10, 10, 10]), ones[:3])
    # Prior of four rollouts with mean 1/4: alone 1 − 1/4; two zeros 0 − (1 + 0)/(4 + 1).
    assert found.tolist() == pytest.approx([0.75, -0.2, -0.2])


def test_history_by_hand_with_discount_and_population():
    history = BaselineHistory(half_life=2.0, population_rollouts=3.0)
    ids, w, r = torch.tensor([5, 5, 8]), torch.tensor([1.0, 3.0, 2.0]).double(), torch.tensor([1.0, 0.0, 1.0]).double()
    history.observe(r, w, ids, iteration=4)
    mean, weight = history.prior(torch.tensor([5, 8, 99]), iteration=6)  # one half-life later
    own = {5: (0.5, 2.0, 1.0), 8: (1.0, 1.0, 0.5), 99: (0.0, 0.0, 0.0)}  # halved Σwr, Σw, n
    for row, (weighted, total, count) in enumerate(own.values()):
        # Of the population (not discounted since its last iteration): mean 3/6, weight per rollout 6/3.
        each = (total + 3.0 * 2.0) / (count + 3.0)
        assert float(weight[row]) == pytest.approx(total + 3.0 * each)
        assert float(mean[row]) == pytest.approx((weighted + 3.0 * each * 0.5) / (total + 3.0 * each))


def test_an_iteration_is_observed_once():
    history = BaselineHistory(10.0, 1.0)
    one = torch.ones(1, dtype=torch.float64)
    history.observe(one, one, torch.tensor([1]), 3)
    before = history.state_dict()
    history.observe(one, one, torch.tensor([1]), 3)
    assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(v)) for k, v in history.state_dict().items())


def test_history_does_not_depend_on_other_prompts_or_on_the_order_of_rollouts():
    rng = np.random.default_rng(0)
    ids, r, w = rng.integers(0, 50, 400), rng.integers(0, 2, 400) * 1.0, rng.random(400)
    found = []
    for order in (np.arange(400), rng.permutation(400)):
        history = BaselineHistory(5.0, 2.0)
        history.observe(*(torch.from_numpy(x[order]) for x in (r, w, ids)), 0)
        found.append(torch.stack(history.prior(torch.arange(60), 3)))
    torch.testing.assert_close(found[0], found[1], atol=1e-14, rtol=1e-14)


def test_a_resumed_history_goes_on_exactly():
    rng = torch.Generator().manual_seed(0)

    def iteration(number):
        rewards = torch.randint(0, 2, (12,), generator=rng).float()
        return scored(rewards, torch.arange(12) // 3, number), torch.rand(12, generator=rng, dtype=torch.float64)

    batches = [iteration(number) for number in range(6)]
    through = PolicyLoss(advantage=OptimalBaseline(half_life=3.0))
    expected = [through.advantage.of(*batch) for batch in batches]
    first, second = (PolicyLoss(advantage=OptimalBaseline(half_life=3.0)) for _ in range(2))
    found = [first.advantage.of(*batch) for batch in batches[:3]]
    second.load_state_dict(first.state_dict())
    found += [second.advantage.of(*batch) for batch in batches[3:]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_losses_without_memory_save_nothing_and_another_class_leaves_a_history_out():
    assert PolicyLoss().state_dict() == {} and PolicyLoss(advantage=OptimalBaseline()).state_dict() == {}
    history = PolicyLoss(advantage=OptimalBaseline(half_life=3.0))
    history.advantage.of(scored(REWARDS, GROUPS), NORMS)
    saved = history.state_dict()
    with pytest.warns(UserWarning, match=r"model\.loss\.advantage is not the OptimalBaseline of the checkpoint"):
        PolicyLoss(advantage=RLOO()).load_state_dict(saved)
    saved["advantage"]["state"]["weights"] = torch.full((2,), torch.nan, dtype=torch.float64)
    with pytest.raises(UserError, match="history of baselines is corrupt"):
        PolicyLoss(advantage=OptimalBaseline(half_life=3.0)).load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"half_life": 0.0}, r"half_life=0\.0 must"), ({"population_rollouts": -1.0}, r"population_rollouts=-1\.0 must")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=rf"model\.loss\.advantage\.{message}"):
        OptimalBaseline(**options)


def test_score_norms_match_the_normalisation_of_the_loss():
    squares, rollouts, lengths = torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0, 0, 1]), torch.tensor([2, 1])
    for aggregation, normalisation, expected in (
        ("prompt_mean", "max_response_length", [1.5, 0.25]),
        ("prompt_mean", "response_length", [1.5 / 4, 0.25]),
        ("token_mean", "response_length", [1.5, 0.25]),
    ):
        assert rollout_score_norms(squares, rollouts, lengths, aggregation, normalisation).tolist() == expected


# --- a policy whose gradient is known: a softmax over four responses, of which the first is right ---

PROBS = np.array([0.15, 0.5, 0.3, 0.05])
RIGHT = np.array([1.0, 0.0, 0.0, 0.0])
SCORES = np.eye(4) - PROBS  # ∇_z log π of each response
SQUARES = (SCORES**2).sum(1)
GRADIENT = (PROBS * RIGHT) @ SCORES


def moments(size, baselines_of):
    """Mean and variance (trace) of the gradient of a group, by enumeration of its responses."""
    total, square = np.zeros(4), 0.0
    for group in itertools.product(range(4), repeat=size):
        rows = np.array(group)
        chance, rewards = PROBS[rows].prod(), torch.from_numpy(RIGHT[rows])
        baselines = baselines_of(rewards, torch.from_numpy(SQUARES[rows])).numpy()
        gradient = (RIGHT[rows] - baselines) @ SCORES[rows] / size
        total, square = total + chance * gradient, square + chance * gradient @ gradient
    return total, square - total @ total


def within_group(rewards, weights):
    return weighted_leave_one_out(rewards, weights, torch.zeros(len(rewards), dtype=torch.int64), 1)


def with_prior(rewards, weights):
    prior = torch.full_like(rewards, 0.2), torch.full_like(rewards, 6.0)
    return weighted_leave_one_out(rewards, weights, torch.zeros(len(rewards), dtype=torch.int64), 1, *prior)


@pytest.mark.parametrize(
    ("size", "baselines_of"),
    [(1, with_prior), (2, within_group), (2, with_prior), (4, within_group), (6, within_group), (6, with_prior)],
)
def test_gradient_is_unbiased_by_enumeration(size, baselines_of):
    np.testing.assert_allclose(moments(size, baselines_of)[0], GRADIENT, atol=1e-14)


def least_coefficients():
    """a and c of the group's variance a/n + c/(n(n − 1)), from their definitions."""
    scale = PROBS @ SQUARES
    rest = RIGHT - (PROBS * SQUARES) @ RIGHT / scale
    crossed = (PROBS * SQUARES * rest) @ SCORES / scale
    a = PROBS @ (rest**2 * SQUARES) - GRADIENT @ GRADIENT
    return a, PROBS @ (SQUARES**2 * rest**2) / scale + crossed @ crossed


def test_a_prior_lowers_the_variance():
    assert moments(5, with_prior)[1] < moments(5, within_group)[1]


def test_weights_without_a_prior_can_cost_more_than_they_gain_in_small_groups():
    """Right responses have 1.9 times the squared score norm here, and one of them sets the whole baseline."""
    ordinary = moments(5, lambda r, w: within_group(r, torch.ones_like(w)))[1]
    assert ordinary < moments(5, within_group)[1] < 1.2 * ordinary


def test_variance_of_a_group_approaches_the_delta_method():
    a, c = least_coefficients()
    errors = [abs(moments(n, within_group)[1] / (a / n + c / (n * (n - 1))) - 1) for n in (3, 4, 6)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.03


def test_no_constant_baseline_has_less_variance_than_the_weighted_mean_reward():
    best = (PROBS * SQUARES) @ RIGHT / (PROBS @ SQUARES)
    variance = {b: moments(2, lambda r, w, b=b: torch.full_like(r, b))[1] for b in np.linspace(0, 1, 51).tolist()}
    p = PROBS @ RIGHT
    right, wrong = (PROBS * SQUARES * RIGHT).sum() / p, (PROBS * SQUARES * (1 - RIGHT)).sum() / (1 - p)
    least = p * (1 - p) * right * wrong / (p * right + (1 - p) * wrong) - GRADIENT @ GRADIENT
    assert moments(2, lambda r, w: torch.full_like(r, best))[1] == pytest.approx(least / 2)
    assert min(variance.values()) == pytest.approx(least / 2, rel=0.01) and min(variance.values()) >= least / 2
