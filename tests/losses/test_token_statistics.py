import pytest
import torch

from dynamo_lightning.losses.token_statistics import statistics_from_logits, token_statistics

NUM_TOKENS, HIDDEN, VOCAB = 13, 8, 11


def make_inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype)
    bias = torch.randn(VOCAB, generator=generator, dtype=dtype)
    targets = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    return hidden, weight, bias, targets


def test_statistics_equal_a_loop_over_the_vocabulary():
    hidden, weight, bias, targets = make_inputs()
    logits = hidden @ weight.T + bias
    logprobs, entropy, squared_prob_lambda = statistics_from_logits(logits, targets)
    for token in range(NUM_TOKENS):
        probs = [float(p) for p in torch.softmax(logits[token], -1)]
        h = -sum(p * torch.tensor(p).double().log().item() for p in probs)
        expected = sum(p * p * (torch.tensor(p).double().log().item() + h) for p in probs)
        assert entropy[token].item() == pytest.approx(h, abs=1e-6)
        assert squared_prob_lambda[token].item() == pytest.approx(expected, abs=1e-6)
        assert logprobs[token].exp().item() == pytest.approx(probs[targets[token]])


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradient_of_the_chunked_statistics_equals_the_plain_one(chunk_size, softcap):
    gradients = []
    for chunked in (True, False):
        hidden, weight, bias, targets = (x.requires_grad_(x.is_floating_point()) for x in make_inputs())
        if chunked:
            statistics = token_statistics(
                hidden, weight, targets, head_bias=bias, temperature=0.7, softcap=softcap, chunk_size=chunk_size
            )
            parts = (statistics.logprobs, statistics.entropy, statistics.squared_prob_lambda)
        else:
            logits = hidden @ weight.T + bias
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            parts = statistics_from_logits(logits / 0.7, targets)
        sum(((i + 1) * part * torch.arange(1, NUM_TOKENS + 1)).sum() for i, part in enumerate(parts)).backward()
        gradients.append([*parts, hidden.grad, weight.grad, bias.grad])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-10)


def test_impossible_tokens_give_no_nan():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    _, entropy, squared_prob_lambda = statistics_from_logits(logits, torch.tensor([0]))
    plain = statistics_from_logits(logits[:, :2], torch.tensor([0]))
    torch.testing.assert_close((entropy, squared_prob_lambda), plain[1:])


def test_statistics_of_bfloat16_hidden_states_are_float32():
    hidden, weight, _, targets = make_inputs(torch.bfloat16)
    assert token_statistics(hidden, weight, targets).entropy.dtype == torch.float32


def test_entropy_has_no_graph_where_only_its_value_is_used():
    """Guard: an entropy that only enters detached factors costs no graph."""
    hidden, weight, _, targets = (x.requires_grad_(x.is_floating_point()) for x in make_inputs())
    with_graph = token_statistics(hidden, weight, targets)
    without = token_statistics(hidden, weight, targets, entropy_gradient=False)
    assert without.logprobs.requires_grad and not without.entropy.requires_grad
    assert not without.squared_prob_lambda.requires_grad
    torch.testing.assert_close(without.entropy, with_graph.entropy.detach())
    without.logprobs.sum().backward()
    ours, hidden.grad = hidden.grad, None
    with_graph.logprobs.sum().backward()
    torch.testing.assert_close(ours, hidden.grad)
