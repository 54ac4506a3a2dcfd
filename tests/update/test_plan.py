"""The update plan by hand: which rollout is used for what."""

from dataclasses import replace

import pytest
import torch
from update_case import assign, make_rollouts

from dynamo_lightning.losses.advantages import RLOO, WReinforce
from dynamo_lightning.losses.covariance import KLCov
from dynamo_lightning.losses.modulation import DynamoModulation
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.update.config import UpdateConfig
from dynamo_lightning.update.plan import UpdatePlan

PLAIN = PolicyLoss(modulation=None)
# Rollouts 0 to 2 have advantages (1, −½, −½), rollouts 3 and 4 have none.
REWARDS = [[1.0, 0.0, 0.0], [1.0, 1.0]]


@pytest.fixture
def batch(make_prompt, make_batch):
    return batch_of(make_prompt, make_batch, REWARDS)


def batch_of(make_prompt, make_batch, rewards, advantage=None, truncated=()):
    prompts, outcomes, rollouts = make_rollouts(make_prompt, make_batch, rewards)
    loss = PolicyLoss(advantage=advantage or RLOO())
    joined = assign(type("Module", (), {"loss": loss}), [prompts], outcomes, rollouts)
    marked = tuple(
        replace(rollout, status="truncated" if i in truncated else "finished")
        for i, rollout in enumerate(joined.rollouts)
    )
    return replace(joined, rollouts=marked)


def rows(mask):
    return mask.nonzero().squeeze(-1).tolist()


def plan_of(batch, loss=PLAIN, external=False, **updates):
    return UpdatePlan.of(batch, loss, UpdateConfig(**updates), external)


def test_a_single_plain_step_leaves_to_the_pass_before_it_what_it_skips(batch):
    plan = plan_of(batch)
    (step,) = plan.steps
    assert not plan.needs_old_logprobs and not step.is_skipped
    assert rows(plan.beforehand) == [3, 4]
    assert rows(step.rollouts) == [0, 1, 2, 3, 4]
    assert rows(step.trained_on) == [0, 1, 2]
    assert rows(step.counted_groups) == [0, 1]


@pytest.mark.parametrize(
    ("loss", "external", "updates"),
    [
        (PolicyLoss(), False, {}),
        (PolicyLoss(modulation=None, penalty=KLCov()), False, {}),
        (PLAIN, True, {}),
        (PLAIN, False, {"num_epochs": 2}),
        (PLAIN, False, {"num_mini_batches": 2}),
    ],
    ids=["modulation", "penalty", "external engine", "two passes", "two mini-batches"],
)
def test_old_log_probabilities_are_those_of_all_rollouts(batch, loss, external, updates):
    plan = plan_of(batch, loss, external, **updates)
    assert plan.needs_old_logprobs and rows(plan.beforehand) == [0, 1, 2, 3, 4]


def test_each_pass_takes_every_mini_batch_in_order(batch):
    plan = plan_of(batch, PolicyLoss(), num_epochs=2, num_mini_batches=2)
    assert [rows(step.groups) for step in plan.steps] == [[0], [1], [0], [1]]
    assert [rows(step.rollouts) for step in plan.steps] == [[0, 1, 2], [3, 4]] * 2
    assert [rows(step.trained_on) for step in plan.steps] == [[0, 1, 2], []] * 2
    assert [rows(step.counted_groups) for step in plan.steps] == [[0], [1], [0], [1]]
    assert [step.is_skipped for step in plan.steps] == [False, True, False, True]


def test_more_mini_batches_than_prompts_are_as_many_as_prompts(batch):
    assert len(plan_of(batch, num_mini_batches=5).steps) == 2


@pytest.mark.parametrize(
    "loss",
    [
        PolicyLoss(modulation=None, entropy_coefficient=0.1),
        PolicyLoss(modulation=None, kl_coefficient=0.1),
        PolicyLoss(modulation=DynamoModulation(scope="micro_batch")),
    ],
    ids=["entropy", "kl", "recomputed"],
)
def test_a_loss_that_does_not_vanish_skips_nothing(batch, loss):
    plan = plan_of(batch, loss)
    assert not plan.needs_old_logprobs and rows(plan.beforehand) == []
    assert rows(plan.steps[0].trained_on) == [0, 1, 2, 3, 4]


def test_without_a_baseline_equal_rewards_are_trained_on(make_prompt, make_batch):
    batch = batch_of(make_prompt, make_batch, REWARDS, WReinforce())
    plan = plan_of(batch, PolicyLoss(modulation=None, advantage=WReinforce()))
    assert rows(plan.steps[0].trained_on) == [0, 1, 2, 3, 4] and rows(plan.beforehand) == []


def test_truncated_responses_are_masked_and_a_step_of_nothing_else_is_skipped(make_prompt, make_batch):
    rewards = [[1.0, 0.0], [1.0, 0.0]]
    loss = PolicyLoss(modulation=None, mask_truncated=True)
    batch = batch_of(make_prompt, make_batch, rewards, truncated=(0, 2, 3))
    steps = plan_of(batch, loss, num_mini_batches=2).steps
    assert [rows(step.trained_on) for step in steps] == [[1], []]
    assert [step.is_skipped for step in steps] == [False, True]
    assert [rows(step.counted_groups) for step in steps] == [[0], [1]]
    # Masked responses are computed beforehand, for their entropies.
    assert rows(plan_of(batch, loss).beforehand) == [0, 2, 3]


def test_a_group_of_one_is_in_no_denominator_unless_nothing_else_is(make_prompt, make_batch):
    batch = batch_of(make_prompt, make_batch, [[1.0, 0.0], [1.0]])
    assert rows(plan_of(batch).steps[0].counted_groups) == [0]
    assert [rows(step.counted_groups) for step in plan_of(batch, num_mini_batches=2).steps] == [[0], [1]]
    assert torch.equal(batch.group_has_signal, torch.tensor([True, False]))


def test_a_step_whose_rollouts_are_on_other_ranks_is_not_skipped(batch):
    """This rank has no rollout with an advantage, but knows that the group has one elsewhere."""
    own = replace(
        batch, rollouts=batch.rollouts[3:], advantages=batch.advantages[3:], group_indices=batch.group_indices[3:]
    )
    (step,) = plan_of(own).steps
    assert rows(step.trained_on) == [] and not step.is_skipped
