"""Adapters merged by peft's own rules, whatever layer they adapt: an export computes what the trained policy did."""

from pathlib import Path

import pytest
import torch
from architectures import write_model

from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.policy.lora import LoraConfig, merged_parameters

pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[lora]'")
IDS = torch.tensor([[3, 14, 25, 36, 47, 8, 19, 30]])


@pytest.fixture
def model_folder(tmp_path):
    return lambda name: str(write_model(name, tmp_path / "model"))


def adapted(folder: str, **settings):
    """A policy with adapters that are far from 0, as after training."""
    policy = load_policy(folder, PolicyConfig(lora=LoraConfig(rank=4, alpha=8, **settings))).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.05 if "magnitude" in name or "bias" in name else 0.2))
    return policy


def logits(policy):
    with torch.no_grad():
        return policy(IDS).logits


CASES = {
    "experts of qwen3_moe": ("qwen3_moe", {}),
    "experts of qwen2_moe": ("qwen2_moe", {}),
    "experts of mixtral": ("mixtral", {}),
    "experts of olmoe": ("olmoe", {}),
    "transposed experts of gpt_oss": ("gpt_oss", {}),
    "only experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    "Conv1D": ("gpt2", {}),
    "square Conv1D": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA on Conv1D": ("gpt2", {"use_dora": True}),
    "rank-stabilized": ("llama", {"use_rslora": True}),
    "rank and alpha patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}}),
    "all biases": ("qwen2", {"bias": "all"}),
    "biases of adapted layers": ("gpt2", {"bias": "lora_only"}),
    "tied head": ("gemma2", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_parameters_load_strictly_and_compute_the_same(model_folder, name):
    model, settings = CASES[name]
    folder = model_folder(model)
    policy, plain = adapted(folder, **settings), load_policy(folder, PolicyConfig()).eval()
    before = logits(plain)
    merged = dict(merged_parameters(policy))
    assert merged.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logits(plain), logits(policy), atol=2e-4, rtol=1e-4)
    assert (logits(policy) - before).abs().max() > 0.05


def test_all_linear_adapts_the_experts_of_a_mixture(model_folder):
    for name in ("qwen2_moe", "qwen3_moe", "mixtral"):
        policy = load_policy(model_folder(name), PolicyConfig(lora=LoraConfig()))
        trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
        assert (
            sum("experts" in name and "shared" not in name for name in trained) == 2 * 2 * 2
        )  # A, B; two each; layers


def test_dora_on_experts_is_refused_and_names_the_option(model_folder):
    with pytest.raises(UserError, match=r"model\.policy\.lora\.use_dora=true.*experts\.gate_up_proj.*target_modules"):
        load_policy(model_folder("mixtral"), PolicyConfig(lora=LoraConfig(use_dora=True)))


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_match_no_layer_are_refused(model_folder, name):
    with pytest.raises(UserError, match=rf"model\.policy\.lora\.{name}: no layer .* w_q"):
        load_policy(model_folder("llama"), PolicyConfig(lora=LoraConfig(**{name: {"w_q": 2}})))


def test_the_merge_leaves_the_trained_policy_as_it_is(model_folder):
    policy = adapted(model_folder("mixtral"))
    before = logits(policy)
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    list(merged_parameters(policy))
    assert torch.equal(logits(policy), before)
    assert all(torch.equal(value, state[name]) for name, value in policy.state_dict().items())


def test_a_merge_in_half_precision_is_rounded_once(model_folder):
    folder = Path(model_folder("llama"))
    policy = load_policy(str(folder), PolicyConfig(dtype="bfloat16", lora=LoraConfig(rank=4, alpha=8))).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    layer = policy.get_decoder().layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    expected = layer.base_layer.weight.float() + 2 * (b @ a)
    merged = dict(merged_parameters(policy))["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(merged, expected.bfloat16())
    exact = dict(merged_parameters(policy, cast=False))["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(exact, expected, atol=1e-6, rtol=1e-6)
