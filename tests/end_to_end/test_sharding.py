"""Every architecture's gradient is the same whole and in shards, tied heads and untied ones."""

import pytest
import torch
from launcher import run

from dynamo_lightning.policy.forward import response_loss
from dynamo_lightning.policy.packing import make_micro_batch
from dynamo_lightning.types import Prompt, Rollout

ARCHITECTURES = ("Qwen2", "Qwen3", "Llama", "Mistral", "Gemma")


def make_policy(architecture, tied):
    """A tiny random policy, the same wherever it is made."""
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{architecture}Config")(**sizes, **heads, pad_token_id=0, tie_word_embeddings=tied)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def gradients(policy):
    """Of a loss over three rollouts, by parameter."""
    prompt = Prompt(0, "", "", (5, 6, 7), "")
    rollouts = [Rollout(prompt, i, tuple(range(8, 8 + length)), (), "") for i, length in enumerate((3, 9, 5))]
    micro_batch = make_micro_batch(rollouts, [1, 0, 2], torch.device("cpu"))
    loss = response_loss(policy, micro_batch, lambda s, _: -s.logprobs.sum(), couples_tokens=False, temperature=1.0)
    loss.backward()
    return {name: parameter.grad for name, parameter in policy.named_parameters()}


def compare(strategy):
    """Compare each architecture's gradients; every process has the same rollouts, so their mean is that of one."""
    import os

    import torch.distributed as dist
    from fsdp1_on_cpu import CPUFSDPStrategy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel

    from dynamo_lightning.policy.sharding import clip_gradient, shard_policy
    from dynamo_lightning.strategies import FSDP2Strategy

    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
    chosen = {"fsdp2": FSDP2Strategy, "fsdp1": CPUFSDPStrategy}[strategy]()
    if strategy == "fsdp2":
        chosen._device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    for architecture in ARCHITECTURES:
        for tied in (True, False):
            whole = make_policy(architecture, tied)
            expected = gradients(whole)
            with chosen.model_sharded_context():
                policy = shard_policy(make_policy(architecture, tied), chosen, "32-true")
            found = gradients(policy)
            norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
            torch.testing.assert_close(clip_gradient(policy, None), norm, msg=architecture)
            if strategy == "fsdp2":
                assert found.keys() == expected.keys(), architecture
                for name, gradient in expected.items():
                    assert found[name].to_local().numel() < gradient.numel()
                    torch.testing.assert_close(found[name].full_tensor(), gradient, msg=f"{architecture} {name}")
            else:
                with FullyShardedDataParallel.summon_full_params(policy, with_grads=True):
                    for name, parameter in policy.named_parameters():
                        original = name.replace("_fsdp_wrapped_module.", "")
                        torch.testing.assert_close(parameter.grad, expected[original], msg=f"{architecture} {name}")
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_gradients_in_shards_are_those_of_the_whole(strategy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(compare, (strategy,), 2)
