"""What a CPU computes, a GPU computes too: `make test-gpu` runs the second half of each of these.

The policy is a random one of a few thousand parameters, as in all tests; the CPU's results in float64 are the truth.
"""

import pytest
import torch
from update_case import learn, make_joined, make_module, prepare

from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.losses.token_statistics import chunked_loss, statistics_from_logits
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
from dynamo_lightning.rollout.requests import make_requests
from dynamo_lightning.rollout.runner import sample_rollouts
from dynamo_lightning.types import Prompt

on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def head_gradient(device, dtype, fused):
    """Of a loss of log-probabilities and entropies by hidden states and weight, float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    weight = torch.randn(5000, 64, generator=generator, dtype=torch.float64).mul(0.3).to(device, dtype)
    weight.requires_grad_()
    targets = torch.randint(5000, (300,), generator=generator).to(device)
    if fused:
        loss = chunked_loss(
            hidden,
            weight,
            targets,
            lambda statistics, tokens: (statistics.logprobs + 0.1 * statistics.entropy).sum(),
            temperature=0.8,
            entropy_gradient=True,
            max_logits_bytes=2**20,
        )
    else:
        logprobs, entropy, *_ = statistics_from_logits(hidden @ weight.T / 0.8, targets)
        loss = (logprobs + 0.1 * entropy).sum()
    loss.backward()
    return torch.cat([hidden.grad.flatten(), weight.grad.flatten()]).double().cpu()


@on_both
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_gradient_of_the_head(device, dtype, tolerance):
    exact = head_gradient("cpu", torch.float64, fused=False)
    assert (head_gradient(device, dtype, fused=True) - exact).norm() < tolerance * exact.norm()


@on_both
@pytest.mark.parametrize("loss", [PolicyLoss(), PolicyLoss(modulation=None)], ids=["modulated", "plain"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 0.1)])
def test_gradient_of_an_update(tiny_policy, make_prompt, make_batch, device, loss, dtype, tolerance):
    gradients = []
    for place, kind, max_tokens in (("cpu", torch.float64, 1000), (device, dtype, 24)):
        module = make_module(tiny_policy, loss, kind, max_tokens_per_micro_batch=max_tokens).to(place)
        gradient, _ = learn(module, prepare(module, make_joined(module, make_prompt, make_batch)))
        assert gradient.device.type == place
        gradients.append(gradient.double().cpu())
    exact, found = gradients
    assert (found - exact).norm() < tolerance * exact.norm()


@on_both
@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"compile": True}, {"attn_implementation": "eager"}], ids=str
)
def test_options_of_the_policy_change_no_gradient(tiny_policy, make_prompt, make_batch, device, options):
    gradients = []
    for config in (PolicyConfig(), PolicyConfig(**options)):
        module = make_module(tiny_policy, dtype=torch.float32)
        module.policy = load_policy(tiny_policy, config)
        module.to(device)
        gradient, _ = learn(module, prepare(module, make_joined(module, make_prompt, make_batch)))
        gradients.append(gradient)
    assert (gradients[1] - gradients[0]).norm() < 1e-4 * gradients[0].norm()


@on_both
def test_rollouts(tiny_policy, make_batch, device):
    """The noise is made of integers: every device draws the same tokens."""
    tokenizer = load_tokenizer(tiny_policy)
    texts = ["1+1=", "What is 3*4?", "7-2="]
    prompts = [Prompt(i, text, text, tuple(tokenizer(text).input_ids), "0") for i, text in enumerate(texts)]
    requests = make_requests(make_batch(prompts, [3, 5, 2]), "train", seed=0)
    found = []
    for place, batch_size in (("cpu", 1), (device, 4)):
        policy = load_policy(tiny_policy, PolicyConfig()).double().eval().to(place)
        generator = TransformersEngine(batch_size)
        found.append(sample_rollouts(generator, policy, tokenizer, requests, max_response_length=40, temperature=0.9))
    for ours, other in zip(*found, strict=True):
        assert ours.token_ids.tolist() == other.token_ids.tolist()
        assert ours.logprobs == pytest.approx(other.logprobs, abs=1e-5)
