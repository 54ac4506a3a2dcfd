"""The update on a real (tiny) policy: what its gradient may and may not depend on."""

from dataclasses import replace

import pytest
import torch
from update_case import REWARDS, SHUFFLED, assign, flat_gradient, learn, make_module, make_rollouts, prepare

from dynamo_lightning.allocation.groups import make_groups
from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.losses.optimal_baseline import OptimalBaseline
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.types import Collected, PromptBatch
from dynamo_lightning.update.join import join
from dynamo_lightning.update.plan import split_prompts


def gradient(module, make_prompt, make_batch, rewards=REWARDS, chosen=None, order=None):
    """Of the first update, from the chosen groups or all, and its metrics."""
    batch, outcomes, rollouts = make_rollouts(make_prompt, make_batch, rewards)
    rollouts = [rollouts[i] for i in order] if order else rollouts
    return learn(module, prepare(module, assign(module, [batch], outcomes, rollouts)), chosen)


@pytest.mark.parametrize("aggregation", ["prompt_mean", "token_mean", "sequence_mean"])
@pytest.mark.parametrize("layout", [{"max_tokens_per_micro_batch": 24}, {"max_logits_bytes": 5000}])
def test_gradient_is_independent_of_micro_batches_and_chunks(tiny_policy, make_prompt, make_batch, aggregation, layout):
    reference, expected = gradient(
        make_module(tiny_policy, PolicyLoss(aggregation=aggregation)), make_prompt, make_batch
    )
    cut, metrics = gradient(
        make_module(tiny_policy, PolicyLoss(aggregation=aggregation), **layout), make_prompt, make_batch
    )
    assert reference.abs().max() > 0
    torch.testing.assert_close(cut, reference, atol=1e-10, rtol=1e-10)
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_order_of_rollouts_does_not_matter(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy)
    shuffled, _ = gradient(module, make_prompt, make_batch, order=SHUFFLED)
    torch.testing.assert_close(shuffled, gradient(module, make_prompt, make_batch)[0], atol=1e-10, rtol=1e-10)


def plain_grpo_gradient(module, make_prompt, make_batch):
    """The gradient of `−1/N Σ_i 1/n_i Σ_j Σ_t A_ij log π / T_max`, rollout by rollout, from whole logits."""
    _, _, rollouts = make_rollouts(make_prompt, make_batch)
    module.policy.zero_grad()
    for rollout in rollouts:
        group = REWARDS[rollout.prompt.prompt_id]
        others = [r for i, r in enumerate(group) if i != rollout.sample_index]
        advantage = group[rollout.sample_index] - sum(others) / len(others)
        sequence = torch.tensor([(*rollout.prompt.token_ids, *rollout.token_ids)])
        logits = module.policy(sequence).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(rollout.token_ids, dtype=torch.int64)[:, None])
        (-advantage * logprobs.sum() / len(REWARDS) / len(group) / 12).backward()
    return flat_gradient(module)


def test_modulation_off_equals_the_plain_policy_gradient(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(modulation=None))
    ours, _ = gradient(module, make_prompt, make_batch)
    # Advantages and weights are float32.
    torch.testing.assert_close(ours, plain_grpo_gradient(module, make_prompt, make_batch), atol=1e-6, rtol=1e-4)


def test_modulation_on_changes_the_gradient(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy)
    ours, _ = gradient(module, make_prompt, make_batch)
    plain = plain_grpo_gradient(module, make_prompt, make_batch)
    assert (ours - plain).norm() > 0.01 * plain.norm()


