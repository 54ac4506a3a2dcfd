import pytest
import torch

from dynamo_lightning.engines.vllm.pad_heads import write_padded
from dynamo_lightning.policy.loading import PolicyConfig, load_policy


def test_wider_heads_change_nothing_and_stay_zero_in_training(tmp_path):
    narrow = load_policy("embedded:arithmetic-qwen3", PolicyConfig())
    write_padded("embedded:arithmetic-qwen3", str(tmp_path), 32)
    wide = load_policy(str(tmp_path), PolicyConfig())
    tokens = torch.randint(0, 70, (3, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wide(tokens).logits, narrow(tokens).logits, atol=1e-4, rtol=1e-4)
    wide(tokens).logits.logsumexp(-1).sum().backward()
    for layer in wide.model.layers:
        added = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        for rows in (module.weight.grad.reshape(-1, 2, 16, 96)[:, :, 12:] for module in added):
            assert not rows.any()
        assert not layer.self_attn.o_proj.weight.grad.reshape(96, -1, 2, 16)[..., 12:].any()


@pytest.mark.parametrize("head_dim", [24, 16, 33])
def test_impossible_head_sizes_are_refused(tmp_path, head_dim):
    with pytest.raises(ValueError, match="must be even and larger than the model's 24"):
        write_padded("embedded:arithmetic-qwen3", str(tmp_path), head_dim)
