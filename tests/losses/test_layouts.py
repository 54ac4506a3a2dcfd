"""Every baseline on a real (tiny) policy: its gradient does not depend on how the batch is cut into micro-batches."""

import pytest
import torch
from update_case import SHUFFLED, learn, make_joined, make_module, prepare

from dynamo_lightning.losses.advantages import GRPO, DrGRPO, WReinforce
from dynamo_lightning.losses.cispo import CISPO
from dynamo_lightning.losses.covariance import ClipCov, KLCov
from dynamo_lightning.losses.entropy_advantages import EntropyAdvantages
from dynamo_lightning.losses.fork_tokens import ForkTokens
from dynamo_lightning.losses.gspo import GSPO
from dynamo_lightning.losses.modulation import DynamoModulation
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.losses.steer import Steer
from dynamo_lightning.losses.surrogate import ClippedSurrogate, UnclippedSurrogate


def gradient(tiny_policy, make_prompt, make_batch, loss, order=None, dtype=torch.float64, **updates):
    """Of the second update: the policy has moved since it sampled, so that ratios are not 1."""
    module = make_module(tiny_policy, loss, dtype, num_epochs=2, **updates)
    experience = prepare(module, make_joined(module, make_prompt, make_batch, order))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in module.policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    found, metrics = learn(module, experience)
    return found, {**metrics, **experience.metrics}


def make_loss(**parts):
    return PolicyLoss(**{"advantage": GRPO(), "modulation": None, **parts})


BASELINES = {
    "clip_higher": make_loss(surrogate=ClippedSurrogate(0.2, 0.28)),
    "dual_clip": make_loss(surrogate=ClippedSurrogate(dual_clip=3.0)),
    "entropy_loss": make_loss(entropy_coefficient=0.01),
    "fork_tokens": make_loss(modulation=ForkTokens()),
    "entropy_advantages": make_loss(modulation=EntropyAdvantages()),
    # Token log-probabilities of a random policy hardly differ: without wide bounds there would be no candidates.
    "clip_cov": make_loss(modulation=ClipCov(clipped_share=0.1, covariance_low=0.01), aggregation="token_mean"),
    "kl_cov": make_loss(penalty=KLCov(penalised_share=0.2), surrogate=UnclippedSurrogate(), aggregation="token_mean"),
    "w_reinforce": make_loss(advantage=WReinforce()),
    "steer": make_loss(modulation=Steer()),
    "gspo": make_loss(surrogate=GSPO(0.02, 0.02), aggregation="sequence_mean", length_normalisation="response_length"),
    "cispo": make_loss(surrogate=CISPO(max_ratio=1.05), aggregation="token_mean"),
    "dr_grpo": make_loss(advantage=DrGRPO(), aggregation="sequence_mean"),
}


@pytest.mark.parametrize("name", BASELINES)
def test_gradient_does_not_depend_on_micro_batches_and_order(tiny_policy, make_prompt, make_batch, name):
    fixtures = (tiny_policy, make_prompt, make_batch, BASELINES[name])
    whole, metrics = gradient(*fixtures)
    cut, cut_metrics = gradient(*fixtures, order=SHUFFLED, max_tokens_per_micro_batch=24, max_logits_bytes=5000)
    assert whole.abs().max() > 0
    torch.testing.assert_close(cut, whole, atol=1e-10, rtol=1e-10)
    assert cut_metrics == pytest.approx(metrics, abs=1e-5)


@pytest.mark.parametrize("name", ["entropy_loss", "clip_higher", "gspo"])
def test_in_bfloat16_the_gradient_depends_on_the_layout_no_more_than_by_rounding(
    tiny_policy, make_prompt, make_batch, name
):
    fixtures = (tiny_policy, make_prompt, make_batch, BASELINES[name])
    exact, _ = gradient(*fixtures)
    whole, _ = gradient(*fixtures, dtype=torch.bfloat16)
    cut, _ = gradient(*fixtures, dtype=torch.bfloat16, max_tokens_per_micro_batch=24, max_logits_bytes=5000)
    rounding = (whole.double() - exact).norm()
    assert 0 < rounding < 0.1 * exact.norm()
    assert (cut.double() - whole.double()).norm() < 2 * rounding


@pytest.mark.parametrize("name", sorted(BASELINES.keys() - {"clip_higher", "dual_clip"}))
def test_each_baseline_differs_from_grpo(tiny_policy, make_prompt, make_batch, name):
    fixtures = (tiny_policy, make_prompt, make_batch)
    loss = BASELINES[name]
    grpo = make_loss(aggregation=loss.aggregation, length_normalisation=loss.length_normalisation)
    plain, _ = gradient(*fixtures, grpo)
    ours, _ = gradient(*fixtures, loss)
    assert (ours - plain).norm() > 1e-3 * plain.norm()


def test_scope_micro_batch_depends_on_the_layout_as_the_papers_code_does(tiny_policy, make_prompt, make_batch):
    loss = make_loss(modulation=DynamoModulation(normaliser="max", scope="micro_batch"), aggregation="token_mean")
    whole, metrics = gradient(tiny_policy, make_prompt, make_batch, loss)
    cut, _ = gradient(tiny_policy, make_prompt, make_batch, loss, max_tokens_per_micro_batch=24)
    assert (cut - whole).norm() > 1e-3 * whole.norm()
    assert 1.0 < metrics["mod/beta_comp_mean"] < 1.4
