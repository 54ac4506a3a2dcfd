"""Scoring and updates without dropout, and without anything else that is random."""

import pytest
import torch
from architectures import tiny_config

from dynamo_lightning.policy.dropout import set_training_mode
from dynamo_lightning.policy.forward import probe_rollouts, response_statistics
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.policy.packing import make_micro_batch


def save(name, folder):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(name, 64)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_bigcode", "biogpt", "granite", "mixtral"])
def test_two_passes_of_the_update_give_the_same_log_probabilities(name, checkpointing, tmp_path):
    """Each has probabilities of 0.1 in its configuration, Mixtral noise on its router."""
    folder = save(name, tmp_path)
    policy = load_policy(folder, PolicyConfig(gradient_checkpointing=checkpointing))
    set_training_mode(policy)
    micro_batch = make_micro_batch(probe_rollouts(policy), [0, 1, 2], policy.device)
    first, second = (response_statistics(policy, micro_batch, temperature=1.0).logprobs for _ in range(2))
    assert torch.equal(first, second)
    first.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in policy.parameters())
    policy.eval()
    torch.testing.assert_close(
        response_statistics(policy, micro_batch, temperature=1.0).logprobs, first, atol=1e-6, rtol=1e-6
    )


def test_gradient_checkpointing_still_recomputes_the_layers(tmp_path):
    policy = load_policy(save("gpt2", tmp_path), PolicyConfig(gradient_checkpointing=True))
    set_training_mode(policy)
    calls = []
    policy.get_decoder().h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    micro_batch = make_micro_batch(probe_rollouts(policy), [0], policy.device)
    response_statistics(policy, micro_batch, temperature=1.0).logprobs.sum().backward()
    assert len(calls) == 4  # the measurement of the logits twice, once forward, once again backward
