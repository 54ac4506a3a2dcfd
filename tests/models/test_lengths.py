"""Sequences that a model cannot be given are refused at the start, in numbers."""

import pytest
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    Qwen2Config,
)

from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.lengths import check_lengths, length_limit

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
HEADS = {"hidden_size": 32, "num_attention_heads": 4}
CASES = [
    (GPT2Config(n_positions=64), 64),
    (LlamaConfig(max_position_embeddings=128), 128),
    (LlamaConfig(max_position_embeddings=64, rope_scaling={"rope_type": "linear", "factor": 4.0}), 256),
    (
        Qwen2Config(
            max_position_embeddings=64,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        256,
    ),
    (
        LlamaConfig(
            max_position_embeddings=512,
            rope_scaling={
                "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            },
        ),
        512,
    ),
    (LlamaConfig(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0}), 64),
    (
        Phi3Config(
            max_position_embeddings=512, original_max_position_embeddings=64, rope_scaling=LONG, **HEADS,
            pad_token_id=0,
        ),
        64,
    ),
    (Gemma3TextConfig(max_position_embeddings=256), 256),
    (BloomConfig(), None),
    (MambaConfig(), None),
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), CASES, ids=lambda value: type(value).__name__)
def test_the_limit_is_the_table_the_scaled_rope_or_what_keeps_its_frequencies(config, expected):
    limit = length_limit(config)
    assert (limit and limit.num_tokens) == expected


def test_a_length_at_the_limit_fits_and_one_token_more_is_refused_with_the_numbers_and_options():
    config = GPT2Config(n_positions=64)
    check_lengths(config, 24, 40)
    with pytest.raises(UserError) as error:
        check_lengths(config, 24, 41)
    for part in ("24 tokens", "model.sampling.max_response_length=41 makes 65", "64", "at most 40"):
        assert part in str(error.value)
    assert "data.max_prompt_length" in str(error.value)


def test_frequencies_that_depend_on_the_longest_sequence_are_named():
    config = LlamaConfig(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    with pytest.raises(UserError, match=r"dynamic RoPE changes with the longest sequence beyond 64 tokens"):
        check_lengths(config, 30, 40)
