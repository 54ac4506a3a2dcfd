"""Entropy measured again after the steps: of fixed rollouts, at the policy before and after."""

import pytest
import torch
from update_case import make_joined, make_module, prepare

from dynamo_lightning.losses.entropy_budget import EntropyBudget
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.update.logprobs import all_statistics
from dynamo_lightning.update.token_weights import step_weights


def test_the_change_is_that_of_the_same_rollouts(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(modulation=EntropyBudget(probe_rollouts=5)))
    batch = make_joined(module, make_prompt, make_batch, iteration=0)
    experience = module.updater.prepare(module.policy, batch)
    probe = [i for i, rollout in enumerate(batch.rollouts) if experience.probe[i]]
    # By sample index, then prompt: the first rollout of each of the four prompts and one second.
    assert sorted(batch.rollouts[i].key for i in probe) == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]

    def mean():
        statistics = all_statistics(module.policy, batch, range(12), module.update_config, 1.0)
        rows = experience.probe[batch.token_rollouts]
        return float(statistics.entropy[rows].mean())

    before = mean()
    result = module.updater.step(module.trained(lr=1.0), experience)
    assert result.metrics["probe/entropy_change"] == pytest.approx(mean() - before, abs=1e-9)
    assert result.metrics["probe/entropy_change"] != 0


def test_nothing_is_measured_between_probes_and_by_other_modulations(tiny_policy, make_prompt, make_batch):
    for loss in (PolicyLoss(modulation=EntropyBudget(probe_every=4)), PolicyLoss()):
        module = make_module(tiny_policy, loss)
        experience = prepare(module, make_joined(module, make_prompt, make_batch, iteration=3))
        assert experience.probe is None
        assert "probe/entropy_change" not in module.updater.step(module.trained(), experience).metrics


def test_modulations_see_the_weights_of_the_loss(tiny_policy, make_prompt, make_batch):
    seen = []

    class Spy(EntropyBudget):
        def __call__(self, inputs):
            seen.append(inputs.loss_weights())
            return super().__call__(inputs)

    module = make_module(tiny_policy, PolicyLoss(modulation=Spy()))
    experience = prepare(module, make_joined(module, make_prompt, make_batch))
    expected = step_weights(experience.batch, module.loss, experience.plan.steps[0], 12)
    assert torch.equal(seen[0], expected) and len(expected.unique()) > 1
