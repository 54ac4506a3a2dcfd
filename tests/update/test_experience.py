"""Experience of a real (tiny) policy: what is computed before the first step, and what need not be."""

import math
from dataclasses import replace

import pytest
import torch
from update_case import REWARDS, SHUFFLED, assign, learn, make_joined, make_module, make_rollouts, prepare

from dynamo_lightning.losses.advantages import WReinforce
from dynamo_lightning.losses.cispo import CISPO
from dynamo_lightning.losses.gspo import GSPO
from dynamo_lightning.losses.modulation import DynamoModulation
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.update.config import UpdateConfig
from dynamo_lightning.update.logprobs import all_statistics, check_finite, token_keys
from dynamo_lightning.update.plan import passes_per_rollout


def test_log_probabilities_that_are_not_finite_stop_the_run_and_name_the_prompts(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy)
    batch = make_joined(module, make_prompt, make_batch)
    logprobs = torch.zeros(sum(len(rollout.token_ids) for rollout in batch.rollouts))
    check_finite(batch, logprobs)
    last = next(i for i, rollout in enumerate(batch.rollouts) if rollout.prompt.prompt_id == 3)
    logprobs[sum(len(rollout.token_ids) for rollout in batch.rollouts[:last])] = torch.nan
    with pytest.raises(RuntimeError, match=r"1 prompts are not finite \(prompt ids 3\) at iteration 3"):
        check_finite(batch, logprobs)
    with torch.no_grad():
        module.policy.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(RuntimeError, match="prompt ids 0, 1, 2, 3"):
        prepare(module, batch)


def test_log_probabilities_that_only_the_update_sees_are_checked_too(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy, PolicyLoss(modulation=None))
    batch, outcomes, rollouts = make_rollouts(make_prompt, make_batch, [REWARDS[0], REWARDS[2]])
    experience = prepare(module, assign(module, [batch], outcomes, rollouts))
    with torch.no_grad():
        module.policy.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(RuntimeError, match=r"2 prompts are not finite \(prompt ids 0, 1\) at iteration"):
        learn(module, experience)


SINGLE_UPDATES = {
    "plain": PolicyLoss(modulation=None),
    "all_tokens_count": PolicyLoss(modulation=None, entropy_coefficient=0.01),
    "recomputed": PolicyLoss(modulation=DynamoModulation(scope="micro_batch")),
    "gspo": PolicyLoss(modulation=None, surrogate=GSPO()),
    "cispo": PolicyLoss(modulation=None, surrogate=CISPO()),
}


@pytest.mark.parametrize("loss", SINGLE_UPDATES.values(), ids=SINGLE_UPDATES)
def test_a_single_update_needs_no_old_log_probabilities(tiny_policy, make_prompt, make_batch, loss):
    """Computed beforehand, as several updates need it, or not: the same first gradient and the same metrics."""
    found = []
    for num_epochs in (1, 2):
        module = make_module(tiny_policy, loss, num_epochs=num_epochs)
        experience = prepare(module, make_joined(module, make_prompt, make_batch))
        assert (experience.old_logprobs is None) == (num_epochs == 1)
        gradient, metrics = learn(module, experience)
        entropies = experience.entropy, metrics.pop("entropy", 0.0)
        assert (entropies[0] > 0) == (num_epochs == 2 or loss.vanishes_without_advantage)
        assert (entropies[1] > 0) == (num_epochs == 1)
        found.append((gradient, metrics, sum(entropies)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-10, rtol=1e-10)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-10)
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-10)


@pytest.mark.parametrize(
    ("loss", "updates", "engine", "passes"),
    [
        (PolicyLoss(), {}, False, (4, 1)),
        (PolicyLoss(modulation=None), {}, False, (3, 1)),
        (PolicyLoss(modulation=None), {}, True, (4, 1)),
        (PolicyLoss(), {"num_epochs": 3, "num_mini_batches": 2}, False, (10, 1)),
        (PolicyLoss(entropy_coefficient=0.1), {}, False, (4, 4)),
        (PolicyLoss(advantage=WReinforce(), modulation=None), {}, False, (3, 3)),
    ],
)
def test_cost_of_a_rollout_in_passes_through_the_policy(loss, updates, engine, passes):
    assert passes_per_rollout(loss, UpdateConfig(**updates), engine) == passes


def test_tokens_of_another_engine_weigh_their_ratio(tiny_policy, make_prompt, make_batch):
    """log π_old − log π_engine = log 1.5 for every token makes the gradient 1.5 times as large."""
    module = make_module(tiny_policy, PolicyLoss(modulation=None))
    batch, outcomes, rollouts = make_rollouts(make_prompt, make_batch)
    own = prepare(module, assign(module, [batch], outcomes, rollouts))
    plain, _ = learn(module, own)
    logprobs = all_statistics(module.policy, own.batch, range(len(rollouts)), module.update_config, 1.0).logprobs
    parts = (logprobs - math.log(1.5)).split([len(rollout.token_ids) for rollout in rollouts])
    shifted = [replace(r, logprobs=tuple(part.tolist())) for r, part in zip(rollouts, parts, strict=True)]
    experience = prepare(module, assign(module, [batch], outcomes, shifted), separate_engine=True)
    corrected, _ = learn(module, experience)
    # Advantages and weights are float32.
    torch.testing.assert_close(corrected, 1.5 * plain, atol=1e-8, rtol=1e-4)
    assert experience.metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.5)
    assert not any(name.startswith("sampling/") for name in own.metrics)


def test_token_keys_belong_to_the_token_and_not_to_its_place(tiny_policy, make_prompt, make_batch):
    module = make_module(tiny_policy)
    batch = make_joined(module, make_prompt, make_batch)
    shuffled = make_joined(module, make_prompt, make_batch, SHUFFLED)

    def by_rollout(batch):
        lengths = [len(rollout.token_ids) for rollout in batch.rollouts]
        keys = token_keys(batch, torch.device("cpu")).split(lengths)
        return {rollout.key: part.tolist() for rollout, part in zip(batch.rollouts, keys, strict=True)}

    assert by_rollout(batch) == by_rollout(shuffled)
    keys = token_keys(batch, torch.device("cpu"))
    assert keys.dtype == torch.int64 and int(keys.min()) >= 0 and len(keys.unique()) == len(keys)
    assert token_keys(type(batch)(**{**vars(batch), "rollouts": ()}), torch.device("cpu")).shape == (0,)
    later = type(batch)(**{**vars(batch), "iteration": batch.iteration + 1})
    assert not torch.equal(token_keys(later, torch.device("cpu")), keys)
