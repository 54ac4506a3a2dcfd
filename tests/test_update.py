"""The update on a real (tiny) policy: what its gradient may and may not depend on."""

import math
from dataclasses import replace

import pytest
import torch

from dynamo_lightning.datamodule import RolloutDataModule
from dynamo_lightning.losses.advantages import assign_advantages
from dynamo_lightning.losses.cispo import CISPO
from dynamo_lightning.losses.gspo import GSPO
from dynamo_lightning.losses.modulation import DynamoModulation
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.scoring import all_statistics, check_finite, scoring_pass
from dynamo_lightning.types import Collected, Outcome, Rollout, Score
from dynamo_lightning.update import accumulate_gradient, split_prompts
from dynamo_lightning.update_config import UpdateConfig


class FakeStrategy:
    model = None


class FakeTrainer:
    strategy = FakeStrategy()


def assign(module, parts, outcomes, rollouts):
    collected = Collected(tuple(parts), tuple(rollouts), tuple(outcomes), rollouts[0], 0, {})
    return assign_advantages(collected, module.loss.advantage)


def make_module(tiny_policy, loss=None, **updates):
    module = PolicyModule(tiny_policy, loss=loss or PolicyLoss(), updates=UpdateConfig(**updates))
    module.configure_model()
    module.policy.double()
    module.sampling.max_response_length = 12
    module._trainer = FakeTrainer()
    module.manual_backward = lambda loss: loss.backward()
    return module


def make_case(module, make_prompt, make_batch, rewards):
    """Rollouts of random tokens with the given rewards, a list for each prompt."""

    def tokens(low, high, *key):
        generator = torch.Generator().manual_seed(sum((k + 1) * 1000**i for i, k in enumerate(key)))
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, 60, (length,), generator=generator).tolist())

    prompts = [make_prompt(i, tokens(2, 9, i)) for i in range(len(rewards))]
    batch = make_batch(prompts, [len(group) for group in rewards])
    rollouts, outcomes = [], []
    for prompt, group in zip(prompts, rewards, strict=True):
        for index, reward in enumerate(group):
            response = tokens(1, 12, prompt.prompt_id, index)
            rollouts.append(Rollout(prompt, index, response, (0.0,) * len(response), "", False))
            outcomes.append(Outcome(prompt.prompt_id, index, Score(reward, {}), len(response), False))
    return batch, outcomes, rollouts


REWARDS = [[1.0, 0.0, 0.0], [1.0, 1.0], [0.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0]]


def gradient(module, make_prompt, make_batch, rewards=REWARDS, chosen=None, order=None):
    batch, outcomes, rollouts = make_case(module, make_prompt, make_batch, rewards)
    rollouts = [rollouts[i] for i in order] if order else rollouts
    rollout_batch = assign(module, [batch], outcomes, rollouts)
    experience = scoring_pass(module.policy, None, rollout_batch, module.loss, module.update_config, 1.0)
    module.policy.zero_grad()
    chosen = torch.ones(len(rewards), dtype=torch.bool) if chosen is None else chosen
    metrics = accumulate_gradient(module, experience, chosen)
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.policy.parameters()]
    return torch.cat([g.flatten() for g in flat]), metrics


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
    shuffled, _ = gradient(module, make_prompt, make_batch, order=[5, 1, 0, 11, 3, 2, 4, 10, 9, 8, 7, 6])
    torch.testing.assert_close(shuffled, gradient(module, make_prompt, make_batch)[0], atol=1e-10, rtol=1e-10)


