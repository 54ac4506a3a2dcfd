"""Advantages that need a pass of the policy: weights of a real (tiny) policy, and how they reach the update."""

import pytest
import torch
from update_case import REWARDS, SHUFFLED, learn, make_joined, make_module, prepare

from dynamo_lightning.losses.advantages import RLOO, weighted_leave_one_out
from dynamo_lightning.losses.optimal_baseline import OptimalBaseline
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.types import GroupedRewards
from dynamo_lightning.update.advantages import weight_metrics
from dynamo_lightning.update.config import UpdateConfig
from dynamo_lightning.update.plan import passes_per_rollout


def score_norms(policy, batch, divide_by_length=False):
    """Σ_t ‖e_a − π‖² of every rollout from whole logits, one sequence at a time."""
    norms = []
    for rollout in batch.rollouts:
        prompt, response = list(rollout.prompt.token_ids), rollout.token_ids.tolist()
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        errors = torch.nn.functional.one_hot(torch.tensor(response), logits.shape[1]) - torch.softmax(logits, -1)
        norms.append(float(errors.square().sum()) / (len(response) ** 2 if divide_by_length else 1))
    return torch.tensor(norms, dtype=torch.float64)


@pytest.mark.parametrize("normalisation", ["max_response_length", "response_length"])
def test_advantages_weigh_rewards_by_the_policys_own_score_norms(tiny_policy, make_prompt, make_batch, normalisation):
    loss = PolicyLoss(advantage=OptimalBaseline(), modulation=None, length_normalisation=normalisation)
    module = make_module(tiny_policy, loss)
    joined = make_joined(module, make_prompt, make_batch)
    assert joined.rewards is not None and not joined.advantages.any()
    batch = prepare(module, joined).batch
    norms = score_norms(module.policy, batch, normalisation == "response_length")
    rewards, groups = joined.rewards.rewards.double(), joined.rewards.group_indices
    expected = rewards - weighted_leave_one_out(rewards, norms, groups, len(REWARDS))
    expected[[3, 4, 10, 11]] = 0.0  # groups of equal rewards
    torch.testing.assert_close(batch.advantages, expected.float())
    assert batch.group_has_signal.tolist() == [True, False, True, False] and batch.rewards is None


def test_order_of_rollouts_does_not_change_the_gradient(tiny_policy, make_prompt, make_batch):
    gradients = []
    for order in (None, SHUFFLED):
        module = make_module(tiny_policy, PolicyLoss(advantage=OptimalBaseline(half_life=10.0), modulation=None))
        gradients.append(learn(module, prepare(module, make_joined(module, make_prompt, make_batch, order)))[0])
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_groups_of_equal_rewards_are_trained_on_once_there_is_a_history(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(advantage=OptimalBaseline(half_life=10.0), modulation=None))
    first = prepare(module, make_joined(module, make_prompt, make_batch, iteration=0))
    second = prepare(module, make_joined(module, make_prompt, make_batch, iteration=1))
    assert [int(plan.trained_on.sum()) for plan in (first.plan.steps[0], second.plan.steps[0])] == [8, 12]
    assert second.batch.group_has_signal.all()


def test_preparing_the_same_iteration_again_does_not_count_its_rewards_twice(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(advantage=OptimalBaseline(half_life=10.0), modulation=None))
    prepare(module, make_joined(module, make_prompt, make_batch, iteration=0))
    before = module.loss.state_dict()["advantage"]["state"]
    prepare(module, make_joined(module, make_prompt, make_batch, iteration=0))
    after = module.loss.state_dict()["advantage"]["state"]
    assert torch.equal(before["weights"], after["weights"])


def test_the_pass_for_the_weights_is_counted_in_the_cost_of_a_rollout():
    plain, weighted = (PolicyLoss(advantage=a, modulation=None) for a in (RLOO(), OptimalBaseline()))
    history = PolicyLoss(advantage=OptimalBaseline(half_life=5.0), modulation=None)
    config = UpdateConfig()
    assert [passes_per_rollout(loss, config, False) for loss in (plain, weighted, history)] == [(3, 1), (4, 1), (4, 4)]


def test_ratio_of_score_norms_by_hand():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 2])
    norms = torch.tensor([4.0, 1.0, 3.0, 2.0, 2.0, 100.0]).double()  # the last group has no failure: left out
    scored = GroupedRewards(rewards, groups, groups, torch.arange(6))
    metrics = weight_metrics(scored, rewards.double() - 0.25, norms)
    assert metrics == {"baseline/mean": 0.25, "baseline/score_ratio": (4 + 2) / (2 + 2)}
    equal = GroupedRewards(torch.ones(6), groups, groups, torch.arange(6))
    assert "baseline/score_ratio" not in weight_metrics(equal, torch.zeros(6).double(), norms)
