import pytest
import torch

from dynamo_lightning.engines.transformers import TransformersEngine, gumbel_noise
from dynamo_lightning.policy.loading import PolicyConfig, load_policy, load_tokenizer
from dynamo_lightning.rollout.requests import make_requests
from dynamo_lightning.rollout.runner import sample_rollouts
from dynamo_lightning.types import Prompt


@pytest.fixture(scope="module")
def policy(tiny_policy):
    return load_policy(tiny_policy, PolicyConfig()).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_policy):
    return load_tokenizer(tiny_policy)


@pytest.fixture(scope="module")
def requests(tokenizer, make_batch):
    texts = ["1+1=", "What is 3*4?", "7-2=", "Add 5 and 6."]
    prompts = [Prompt(i, t, t, tuple(tokenizer(t).input_ids), "0") for i, t in enumerate(texts)]
    return make_requests(make_batch(prompts, [3, 5, 2, 4]), "train", seed=0)


def generate(policy, tokenizer, requests, batch_size=64, max_response_length=12, temperature=1.0):
    generator = TransformersEngine(batch_size)
    return sample_rollouts(
        generator, policy, tokenizer, requests, max_response_length=max_response_length, temperature=temperature
    )


def test_rollouts_come_in_the_order_of_the_requests(policy, tokenizer, requests):
    rollouts = generate(policy, tokenizer, requests, batch_size=4)
    assert [rollout.key for rollout in rollouts] == [(r.prompt.prompt_id, r.sample_index) for r in requests]
    assert [rollout.prompt for rollout in rollouts] == [request.prompt for request in requests]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_rollout_does_not_depend_on_its_neighbours(policy, tokenizer, requests, batch_size):
    reference = generate(policy, tokenizer, requests, batch_size=5)
    for rollout, other in zip(reference, generate(policy, tokenizer, requests, batch_size), strict=True):
        assert rollout.token_ids.tolist() == other.token_ids.tolist()
        assert rollout.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("keeps_rows", [True, False])
def test_a_rollout_does_not_depend_on_which_others_have_ended(policy, tokenizer, requests, monkeypatch, keeps_rows):
    """Guard: rows of the cache must stay with their responses; without rows the sequences are read again."""
    common = generate(policy, tokenizer, requests)[0].token_ids[2]
    monkeypatch.setattr(policy.generation_config, "eos_token_id", [tokenizer.eos_token_id, common])
    reference = generate(policy, tokenizer, requests, batch_size=1)
    assert len({len(rollout.token_ids) for rollout in reference}) > 3
    monkeypatch.setattr("dynamo_lightning.engines.transformers.SEGMENT_LENGTH", 3)
    if not keeps_rows:
        monkeypatch.setattr("dynamo_lightning.engines.transformers._select_rows", lambda cache, rows: None)
    for rollout, other in zip(reference, generate(policy, tokenizer, requests), strict=True):
        assert rollout.token_ids.tolist() == other.token_ids.tolist()
        assert rollout.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_policy_at_the_temperature(policy, tokenizer, requests, temperature):
    for rollout in generate(policy, tokenizer, requests, temperature=temperature):
        sequence = torch.tensor([(*rollout.prompt.token_ids, *rollout.token_ids)])
        with torch.no_grad():
            logits = policy(sequence).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, -1).gather(
            1, torch.tensor(rollout.token_ids, dtype=torch.int64)[:, None]
        )
        assert rollout.logprobs == pytest.approx(expected.squeeze(1).tolist(), abs=1e-4)


def test_responses_end_at_any_eos_token_or_at_the_length_limit(policy, tokenizer, requests):
    frequent = generate(policy, tokenizer, requests)[0].token_ids[2]
    saved = policy.generation_config.eos_token_id
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, frequent]
    try:
        rollouts = generate(policy, tokenizer, requests)
    finally:
        policy.generation_config.eos_token_id = saved
    stops = {tokenizer.eos_token_id, frequent}
    for rollout in rollouts:
        assert not stops & set(rollout.token_ids[:-1])
        assert rollout.truncated == (rollout.token_ids[-1] not in stops)
        assert len(rollout.token_ids) == 12 or not rollout.truncated
    assert any(rollout.token_ids[-1] == frequent for rollout in rollouts)
    assert any(rollout.truncated for rollout in rollouts)


def test_the_models_own_generation_config_does_not_leak_into_sampling(policy, tokenizer, requests):
    reference = generate(policy, tokenizer, requests)
    saved = policy.generation_config
    policy.generation_config = type(saved)(
        eos_token_id=saved.eos_token_id, pad_token_id=0, repetition_penalty=5.0, top_k=1, suppress_tokens=[5, 6, 7]
    )
    try:
        assert [r.token_ids.tolist() for r in generate(policy, tokenizer, requests)] == [
            r.token_ids.tolist() for r in reference
        ]
        assert policy.generation_config.repetition_penalty == 5.0
    finally:
        policy.generation_config = saved


def test_samples_follow_the_policys_distribution():
    """χ² test of Gumbel-max draws with 20,000 fixed seeds against the softmax."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    noise = gumbel_noise(torch.arange(20_000) * 7919, position=3, vocab_size=5)
    counts = torch.bincount((torch.log_softmax(logits, -1) + noise).argmax(-1), minlength=5)
    expected = 20_000 * torch.softmax(logits, -1)
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5  # 99.9 % quantile with 4 degrees of freedom


def test_noise_differs_by_seed_position_and_token():
    seeds = torch.tensor([1, 2, 2**62])
    noise = torch.cat([gumbel_noise(seeds, position, 50).flatten() for position in range(4)])
    assert len(noise.unique()) == len(noise)
    assert torch.isfinite(noise).all()
    uncorrelated = torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]
    assert abs(float(uncorrelated)) < 0.1


def test_impossible_batch_size_is_refused():
    with pytest.raises(ValueError, match=r"model\.generator\.batch_size must be at least 1, got 0"):
        TransformersEngine(batch_size=0)