def plain_grpo_gradient(module, make_prompt, make_batch):
    """The gradient of `−1/N Σ_i 1/n_i Σ_j Σ_t A_ij log π / T_max`, rollout by rollout, from whole logits."""
    _, _, rollouts = make_case(module, make_prompt, make_batch, REWARDS)
    module.policy.zero_grad()
    for rollout in rollouts:
        group = REWARDS[rollout.prompt.prompt_id]
        others = [r for i, r in enumerate(group) if i != rollout.sample_index]
        advantage = group[rollout.sample_index] - sum(others) / len(others)
        sequence = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
        logits = module.policy(sequence).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(rollout.token_ids)[:, None])
        (-advantage * logprobs.sum() / len(REWARDS) / len(group) / 12).backward()
    return torch.cat([p.grad.flatten() for p in module.policy.parameters()])


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
    batch, outcomes, rollouts = make_case(module, make_prompt, make_batch, REWARDS)
    straight = assign(module, [batch], outcomes, rollouts)
    shuffled = assign(module, [batch], outcomes[::-1], rollouts)
    assert torch.equal(straight.advantages, shuffled.advantages)
    assert torch.equal(straight.group_indices, shuffled.group_indices)
    expected = [1.0, -0.5, -0.5, 0.0, 0.0, -0.75, 0.5, 0.5, -0.75, 0.5, 0.0, 0.0]
    assert straight.advantages.tolist() == pytest.approx(expected)
    data = [RolloutDataModule(), RolloutDataModule()]
    data[0].observe(batch, outcomes)
    data[1].observe(batch, outcomes[::-1])
    rates = [d.statistics.estimate([0, 1, 2, 3], 1).success_rate.tolist() for d in data]
    assert rates[0] == rates[1]
    assert rates[0][1] > rates[0][2] > rates[0][0] > rates[0][3]


def test_a_dropped_rollout_leaves_group_statistics_and_denominators(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy)
    batch, outcomes, rollouts = make_case(module, make_prompt, make_batch, [[1.0, 0.0, 0.0], [1.0, 0.0]])
    kept = assign(module, [batch], outcomes[1:], rollouts)
    assert [rollout.key for rollout in kept.rollouts] == [(0, 1), (0, 2), (1, 0), (1, 1)]
    assert kept.group_sizes.tolist() == [2, 2]
    assert kept.group_teaches.tolist() == [False, True]
    assert int(kept.group_tokens.sum()) == sum(len(rollout.token_ids) for rollout in rollouts[1:])


def test_pilot_and_commit_have_baselines_and_shares_of_their_own(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(modulation=None))
    whole, outcomes, rollouts = make_case(module, make_prompt, make_batch, [[1.0, 0.0, 1.0, 1.0, 0.0]])
    parts = [whole.with_groups([2], [0.25]), whole.with_groups([3], [0.75], first_sample_index=2)]
    batch = assign(module, parts, outcomes, rollouts)
    assert batch.advantages.tolist() == pytest.approx([1.0, -1.0, 0.5, 0.5, -1.0])
    assert batch.group_prompts.tolist() == [0, 0]
    assert batch.group_sizes.tolist() == [2, 3]
    experience = scoring_pass(module.policy, None, batch, module.loss, module.update_config, 1.0)
    accumulate_gradient(module, experience, torch.tensor([True, True]))
    ours = torch.cat([p.grad.flatten() for p in module.policy.parameters()])
    module.policy.zero_grad()
    for rollout, advantage in zip(rollouts, batch.advantages.tolist(), strict=True):
        weight = 0.25 / 2 if rollout.sample_index < 2 else 0.75 / 3
        sequence = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
        logits = module.policy(sequence).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(rollout.token_ids)[:, None])
        (-weight * advantage * logprobs.sum() / 12).backward()
    plain = torch.cat([p.grad.flatten() for p in module.policy.parameters()])
    torch.testing.assert_close(ours, plain, atol=1e-7, rtol=1e-5)


def test_log_probabilities_that_are_not_finite_stop_the_run_and_name_the_prompts(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy)
    batch, outcomes, rollouts = make_case(module, make_prompt, make_batch, REWARDS)
    experience_batch = assign(module, [batch], outcomes, rollouts)
    logprobs = torch.zeros(sum(len(rollout.token_ids) for rollout in rollouts))
    check_finite(experience_batch, logprobs)
    last = next(i for i, rollout in enumerate(rollouts) if rollout.prompt.prompt_id == 3)
    logprobs[sum(len(rollout.token_ids) for rollout in rollouts[:last])] = torch.nan
    with pytest.raises(RuntimeError, match=r"1 prompts are not finite \(prompt ids 3\) at iteration"):
        check_finite(experience_batch, logprobs)
    with torch.no_grad():
        module.policy.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(RuntimeError, match="prompt ids 0, 1, 2, 3"):
        scoring_pass(module.policy, None, experience_batch, module.loss, module.update_config, 1.0)


