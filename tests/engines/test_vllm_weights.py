"""What can be said of pushes to vLLM without an engine."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from dynamo_lightning.engines.vllm.engine import Output, TokenFilter, check_outputs
from dynamo_lightning.engines.vllm.weights import (
    cast_weights,
    checksum,
    compare_checksums,
    fingerprint,
    probe_sequences,
    sequence_logprobs,
    sum_workers,
)
from dynamo_lightning.policy.loading import PolicyConfig, load_policy


def bits(values):
    """Slow reference: the sum of the unsigned bit patterns."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    mask = (1 << 8 * values.element_size()) - 1
    return sum(pattern & mask for pattern in values.contiguous().view(kind).flatten().tolist()) % (1 << 63)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_checksum_is_the_sum_of_bit_patterns(dtype):
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert checksum(values) == bits(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checksum_sees_the_smallest_change_but_neither_order_nor_padding(dtype):
    values = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    changed = values.clone()
    changed[3, 3] = torch.nextafter(changed[3, 3].float(), torch.tensor(torch.inf)).to(dtype)
    if dtype == torch.bfloat16:
        changed[3, 3] = values[3, 3] * 1.01
    assert checksum(changed) != checksum(values)
    assert checksum(values.T) == checksum(values)
    assert checksum(torch.cat([values, torch.zeros(3, 8, dtype=dtype)])) == checksum(values)
    assert checksum(values[:10]) + checksum(values[10:]) == checksum(values)


def test_fused_layers_are_compared_with_the_sum_of_their_parts():
    expected = {"a.q_proj.weight": 5, "a.k_proj.weight": 7, "a.v_proj.weight": 1, "norm.weight": 4}
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    good = {"a.qkv_proj.weight": 13, "norm.weight": 4, "rotary.table": 99}
    assert compare_checksums(expected, good, packed) == ([], 2)
    assert compare_checksums(expected, {**good, "a.qkv_proj.weight": 12}, packed) == (["a.qkv_proj.weight"], 2)
    assert compare_checksums(expected, {"other.weight": 4}, packed) == ([], 0)


def test_over_two_workers_a_parameter_is_spread_or_repeated():
    expected = {"x.weight": 10, "norm.weight": 4}
    assert compare_checksums(expected, {"x.weight": 10, "norm.weight": 8}, {}, copies=2) == ([], 2)
    assert compare_checksums(expected, {"x.weight": 10, "norm.weight": 7}, {}, copies=2) == (["norm.weight"], 2)


def test_fewer_key_heads_than_workers_are_repeated_on_some():
    expected = {"a.q_proj.weight": 500003, "a.k_proj.weight": 7001, "a.v_proj.weight": 19}
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert compare_checksums(expected, {"a.qkv_proj.weight": 500003 + 2 * 7001 + 2 * 19}, packed, copies=4) == ([], 1)
    assert compare_checksums(expected, {"a.qkv_proj.weight": 500003 + 3 * 7001 + 3 * 19}, packed, copies=4)[0]


def test_what_workers_hold_adds_up():
    workers = [{"checksums": {"x": "3", "y": "1"}, "packed": {}}, {"checksums": {"x": "4"}, "packed": {}}]
    assert sum_workers(workers) == {"checksums": {"x": 7, "y": 1}, "packed": {}, "copies": 2}


@pytest.fixture
def policy(tiny_policy):
    return load_policy(tiny_policy, PolicyConfig())


def test_every_parameter_is_sent_once_and_a_tied_head_is_not_repeated(policy):
    names = [name for name, _ in cast_weights(policy, torch.bfloat16)]
    assert len(names) == len(set(names)) == len(list(policy.parameters()))
    assert ("lm_head.weight" in names) != policy.config.tie_word_embeddings
    assert {value.dtype for _, value in cast_weights(policy, torch.bfloat16)} == {torch.bfloat16}


def test_a_fingerprint_changes_with_every_step(policy):
    before = fingerprint(policy)
    assert fingerprint(policy) == before
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-9)
    policy(torch.tensor([[3, 4]])).logits.sum().backward()
    optimizer.step()
    assert fingerprint(policy) != before


def test_probes_are_scored_as_the_policy_scores_them(policy):
    sequences = probe_sequences(policy, seed=3, count=2, length=6)
    assert sequences == probe_sequences(policy, seed=3, count=2, length=6) != probe_sequences(policy, 4, 2, 6)
    logprobs = sequence_logprobs(policy, sequences)
    assert logprobs.shape == (2, 5)
    expected = policy.eval()(torch.tensor([sequences[1][:4]])).logits[0, -1].log_softmax(-1)[sequences[1][4]].detach()
    assert float(logprobs[1, 3]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}])
def test_biased_sampling_is_refused_unless_it_is_asked_for(options):
    with pytest.raises(ValueError, match=r"model\.generator\.token_filter\.allow_biased_sampling=true"):
        TokenFilter(**options)
    TokenFilter(**options, allow_biased_sampling=True)


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}])
def test_impossible_filters_are_refused(options):
    with pytest.raises(ValueError, match="token_filter needs top_p in"):
        TokenFilter(**options, allow_biased_sampling=True)


def test_responses_from_other_weights_stop_the_run():
    good = Output((5,), (-1.0,), frozenset({"7"}))
    check_outputs([good], "7")
    with pytest.raises(RuntimeError, match="from weights of version 6, 7 instead of 7"):
        check_outputs([good, Output((5,), (-1.0,), frozenset({"6", "7"}))], "7")
    with pytest.raises(RuntimeError, match="not finite"):
        check_outputs([Output((5,), (float("-inf"),), frozenset({"7"}))], "7")


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dynamo_lightning.policy.loading import PolicyConfig, decoder_layers, load_policy
from dynamo_lightning.engines.vllm.weights import cast_weights, checksum, fingerprint, sequence_logprobs

dist.init_process_group("gloo")
whole, policy = (load_policy(sys.argv[1], PolicyConfig()) for _ in range(2))
mesh = init_device_mesh("cpu", (2,))
for layer in decoder_layers(policy):
    fully_shard(layer, mesh=mesh)
fully_shard(policy, mesh=mesh)
sent = dict(cast_weights(policy, torch.bfloat16))
expected = {name: value.detach().to(torch.bfloat16) for name, value in whole.named_parameters()}
assert sent.keys() == expected.keys()
assert all(torch.equal(sent[name], value) for name, value in expected.items())
assert all(checksum(sent[name]) == checksum(value) for name, value in expected.items())
before, rows = fingerprint(policy), [[3, 4, 5, 6]]
torch.testing.assert_close(sequence_logprobs(policy, rows), sequence_logprobs(whole, rows))
policy(torch.tensor(rows)).logits.sum().backward()
assert fingerprint(policy) == before
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_policy_is_sent_whole_by_every_process(tiny_policy):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, tiny_policy],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-2000:]
