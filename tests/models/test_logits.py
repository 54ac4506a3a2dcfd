"""Functions between the vocabulary head and the logits: measured, applied, and right in the gradient."""

import pytest
import torch
from architectures import tiny_config

from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.agreement import choose_layout
from dynamo_lightning.policy.forward import probe_rollouts, response_loss, response_statistics, uses_own_logits
from dynamo_lightning.policy.loading import choose_kernel
from dynamo_lightning.policy.logits import LogitTransform, fit_transform, logit_transform, own_logits
from dynamo_lightning.policy.packing import make_micro_batch

KINDS = {
    "llama": LogitTransform(1.0),
    "granite": LogitTransform(1 / 8),
    "cohere": LogitTransform(1 / 16),
    "hyperclovax": LogitTransform(1 / 8),
    "gemma2": LogitTransform(1.0, 3.0),
    "minicpm3": LogitTransform(1.0),  # its scale comes before the head
}


def make_policy(name, **changes):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(name, 64)
    for key, value in changes.items():
        setattr(config, key, value)
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    choose_kernel(policy, None)
    return policy


def gradient(policy, loss):
    policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def own_loss(policy, rollouts, temperature):
    """From the model's own logits, a sequence at a time."""
    total = 0.0
    for rollout in rollouts:
        logits = own_logits(policy, [*rollout.prompt.token_ids, *rollout.token_ids])
        logprobs = (logits[len(rollout.prompt.token_ids) - 1 : -1] / temperature).log_softmax(-1)
        total = total + logprobs.gather(1, torch.tensor(rollout.token_ids)[:, None]).square().sum()
    return total


@pytest.mark.parametrize("name", KINDS)
def test_the_function_is_measured_and_the_gradient_is_that_of_the_model_s_own_logits(name):
    policy = make_policy(name)
    transform = logit_transform(policy)
    assert transform.scale == pytest.approx(KINDS[name].scale, rel=1e-9)
    assert (transform.softcap or 0.0) == pytest.approx(KINDS[name].softcap or 0.0, rel=1e-6)
    rollouts = probe_rollouts(policy)
    expected = gradient(policy, own_loss(policy, rollouts, temperature=0.7))
    micro_batch = make_micro_batch(rollouts, [0, 1, 2], policy.device)
    for couples_tokens in (True, False):
        loss = response_loss(
            policy, micro_batch, lambda s, _: s.logprobs.square().sum(), couples_tokens=couples_tokens, temperature=0.7
        )
        difference = gradient(policy, loss) - expected
        assert difference.norm() < 1e-5 * expected.norm()  # some layers compute in float32


def test_a_scale_and_a_softcap_together_are_found():
    values = torch.logspace(-3, 4, 40, dtype=torch.float64)
    found = fit_transform(values, 5.0 * torch.tanh(0.25 * values / 5.0))
    assert (found.scale, found.softcap) == (pytest.approx(0.25, rel=1e-6), pytest.approx(5.0, rel=1e-6))


@pytest.mark.parametrize("function", [lambda z: z + 1.0, lambda z: z.sign() * z.abs().sqrt(), lambda z: -z, torch.relu])
def test_other_functions_are_not_taken_for_a_scale(function):
    values = torch.logspace(-3, 4, 64)
    values = torch.where(torch.arange(64) % 2 == 0, values, -values)
    assert fit_transform(values, function(values)) is None


def change_logits(policy, change):
    """Another function between head and logits, as remote code may have it."""
    forward = policy.forward

    def changed(*args, **options):
        output = forward(*args, **options)
        output.logits = change(output.logits)
        return output

    changed.__signature__ = __import__("inspect").signature(forward)
    policy.forward = changed


@pytest.mark.parametrize("learned", [False, True])
def test_an_unknown_function_makes_the_model_s_own_logits_count(learned):
    policy = make_policy("llama")
    scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    policy.register_parameter("scale", scale)
    change_logits(policy, (lambda z: z * scale) if learned else (lambda z: z.sign() * z.abs().sqrt()))
    assert logit_transform(policy) is None and uses_own_logits(policy)
    assert choose_layout(policy) == "packed"
    rollouts = probe_rollouts(policy)
    expected = gradient(policy, own_loss(policy, rollouts, temperature=1.0))
    micro_batch = make_micro_batch(rollouts, [0, 1, 2], policy.device)
    loss = response_loss(
        policy, micro_batch, lambda s, _: s.logprobs.square().sum(), couples_tokens=False, temperature=1.0
    )
    torch.testing.assert_close(gradient(policy, loss), expected, atol=1e-8, rtol=1e-6)


def test_padded_and_packed_layouts_give_the_same_statistics():
    policy = make_policy("llama")
    micro_batch = make_micro_batch(probe_rollouts(policy), [2, 0, 1], policy.device)
    packed = response_statistics(policy, micro_batch, temperature=1.0)
    policy.__dict__["token_layout"] = "padded"
    padded = response_statistics(policy, micro_batch, temperature=1.0)
    torch.testing.assert_close(padded.logprobs, packed.logprobs, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(padded.entropy, packed.entropy, atol=1e-10, rtol=1e-10)


def test_logits_that_depend_on_earlier_calls_are_refused():
    policy = make_policy("llama")
    noise = iter(range(10**6))
    change_logits(policy, lambda z: z + 0.01 * next(noise) * torch.arange(z.shape[-1]))
    with pytest.raises(UserError, match=r"model\.policy\.attn_implementation"):
        choose_layout(policy)