def test_log_probabilities_that_only_the_update_sees_are_checked_too(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(modulation=None))
    batch, outcomes, rollouts = make_case(module, make_prompt, make_batch, [REWARDS[0], REWARDS[2]])
    experience = scoring_pass(
        module.policy, None, assign(module, [batch], outcomes, rollouts), module.loss, module.update_config, 1.0
    )
    with torch.no_grad():
        module.policy.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(RuntimeError, match=r"2 prompts are not finite \(prompt ids 0, 1\) at iteration"):
        accumulate_gradient(module, experience, torch.ones(2, dtype=torch.bool))


SINGLE_UPDATES = {
    "plain": PolicyLoss(modulation=None),
    "all_tokens_count": PolicyLoss(modulation=None, entropy_coefficient=0.01),
    "recomputed": PolicyLoss(modulation=DynamoModulation(scope="micro_batch")),
    "gspo": PolicyLoss(modulation=None, surrogate=GSPO()),
    "cispo": PolicyLoss(modulation=None, surrogate=CISPO()),
}


@pytest.mark.parametrize("loss", SINGLE_UPDATES.values(), ids=SINGLE_UPDATES)
def test_a_single_update_needs_no_old_log_probabilities(tiny_policy, make_prompt, make_batch, loss):
    """Scored beforehand, as several updates need it, or not: the same first gradient and the same metrics."""
    found = []
    for num_epochs in (1, 2):
        module = make_module(tiny_policy, loss, num_epochs=num_epochs)
        batch, outcomes, rollouts = make_case(module, make_prompt, make_batch, REWARDS)
        rollout_batch = assign(module, [batch], outcomes, rollouts)
        experience = scoring_pass(module.policy, None, rollout_batch, module.loss, module.update_config, 1.0)
        assert (experience.old_logprobs is None) == (num_epochs == 1)
        metrics = accumulate_gradient(module, experience, torch.ones(len(REWARDS), dtype=torch.bool))
        entropies = experience.metrics["entropy"], metrics.pop("entropy", 0.0)
        assert (entropies[0] > 0) == (num_epochs == 2 or loss.vanishes_without_advantage)
        assert (entropies[1] > 0) == (num_epochs == 1)
        flat = torch.cat([parameter.grad.flatten() for parameter in module.policy.parameters()])
        found.append((flat, metrics, sum(entropies)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-10, rtol=1e-10)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-10)
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-10)


def test_tokens_of_another_engine_weigh_their_ratio(tiny_policy, make_prompt, make_batch):
    """log π_old − log π_engine = log 1.5 for every token makes the gradient 1.5 times as large."""
    module = make_module(tiny_policy, PolicyLoss(modulation=None))
    plain, _ = gradient(module, make_prompt, make_batch)
    batch, outcomes, rollouts = make_case(module, make_prompt, make_batch, REWARDS)
    own = scoring_pass(
        module.policy, None, assign(module, [batch], outcomes, rollouts), module.loss, module.update_config, 1.0
    )
    logprobs = all_statistics(module.policy, own.batch, range(len(rollouts)), module.update_config, 1.0).logprobs
    parts = (logprobs - math.log(1.5)).split([len(rollout.token_ids) for rollout in rollouts])
    shifted = [replace(r, logprobs=tuple(part.tolist())) for r, part in zip(rollouts, parts, strict=True)]
    rollout_batch = assign(module, [batch], outcomes, shifted)
    experience = scoring_pass(module.policy, None, rollout_batch, module.loss, module.update_config, 1.0, True)
    module.policy.zero_grad()
    accumulate_gradient(module, experience, torch.ones(len(REWARDS), dtype=torch.bool))
    corrected = torch.cat([parameter.grad.flatten() for parameter in module.policy.parameters()])
    # Advantages and weights are float32.
    torch.testing.assert_close(corrected, 1.5 * plain, atol=1e-8, rtol=1e-4)
    assert experience.metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.5)
    assert not any(name.startswith("sampling/") for name in own.metrics)
