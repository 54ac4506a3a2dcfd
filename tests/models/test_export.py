"""An export is what it was compared with, or there is none."""

import pytest
import torch
from architectures import write_model
from transformers import AutoModelForCausalLM

from dynamo_lightning import export
from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.module import PolicyModule
from dynamo_lightning.policy.loading import PolicyConfig
from dynamo_lightning.policy.lora import LoraConfig

IDS = torch.tensor([[3, 14, 25, 36, 47, 8, 19, 30]])


def checkpoint(folder, name, **policy):
    """A module of the model and a checkpoint whose trainable weights were moved."""
    write_model(name, folder / "model")
    module = PolicyModule(str(folder / "model"), policy=PolicyConfig(**policy))
    module.configure_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        logits = module.policy.eval()(IDS).logits
    torch.save({"state_dict": module.state_dict()}, folder / "last.ckpt")
    return PolicyModule(str(folder / "model"), policy=PolicyConfig(**policy)), str(folder / "last.ckpt"), logits


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8)])
def test_the_written_model_computes_what_the_trained_one_did(tmp_path, lora, dtype):
    if lora is not None:
        pytest.importorskip("peft")
    module, path, expected = checkpoint(tmp_path, "qwen3_moe", lora=lora)
    export.export_policy(module, path, str(tmp_path / "out"), dtype)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert written.dtype == getattr(torch, dtype or "float32")
    with torch.no_grad():
        difference = (written(IDS).logits.float() - expected).norm() / expected.norm()
    assert difference < (1e-5 if dtype is None else 0.05)


def test_an_export_that_computes_something_else_leaves_nothing_behind(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    module, path, _ = checkpoint(tmp_path, "llama", lora=LoraConfig(rank=4, alpha=8))
    merged = export.merged_parameters

    def wrong(policy, cast=True):
        for name, value in merged(policy, cast):
            yield name, value + 0.05 * ("q_proj" in name) * torch.randn_like(value)

    monkeypatch.setattr(export, "merged_parameters", wrong)
    with pytest.raises(RunError, match="logits differ from the trained policy's by"):
        export.export_policy(module, path, str(tmp_path / "out"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last.ckpt", "model"]


def test_a_parameter_that_the_merge_loses_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    module, path, _ = checkpoint(tmp_path, "llama", lora=LoraConfig(rank=4, alpha=8))
    merged = export.merged_parameters
    monkeypatch.setattr(
        export, "merged_parameters", lambda *a, **o: (pair for pair in merged(*a, **o) if "q_proj" not in pair[0])
    )
    with pytest.raises(RunError, match=r"lacks .*q_proj"):
        export.export_policy(module, path, str(tmp_path / "out"))


def test_trained_biases_do_not_go_with_a_reference_without_adapters():
    with pytest.raises(UserError, match=r"model\.policy\.lora\.bias=all .*model\.loss\.kl_coefficient=0\.1"):
        PolicyModule(policy=PolicyConfig(lora=LoraConfig(bias="all")), loss=PolicyLoss(kl_coefficient=0.1))
