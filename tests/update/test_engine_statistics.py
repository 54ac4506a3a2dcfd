"""Statistics that the engine gives while it samples take the place of a pass of the policy over the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from update_case import flat_gradient, learn, make_joined, make_module

from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.errors import RunError
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.losses.token_statistics import columns_of
from dynamo_lightning.policy.loading import load_tokenizer
from dynamo_lightning.rollout.requests import make_requests
from dynamo_lightning.rollout.runner import sample_rollouts
from dynamo_lightning.update.experience import prepare_experience
from dynamo_lightning.update.logprobs import all_statistics, engine_statistics
from dynamo_lightning.update.plan import NUM_COMPARED, UpdatePlan
from dynamo_lightning.update.updater import PolicyUpdater


@pytest.fixture
def case(tiny_policy, make_prompt, make_batch):
    """A policy in float32, and a batch of rollouts with random tokens and the statistics that an engine would give."""

    def make(loss=None, **updates):
        module = make_module(tiny_policy, loss, dtype=torch.float32, **updates)
        batch = make_joined(module, make_prompt, make_batch)
        everything = range(len(batch.rollouts))
        columns = columns_of(all_statistics(module.policy, batch, everything, module.update_config, 1.0))
        parts = torch.stack(columns, dim=-1).split(batch.response_lengths.tolist())
        pairs = zip(batch.rollouts, parts, strict=True)
        rollouts = [
            replace(rollout, logprobs=part[:, 0].numpy(), token_statistics=part.numpy()) for rollout, part in pairs
        ]
        return module, replace(batch, rollouts=tuple(rollouts))

    return make


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sampler_s_statistics_are_those_of_a_pass_over_its_tokens(tiny_policy, make_prompt, make_batch, temperature):
    module = make_module(tiny_policy, dtype=torch.float32)
    requests = make_requests(make_batch([make_prompt(1), make_prompt(2, (9, 8))], [5, 3]), "train", 0)
    rollouts = sample_rollouts(
        TransformersEngine(batch_size=3),
        module.policy.eval(),
        load_tokenizer(tiny_policy),
        requests,
        max_response_length=24,
        temperature=temperature,
        with_statistics=True,
    )
    batch = replace(make_joined(module, make_prompt, make_batch), rollouts=tuple(rollouts))
    own = all_statistics(module.policy, batch, range(len(rollouts)), module.update_config, temperature)
    given = engine_statistics(batch, own.logprobs)
    for one, other in zip(columns_of(given), columns_of(own), strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), abs=2e-5)
    assert np.concatenate([r.logprobs for r in rollouts]) == pytest.approx(given.logprobs.numpy(), abs=1e-7)


@pytest.mark.parametrize("loss", [PolicyLoss(), PolicyLoss(modulation=None)])
def test_the_gradient_is_that_with_a_pass_over_the_batch(case, loss):
    module, batch = case(loss)
    found = {}
    for recompute in (True, False):
        settings = replace(module.settings, config=replace(module.update_config, recompute_logprobs=recompute))
        experience = prepare_experience(module.policy, batch, settings)
        assert experience.plan.uses_engine_statistics is not recompute
        gradient, metrics = learn(module, experience)
        found[recompute] = gradient.clone(), metrics, experience.entropy
    assert torch.allclose(found[True][0], found[False][0], atol=1e-6)
    assert found[True][1] == pytest.approx(found[False][1], abs=1e-5)
    assert found[True][2] == pytest.approx(found[False][2], abs=1e-6)
    assert float(flat_gradient(module).abs().max()) > 1e-3


def test_only_a_sample_is_computed_beforehand_and_every_rollout_has_its_turn(case):
    module, batch = case()
    seen = torch.zeros(len(batch.rollouts), dtype=torch.bool)
    for iteration in range(len(batch.rollouts)):
        plan = UpdatePlan.of(replace(batch, iteration=iteration), module.loss, module.update_config, False)
        assert plan.uses_engine_statistics and plan.needed.all()
        assert int(plan.beforehand.sum()) == NUM_COMPARED < len(batch.rollouts)
        seen |= plan.beforehand
    assert seen.all()


@pytest.mark.parametrize("reason", ["another engine", "recompute", "missing in one"])
def test_otherwise_everything_is_computed(case, reason):
    module, batch = case()
    config = replace(module.update_config, recompute_logprobs=reason == "recompute")
    if reason == "missing in one":
        batch = replace(batch, rollouts=(replace(batch.rollouts[0], token_statistics=None), *batch.rollouts[1:]))
    plan = UpdatePlan.of(batch, module.loss, config, reason == "another engine")
    assert plan.beforehand.all() and not plan.uses_engine_statistics and plan.compares_beforehand


@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_wrong_statistics_end_the_run_before_a_step(case, column):
    module, batch = case()
    wrong = []
    for rollout in batch.rollouts:
        values = rollout.token_statistics.copy()
        values[:, column] += 0.1
        wrong.append(replace(rollout, token_statistics=values))
    with pytest.raises(RunError, match=r"differ from those of training by 1\.0e-01 nats on average"):
        prepare_experience(module.policy, replace(batch, rollouts=tuple(wrong)), module.settings, logp_tolerance=1e-3)


def test_sampled_log_probabilities_are_compared_in_the_first_step_without_a_pass(case):
    module, batch = case()
    rollouts = tuple(replace(r, logprobs=r.logprobs + 0.1 * (i % 2)) for i, r in enumerate(batch.rollouts))
    updater = PolicyUpdater(module.settings)
    experience = updater.prepare(module.policy, replace(batch, rollouts=rollouts), logp_tolerance=0.2)
    result = updater.step(module.trained(), experience)
    trained_on = [i for i, advantage in enumerate(batch.advantages.tolist()) if advantage or i in (3, 4, 10, 11)]
    sampled = experience.plan.beforehand.tolist()
    compared = [i for i in trained_on if batch.advantages[i] or sampled[i]]
    lengths = batch.response_lengths.tolist()
    expected = sum(0.1 * (i % 2) * lengths[i] for i in compared) / sum(lengths[i] for i in compared)
    assert result.metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(RunError, match="differ from those of training"):
        updater.step(module.trained(), replace(experience, logp_tolerance=expected / 2))
