import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo_lightning.policy.forward import check_packing, response_statistics
from dynamo_lightning.policy.loading import PolicyConfig, load_policy
from dynamo_lightning.policy.packed_attention import register
from dynamo_lightning.policy.packing import balance, make_micro_batch, pack


@given(st.lists(st.integers(1, 50), max_size=60))
def test_every_sequence_is_packed_once_and_no_row_overflows(lengths):
    rows = pack(lengths, max_tokens=50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    # First fit decreasing never opens a row while half-empty ones are left.
    assert sum(sum(lengths[i] for i in row) <= 25 for row in rows) <= 1


def test_a_sequence_longer_than_a_row_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"has 51 tokens, but model\.updates\.max_tokens_per_micro_batch is 50"):
        pack([3, 51], max_tokens=50)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 5))
def test_ranks_get_about_the_same_cost(costs, num_ranks):
    ranks = balance(costs, num_ranks)
    assert sorted(index for rank in ranks for index in rank) == list(range(len(costs)))
    totals = [sum(costs[i] for i in rank) for rank in ranks]
    # Whoever has most was behind everyone before its last item came, which is among its cheapest.
    assert max(totals) - min(totals) <= max(costs, default=0)
    assert max(totals) <= sum(costs) / num_ranks + max(costs, default=0)


def test_balance_by_hand():
    assert balance([5, 1, 4, 2, 3], 2) == [[0, 1, 3], [2, 4]]  # 5 | 4, 4 + 3, 5 + 2, 7 + 1


def test_micro_batch_by_hand(make_prompt, make_rollout):
    rollouts = [
        make_rollout(make_prompt(1, (10, 11)), 0, (20, 21, 22)),
        make_rollout(make_prompt(2, (12,)), 0, (23,)),
        make_rollout(make_prompt(3, (13, 14, 15)), 0, (24, 25)),
    ]
    micro_batch = make_micro_batch(rollouts, [2, 0], torch.device("cpu"))
    assert micro_batch.input_ids.tolist() == [[13, 14, 15, 24, 25, 10, 11, 20, 21, 22]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert micro_batch.predictor_positions.tolist() == [2, 3, 6, 7, 8]
    assert micro_batch.targets.tolist() == [24, 25, 20, 21, 22]
    assert micro_batch.token_indices.tolist() == [4, 5, 0, 1, 2]


def architectures():
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for name in ("Qwen2", "Qwen3", "Llama", "Mistral", "Gemma"):
        yield name, getattr(transformers, f"{name}Config")(**sizes, **heads, pad_token_id=0)
    yield "Mistral, window", transformers.MistralConfig(**sizes, **heads, pad_token_id=0, sliding_window=7)


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Llama", "Mistral", "Gemma", "Mistral, window"])
@pytest.mark.parametrize("attention", ["packed_sdpa", "sdpa", "eager"])
def test_packed_sequences_do_not_see_each_other(name, attention, make_prompt, make_rollout):
    from transformers import AutoModelForCausalLM

    register()
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(
        dict(architectures())[name], attn_implementation=attention, dtype=torch.float32
    ).eval()
    rollouts = [
        make_rollout(
            make_prompt(i, tuple(torch.randint(64, (p,)).tolist())), 0, tuple(torch.randint(64, (r,)).tolist())
        )
        for i, (p, r) in enumerate([(3, 9), (17, 1), (5, 30)])
    ]
    packed = make_micro_batch(rollouts, [1, 2, 0], torch.device("cpu"))
    with torch.no_grad():
        together = response_statistics(policy, packed, temperature=1.0, max_logits_bytes=5000)
        for index in range(3):
            alone = make_micro_batch(rollouts, [index], torch.device("cpu"))
            logits = policy(alone.input_ids).logits[0, alone.predictor_positions]
            expected = torch.log_softmax(logits, -1).gather(1, alone.targets[:, None]).squeeze(1)
            rows = torch.isin(packed.token_indices, alone.token_indices)
            torch.testing.assert_close(together.logprobs[rows], expected, atol=1e-5, rtol=1e-5)


def test_policy_without_a_linear_head_is_refused(tiny_policy, make_prompt, make_rollout):
    policy = load_policy(tiny_policy, PolicyConfig())
    policy.set_output_embeddings(torch.nn.Identity())
    micro_batch = make_micro_batch([make_rollout(make_prompt(1), 0, (5, 6))], [0], torch.device("cpu"))
    with pytest.raises(ValueError, match="vocabulary head of Qwen3ForCausalLM is a Identity"):
        response_statistics(policy, micro_batch, temperature=1.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_kernels_that_keep_packed_sequences_apart_pass_the_check(tiny_policy, attention):
    check_packing(load_policy(tiny_policy, PolicyConfig(attn_implementation=attention)))


def test_a_policy_that_mixes_packed_sequences_is_refused(tiny_policy, monkeypatch):
    policy = load_policy(tiny_policy, PolicyConfig(attn_implementation="eager"))
    forward = policy.forward
    monkeypatch.setattr(policy, "forward", lambda position_ids, **inputs: forward(**inputs))
    with pytest.raises(
        ValueError, match=r"'eager' lets packed sequences see each other .*model.policy.attn_implementation"
    ):
        check_packing(policy)
