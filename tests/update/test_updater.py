"""The updater by itself, without a trainer: how many steps it takes, and what it reports of them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from update_case import assign, flat_gradient, make_joined, make_module, make_rollouts

from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.update.updater import PolicyUpdater

PLAIN = PolicyLoss(modulation=None)


def parameters(policy):
    return torch.cat([parameter.detach().flatten().clone() for parameter in policy.parameters()])


def train(case, batch, **parts):
    """One iteration; the optimizer clips as Lightning's hook does."""
    updater = PolicyUpdater(case.settings)
    trained = case.trained(**parts)
    trained.optimizer.register_step_pre_hook(lambda *_: updater.clipping.clip(case.policy, 0))
    return updater.step(trained, updater.prepare(case.policy, batch)), trained


def test_each_mini_batch_of_each_pass_is_a_step_unless_it_has_no_gradient(tiny_policy, make_prompt, make_batch):
    """Of the four prompts the second and the fourth have equal rewards: two of the four mini-batches take a step."""
    case = make_module(tiny_policy, PLAIN, num_epochs=2, num_mini_batches=4)
    result, _ = train(case, make_joined(case, make_prompt, make_batch))
    assert len(result.gradient_norms) == 4 and min(result.gradient_norms) > 0


def test_the_schedule_advances_where_no_step_is_taken(tiny_policy, make_prompt, make_batch):
    case = make_module(tiny_policy, PLAIN, num_mini_batches=4)
    optimizer = torch.optim.SGD(case.policy.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trained = replace(case.trained(), optimizer=optimizer, scheduler=schedule)
    updater = case.updater
    updater.step(trained, updater.prepare(case.policy, make_joined(case, make_prompt, make_batch)))
    assert schedule.get_last_lr() == [0.5**4]


def test_without_any_gradient_the_policy_stays(tiny_policy, make_prompt, make_batch):
    case = make_module(tiny_policy)
    before = parameters(case.policy)
    batch, outcomes, rollouts = make_rollouts(make_prompt, make_batch, [[1.0, 1.0], [0.0, 0.0]])
    result, _ = train(case, assign(case, [batch], outcomes, rollouts))
    assert result.gradient_norms == () and "loss" not in result.metrics
    assert result.metrics["entropy"] > 0
    assert torch.equal(parameters(case.policy), before)


def test_the_gradient_is_clipped_and_its_norm_before_is_reported(tiny_policy, make_prompt, make_batch):
    norms = []
    for max_norm in (None, 1e-3):
        case = make_module(tiny_policy, PLAIN)
        case = replace(case, settings=replace(case.settings, gradient_clip_val=max_norm))
        result, _ = train(case, make_joined(case, make_prompt, make_batch))
        norms.append((result.gradient_norms[0], float(flat_gradient(case).norm())))
    (unclipped, kept), (reported, clipped) = norms
    assert unclipped == pytest.approx(kept, rel=1e-6) and unclipped > 1e-3
    assert reported == pytest.approx(unclipped, rel=1e-6)
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_a_step_of_plain_gradient_descent_by_hand(tiny_policy, make_prompt, make_batch):
    case = make_module(tiny_policy, PLAIN)
    before = parameters(case.policy)
    train(case, make_joined(case, make_prompt, make_batch), lr=0.25)
    torch.testing.assert_close(parameters(case.policy), before - 0.25 * flat_gradient(case))


def test_steps_that_overflow_are_counted_and_have_no_norm(tiny_policy, make_prompt, make_batch):
    """A backward pass that overflows, with a scaler: the first of two steps is lost."""
    case = make_module(tiny_policy, PLAIN, num_mini_batches=4)
    updater = case.updater
    scaler = SimpleNamespace(get_scale=lambda: 1.0)
    scales = iter([float("inf"), 1.0])
    trained = case.trained(backward=lambda loss: (loss * next(scales)).backward(), scaler=scaler)

    def clip(optimizer, *_):
        updater.clipping.clip(case.policy, 0, scaler)
        if not math.isfinite(updater.clipping.norm):  # the scaler leaves such a step out
            optimizer.zero_grad()

    trained.optimizer.register_step_pre_hook(clip)
    result = updater.step(trained, updater.prepare(case.policy, make_joined(case, make_prompt, make_batch)))
    assert result.metrics["frac_overflow"] == 0.5
    assert len(result.gradient_norms) == 1