def test_skipped_rollouts_stay_in_the_denominators(tiny_policy, make_prompt, make_batch):
    """Prompts of equal rewards give no gradient, but N counts them."""
    module = make_module(tiny_policy, PolicyLoss(modulation=None))
    with_idle, _ = gradient(module, make_prompt, make_batch, [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    alone, _ = gradient(module, make_prompt, make_batch, [[1.0, 0.0]])
    torch.testing.assert_close(with_idle, alone / 4, atol=1e-10, rtol=1e-10)


def test_mini_batches_have_their_own_denominators(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(modulation=None))
    first = torch.tensor([True, True, False, False])
    halves = [gradient(module, make_prompt, make_batch, chosen=chosen)[0] for chosen in (first, ~first)]
    whole, _ = gradient(module, make_prompt, make_batch)
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("num_prompts", "num_mini_batches"), [(10, 3), (4, 4), (3, 8), (7, 1)])
def test_mini_batches_hold_every_prompt_once(num_prompts, num_mini_batches):
    parts = split_prompts(num_prompts, num_mini_batches)
    assert [i for part in parts for i in part] == list(range(num_prompts))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and min(map(len, parts)) >= 1


def test_outcomes_are_joined_on_prompt_and_sample_and_not_on_position(tiny_policy, make_prompt, make_batch):
    """Guard: shuffling the outcomes changes neither advantages nor statistics."""
    module = make_module(tiny_policy)
    batch, outcomes, rollouts = make_rollouts(make_prompt, make_batch)
    straight = assign(module, [batch], outcomes, rollouts)
    shuffled = assign(module, [batch], outcomes[::-1], rollouts)
    assert torch.equal(straight.advantages, shuffled.advantages)
    assert torch.equal(straight.group_indices, shuffled.group_indices)
    expected = [1.0, -0.5, -0.5, 0.0, 0.0, -0.75, 0.5, 0.5, -0.75, 0.5, 0.0, 0.0]
    assert straight.advantages.tolist() == pytest.approx(expected)
    data = [RolloutDataModule(), RolloutDataModule()]
    data[0].observe(batch, outcomes)
    data[1].observe(batch, outcomes[::-1])
    rates = [d.allocator.statistics.estimate([0, 1, 2, 3], 1).success_rate.tolist() for d in data]
    assert rates[0] == rates[1]
    assert rates[0][1] > rates[0][2] > rates[0][0] > rates[0][3]


def test_a_dropped_rollout_leaves_group_statistics_and_denominators(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy)
    batch, outcomes, rollouts = make_rollouts(make_prompt, make_batch, [[1.0, 0.0, 0.0], [1.0, 0.0]])
    kept = assign(module, [batch], outcomes[1:], rollouts)
    assert [rollout.key for rollout in kept.rollouts] == [(0, 1), (0, 2), (1, 0), (1, 1)]
    assert kept.group_sizes.tolist() == [2, 2]
    assert kept.group_has_signal.tolist() == [False, True]
    assert int(kept.group_tokens.sum()) == sum(len(rollout.token_ids) for rollout in rollouts[1:])


def test_pilot_and_commit_have_baselines_and_shares_of_their_own(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(modulation=None))
    whole, outcomes, rollouts = make_rollouts(make_prompt, make_batch, [[1.0, 0.0, 1.0, 1.0, 0.0]])
    (plan,) = whole.plans
    pilot, commit = replace(plan, size=2, share=0.25), replace(plan, size=3, share=0.75, first_sample_index=2)
    parts = [PromptBatch(0, [pilot]), PromptBatch(0, [commit])]
    batch = assign(module, parts, outcomes, rollouts)
    assert batch.advantages.tolist() == pytest.approx([1.0, -1.0, 0.5, 0.5, -1.0])
    assert batch.group_prompts.tolist() == [0, 0]
    assert batch.group_sizes.tolist() == [2, 3]
    ours, _ = learn(module, prepare(module, batch))
    module.policy.zero_grad()
    for rollout, advantage in zip(rollouts, batch.advantages.tolist(), strict=True):
        weight = 0.25 / 2 if rollout.sample_index < 2 else 0.75 / 3
        sequence = torch.tensor([(*rollout.prompt.token_ids, *rollout.token_ids)])
        logits = module.policy(sequence).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(rollout.token_ids, dtype=torch.int64)[:, None])
        (-weight * advantage * logprobs.sum() / 12).backward()
    plain = flat_gradient(module)
    torch.testing.assert_close(ours, plain, atol=1e-7, rtol=1e-5)


def test_shared_baselines_know_by_sample_index_which_commit_rollouts_the_pilot_cannot_change(make_prompt, make_batch):
    whole, outcomes, rollouts = make_rollouts(make_prompt, make_batch, [[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]])
    (plan,) = whole.plans
    options = {"pilot_baseline": "cross", "commit_least": 2, "commit_mean": 4.0}
    pilot = replace(plan, size=2, share=0.25, **options)
    commit = replace(plan, size=4, share=0.75, first_sample_index=2, **options)
    outcomes = [outcome for outcome in outcomes if outcome.sample_index != 2]  # dropped: no other takes its place
    groups = make_groups([pilot, commit], rollouts, outcomes)
    batch = join(Collected(0, groups, rollouts[0], 0, {}), OptimalBaseline())
    assert batch.rewards.is_pilot.tolist() == [True, True, False, False, False]
    assert batch.rewards.is_certain.tolist() == [False, False, True, False, False]
    assert batch.rewards.commit_mean == 4.0
