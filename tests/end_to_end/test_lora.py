"""Adapters: what is trained, what is frozen, what leaves the run."""

import pytest
import torch

from dynamo_lightning.checkpoints import read_weights
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.policy.lora import LoraConfig, merged_parameters, without_adapters

pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[lora]'")
IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture
def policy(tiny_policy):
    """With adapters that have been trained."""
    policy = load_policy(tiny_policy, PolicyConfig(lora=LoraConfig(rank=4, alpha=8))).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy


def logits(policy):
    with torch.no_grad():
        return policy(IDS).logits


def test_only_adapters_are_trained_and_they_add_nothing_at_first(tiny_policy):
    plain = load_policy(tiny_policy, PolicyConfig()).eval()
    policy = load_policy(tiny_policy, PolicyConfig(lora=LoraConfig())).eval()
    assert torch.equal(logits(policy), logits(plain))
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)


def test_merged_parameters_are_those_of_a_plain_policy_that_does_the_same(policy, tiny_policy):
    plain = load_policy(tiny_policy, PolicyConfig()).eval()
    before = logits(plain)
    merged = dict(merged_parameters(policy))
    assert merged.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logits(plain), logits(policy), atol=1e-5, rtol=0)
    assert (logits(policy) - before).abs().max() > 1e-3


def test_without_adapters_it_is_the_policy_that_training_started_from(policy, tiny_policy):
    plain = load_policy(tiny_policy, PolicyConfig()).eval()
    adapted = logits(policy)
    with without_adapters(policy) as reference:
        assert torch.equal(logits(reference), logits(plain))
    assert torch.equal(logits(policy), adapted)
    assert any(parameter.requires_grad for parameter in policy.parameters())


def test_unknown_layers_are_refused(tiny_policy):
    with pytest.raises(ValueError, match=r"model\.policy\.lora\.target_modules=\['w_q'\]"):
        load_policy(tiny_policy, PolicyConfig(lora=LoraConfig(target_modules=["w_q"])))


@pytest.mark.parametrize("options", [{"rank": 0}, {"target_modules": []}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=r"model\.policy\.lora\."):
        LoraConfig(**options)


def test_a_trained_run_exports_the_merged_policy(config, tiny_policy):
    from transformers import AutoModelForCausalLM

    from dynamo_lightning.cli import main

    more = ["--config", "overlays/lora.yaml", "--model.loss.kl_coefficient=0.1"]
    main(["fit", "--config", config, *more])
    checkpoint = "checkpoints/last.ckpt"
    main(["export", "--config", config, *more, "--ckpt_path", checkpoint, "--output_dir", "exported"])
    exported = AutoModelForCausalLM.from_pretrained("exported").eval()
    policy = load_policy(tiny_policy, PolicyConfig(lora=LoraConfig())).eval()
    policy.load_state_dict({k.removeprefix("policy."): v for k, v in read_weights(checkpoint).items()})
    torch.testing.assert_close(logits(exported), logits(policy), atol=1e-5, rtol=0)
    assert not torch.equal(logits(exported), logits(load_policy(tiny_policy, PolicyConfig()).eval()))
