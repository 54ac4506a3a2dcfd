import pytest
import torch

from dynamo_lightning.losses.advantages import GRPO, RLOO, DrGRPO, WReinforce

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.5])
GROUPS = torch.tensor([0, 0, 0, 2, 2, 2])  # group 1 is empty


def test_rloo_by_hand():
    expected = [1.0, -0.5, -0.5, 0.25, 0.25, -0.5]
    torch.testing.assert_close(RLOO()(REWARDS, GROUPS), torch.tensor(expected))


def test_dr_grpo_by_hand():
    expected = [2 / 3, -1 / 3, -1 / 3, 1 / 6, 1 / 6, -1 / 3]
    torch.testing.assert_close(DrGRPO()(REWARDS, GROUPS), torch.tensor(expected))


def test_grpo_by_hand():
    deviation = (1 / 3) ** 0.5  # of 1, 0, 0 with ddof 1
    first = GRPO(ddof=1, epsilon=0.0)(REWARDS, GROUPS)[:3]
    torch.testing.assert_close(first, torch.tensor([2 / 3, -1 / 3, -1 / 3]) / deviation)
    deviation = (2 / 9) ** 0.5
    first = GRPO(ddof=0, epsilon=0.1)(REWARDS, GROUPS)[:3]
    torch.testing.assert_close(first, torch.tensor([2 / 3, -1 / 3, -1 / 3]) / (deviation + 0.1))


@pytest.mark.parametrize("advantage", [RLOO(), DrGRPO(), GRPO()])
def test_equal_rewards_give_exactly_zero(advantage):
    # 0.1 is not a binary fraction: the mean of seven of them differs from 0.1 by rounding.
    rewards = torch.full((7,), 0.1)
    assert advantage(rewards, torch.zeros(7, dtype=torch.int64)).tolist() == [0.0] * 7


@pytest.mark.parametrize("advantage", [RLOO(), DrGRPO(), GRPO()])
def test_a_group_of_one_gets_zero(advantage):
    assert advantage(torch.tensor([1.0]), torch.tensor([0])).tolist() == [0.0]


@pytest.mark.parametrize("advantage", [RLOO(), DrGRPO(), GRPO()])
def test_order_of_rollouts_does_not_matter(advantage):
    permutation = torch.tensor([3, 0, 5, 2, 4, 1])
    shuffled = advantage(REWARDS[permutation], GROUPS[permutation])
    torch.testing.assert_close(shuffled, advantage(REWARDS, GROUPS)[permutation], atol=0, rtol=0)


def test_no_rollouts_give_no_advantages():
    assert RLOO()(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_w_reinforce_by_hand_also_in_groups_of_equal_rewards():
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    torch.testing.assert_close(WReinforce()(rewards, groups), torch.tensor([0.1, -1.0, 0.1, 0.1, 0.1, -1.0]))
    torch.testing.assert_close(
        WReinforce(positive_weight=1.0, success_threshold=0.6)(rewards, groups),
        torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0]),
    )


def test_w_reinforce_without_positive_weight_learns_from_wrong_responses_alone():
    assert WReinforce(positive_weight=0.0)(torch.tensor([1.0, 0.0]), torch.tensor([0, 0])).tolist() == [0.0, -1.0]


def test_only_an_advantage_without_baseline_keeps_groups_of_equal_rewards():
    assert not WReinforce.equal_rewards_give_zero
    assert all(advantage.equal_rewards_give_zero for advantage in (RLOO, DrGRPO, GRPO))


def test_a_negative_positive_weight_is_refused():
    with pytest.raises(ValueError, match=r"got -0\.1"):
        WReinforce(positive_weight=-0.1)
