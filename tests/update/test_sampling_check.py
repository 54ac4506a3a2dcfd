"""The tripwire: an update whose rollouts the policy would not have sampled like that is not taken."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from update_case import make_joined, make_module

from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.errors import RunError
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.update.clipping import MAX_OVERFLOWS_IN_A_ROW, GradientClipping
from dynamo_lightning.update.logprobs import all_statistics
from dynamo_lightning.update.sampling_check import LogpDifference, sampling_tolerance

LOSSES = {"computed beforehand": PolicyLoss(), "computed by the update": PolicyLoss(modulation=None)}


def case(tiny_policy, make_prompt, make_batch, loss, error=0.0):
    """A module, and a batch whose log-probabilities are the policy's own plus an error at every third token."""
    module = make_module(tiny_policy, loss)
    batch = make_joined(module, make_prompt, make_batch)
    exact = all_statistics(module.policy, batch, range(len(batch.rollouts)), module.update_config, 1.0).logprobs
    exact[::3] += error
    parts = exact.split(batch.response_lengths.tolist())
    rollouts = [
        replace(rollout, logprobs=tuple(part.tolist())) for rollout, part in zip(batch.rollouts, parts, strict=True)
    ]
    return module, replace(batch, rollouts=tuple(rollouts))


def learn(module, batch, tolerance):
    experience = module.updater.prepare(module.policy, batch, logp_tolerance=tolerance)
    return module.updater.step(module.trained(), experience)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_difference_of_all_tokens_is_logged(tiny_policy, make_prompt, make_batch, loss):
    module, batch = case(tiny_policy, make_prompt, make_batch, loss, error=0.3)
    num_tokens = int(batch.response_lengths.sum())
    metrics = learn(module, batch, None).metrics
    expected = 0.3 * len(range(0, num_tokens, 3)) / num_tokens
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(expected, rel=1e-6)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_difference_beyond_the_tolerance_stops_the_run_before_a_step(tiny_policy, make_prompt, make_batch, loss):
    module, batch = case(tiny_policy, make_prompt, make_batch, loss, error=0.003)
    before = [parameter.detach().clone() for parameter in module.policy.parameters()]
    with pytest.raises(RunError, match=r"model\.sampling\.logp_tolerance allows 1e-04.*attn_implementation=eager"):
        learn(module, batch, 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, module.policy.parameters(), strict=True))
    learn(module, batch, 0.01)
    assert not all(torch.equal(a, b) for a, b in zip(before, module.policy.parameters(), strict=True))


def test_differences_add_up_over_parts():
    a = LogpDifference.of(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]))
    b = LogpDifference.of(torch.tensor([0.0]), torch.tensor([-2.0]))
    assert a + b == LogpDifference(2.5, 2.0, 3)
    assert LogpDifference.of(torch.zeros(0), torch.zeros(0)) == LogpDifference()


def test_the_tolerance_is_that_of_the_coarser_precision_and_stale_or_filtered_rollouts_have_none():
    exact = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    short = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    generator = TransformersEngine()
    assert sampling_tolerance(None, generator, exact, 0) == 1e-3
    assert sampling_tolerance(None, generator, short, 0) == 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert sampling_tolerance(None, generator, exact, 0) == 0.05
    assert sampling_tolerance(0.2, generator, exact, 0) == 0.2
    assert sampling_tolerance(None, generator, exact, 3) is None
    filtered = SimpleNamespace(samples_from_policy=False)
    assert sampling_tolerance(0.2, filtered, exact, 0) is None


# --- truncated responses ----------------------------------------------------------------------------------------------


def flat(module):
    return torch.cat([p.grad.flatten() for p in module.policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss", [{}, {"modulation": None}, {"entropy_coefficient": 0.1, "modulation": None}])
def test_masked_responses_have_no_gradient_and_keep_their_place_in_the_denominators(
    tiny_policy, make_prompt, make_batch, loss
):
    """The gradient is linear in the responses: that of all is that of the masked ones plus that of the others."""
    gradients = []
    for mask, truncated in ((False, ()), (True, (0, 5)), (True, (1, 2, 3, 4, 6, 7, 8, 9, 10, 11))):
        module, batch = case(tiny_policy, make_prompt, make_batch, PolicyLoss(mask_truncated=mask, **loss))
        rollouts = [
            replace(rollout, status="truncated" if i in truncated else "finished")
            for i, rollout in enumerate(batch.rollouts)
        ]
        batch = replace(batch, rollouts=tuple(rollouts))
        learn(module, batch, None)
        gradients.append(flat(module))
    torch.testing.assert_close(gradients[1] + gradients[2], gradients[0], atol=1e-9, rtol=1e-6)
    assert gradients[2].norm() > 0


def test_an_update_of_masked_responses_only_takes_no_step(tiny_policy, make_prompt, make_batch):
    module, batch = case(tiny_policy, make_prompt, make_batch, PolicyLoss(mask_truncated=True))
    batch = replace(batch, rollouts=tuple(replace(rollout, status="truncated") for rollout in batch.rollouts))
    assert learn(module, batch, None).gradient_norms == ()


# --- gradient scaler --------------------------------------------------------------------------------------------------


def clip(clipping, policy, gradient, scaler=None):
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    clipping.clip(policy, optimizer_step=7, scaler=scaler)


def test_an_overflow_is_the_scaler_s_to_skip_until_it_happens_again_and_again(tiny_policy):
    policy, clipping = make_module(tiny_policy).policy, GradientClipping(1.0)
    scaler = SimpleNamespace(get_scale=lambda: 0.25)
    for _ in range(MAX_OVERFLOWS_IN_A_ROW):
        clip(clipping, policy, float("inf"), scaler)
    clip(clipping, policy, 1.0, scaler)
    assert clipping.num_overflows_in_a_row == 0
    for _ in range(MAX_OVERFLOWS_IN_A_ROW):
        clip(clipping, policy, float("inf"), scaler)
    with pytest.raises(RunError, match=r"trainer\.precision=16-mixed: .* 21 optimizer steps in a row"):
        clip(clipping, policy, float("inf"), scaler)


def test_without_a_scaler_the_first_gradient_that_is_not_finite_stops_the_run(tiny_policy):
    policy, clipping = make_module(tiny_policy).policy, GradientClipping(1.0)
    with pytest.raises(RunError, match="gradient norm is inf at optimizer step 7"):
        clip(clipping, policy, float("inf"))
