import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lightning.policy.forward import response_loss
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.policy.packed_attention import bucket_sequences, packed_attention
from dynamo_lightning.policy.packing import make_micro_batch

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_buckets_hold_every_position_once_and_little_else(lengths):
    buckets = bucket_sequences(lengths, CPU)
    entries = torch.cat([positions.flatten() for positions in buckets.positions])
    # Taking the row to the buckets and back gives the row.
    assert entries[buckets.order].tolist() == list(range(sum(lengths)))
    for positions in buckets.positions:
        missing = positions.numel() - len(positions.unique())
        assert missing <= len(positions) * max(8, positions.shape[1] // 5)
        # Within a sequence positions ascend by one and stay at the last.
        steps = positions.diff(dim=1)
        assert ((steps == 1) | (steps == 0)).all() and (steps.diff(dim=1) <= 0).all()


def test_buckets_by_hand():
    buckets = bucket_sequences([2, 12, 3], CPU)
    assert [positions.tolist() for positions in buckets.positions] == [
        list([list(range(2, 14))]),
        [[14, 15, 16], [0, 1, 1]],
    ]
    assert buckets.order.tolist() == [15, 16, *range(12), 12, 13, 14]


def test_without_sequences_it_is_sdpa():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    layer = torch.nn.Module()
    ours, _ = packed_attention(layer, query, key, value, mask)
    theirs, _ = sdpa_attention_forward(layer, query, key, value, mask)
    torch.testing.assert_close(ours, theirs)


def test_decoding_with_shared_key_heads_is_sdpa():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    query, (key, value) = torch.randn(3, 6, 1, 8), torch.randn(2, 3, 2, 7, 8).unbind()
    mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
    mask[0, ..., :4] = False
    layer = torch.nn.Module()
    layer.num_key_value_groups = 3
    ours, _ = packed_attention(layer, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_equal_those_of_masked_attention(tiny_policy, make_prompt, make_rollout, gradient_checkpointing):
    """Guard: a backward pass that recomputes the layers must see the sequences too."""
    rollouts = [
        make_rollout(make_prompt(i, tuple(range(3, 3 + p))), 0, tuple(range(9, 9 + r)))
        for i, (p, r) in enumerate([(3, 9), (17, 1), (5, 30), (4, 8)])
    ]
    gradients = []
    for attention in ("sdpa", "eager"):
        options = PolicyConfig(attn_implementation=attention, gradient_checkpointing=gradient_checkpointing)
        policy = load_policy(tiny_policy, options).double()
        assert policy.config._attn_implementation == ("packed_sdpa" if attention == "sdpa" else "eager")
        micro_batch = make_micro_batch(rollouts, [2, 0, 3, 1], CPU)
        loss = response_loss(policy, micro_batch, lambda s, _: s.logprobs.sum(), couples_tokens=False, temperature=1.0)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[1].norm()
