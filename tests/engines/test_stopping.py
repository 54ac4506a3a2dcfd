"""Stop strings and stop tokens: what ends a response belongs to it, and nothing after it does."""

import pytest
import torch

from dynamo_lightning.engines.engine import SamplingConfig
from dynamo_lightning.engines.stopping import StopConfig, StopRule, stop_rule
from dynamo_lightning.engines.transformers import TransformersEngine
from dynamo_lightning.errors import UserError
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
from dynamo_lightning.policy.logits import own_logits
from dynamo_lightning.rollout.runner import sample_rollouts
from dynamo_lightning.types import RolloutRequest


class Pieces:
    """A tokenizer of pieces that are longer than characters."""

    pieces = ("ab", "c<", "/s", "></", "d", "<eos>")

    def decode(self, tokens, **options):
        return "".join(self.pieces[token] for token in tokens)


@pytest.mark.parametrize(
    ("tokens", "length"),
    [
        ([0, 1, 2, 3, 4, 0], 4),  # "</s>" is complete within the piece "></"
        ([0, 4, 4], None),
        ([0, 5, 1, 2, 3], 2),  # the end-of-sequence token comes first
        ([1, 2, 3, 5], 3),  # the string comes first
        ([5], 1),
        ([], None),
    ],
)
def test_the_first_end_counts_and_a_string_may_be_spread_over_tokens(tokens, length):
    assert StopRule((5,), ("</s>", "zzz")).response_length(tokens, Pieces()) == length


@pytest.fixture
def policy(tiny_policy):
    return load_policy(tiny_policy, PolicyConfig()).eval()


@pytest.fixture
def tokenizer(tiny_policy):
    return load_tokenizer(tiny_policy)


def sample(policy, tokenizer, make_prompt, temperature=1.0, **stop):
    requests = [RolloutRequest(make_prompt(i, (5, 6, 7 + i)), 0, 100 + i) for i in range(8)]
    options = SamplingConfig(**stop).stop_options()
    engine = TransformersEngine()
    return sample_rollouts(
        engine, policy, tokenizer, requests, max_response_length=40, temperature=temperature, **options
    )


def test_responses_end_with_the_stop_string_and_are_otherwise_those_without_it(policy, tokenizer, make_prompt):
    free = sample(policy, tokenizer, make_prompt)
    longest = max(range(len(free)), key=lambda i: len(free[i].token_ids))
    string = tokenizer.decode(free[longest].token_ids[8:10])
    stopped = sample(policy, tokenizer, make_prompt, stop_strings=[string])
    assert 0 < len(stopped[longest].token_ids) <= 10
    for rollout, whole in zip(stopped, free, strict=True):
        length = len(rollout.token_ids)
        assert rollout.token_ids.tolist() == whole.token_ids[:length].tolist()
        assert rollout.logprobs.tolist() == whole.logprobs[:length].tolist()
        text = tokenizer.decode(rollout.token_ids)
        if length < len(whole.token_ids):
            assert text.endswith(string) and text.count(string) == 1 and not rollout.truncated
        else:
            assert rollout.truncated == whole.truncated


def test_a_stop_token_ends_a_response_and_belongs_to_it(policy, tokenizer, make_prompt):
    free = sample(policy, tokenizer, make_prompt)
    longest = max(range(len(free)), key=lambda i: len(free[i].token_ids))
    token = free[longest].token_ids[5]
    stopped = sample(policy, tokenizer, make_prompt, stop_token_ids=[token])
    assert stopped[longest].token_ids[-1] == token and len(stopped[longest].token_ids) <= 6
    assert not stopped[longest].truncated
    assert all(token not in rollout.token_ids[:-1] for rollout in stopped)


def test_a_string_that_is_a_token_of_its_own_counts_as_that_token(policy, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    policy.config.vocab_size = policy.resize_token_embeddings(len(tokenizer)).num_embeddings
    rule = stop_rule(policy, tokenizer, StopConfig(("<|im_end|>", "\n\n")))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in rule.token_ids and rule.strings == ("\n\n",)


@pytest.mark.parametrize("settings", [{"stop_strings": [""]}, {"stop_token_ids": [-1]}])
def test_impossible_stops_are_refused(settings):
    with pytest.raises(UserError, match=rf"model\.sampling\.{next(iter(settings))}"):
        SamplingConfig(**settings)


def test_a_token_that_the_model_does_not_have_is_refused(policy, tokenizer):
    with pytest.raises(UserError, match=r"model\.sampling\.stop_token_ids=\[99999\]"):
        stop_rule(policy, tokenizer, StopConfig((), (99999,)))


def test_temperature_0_takes_the_likeliest_token_each_time(policy, tokenizer, make_prompt):
    for rollout in sample(policy, tokenizer, make_prompt, temperature=0.0)[:3]:
        with torch.no_grad():
            logits = own_logits(policy, [*rollout.prompt.token_ids, *rollout.token_ids])[2:-1]
        assert logits.argmax(-1).tolist() == rollout.token_ids.tolist()
        expected = logits.log_softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-5, rtol=1e-5)
