import math

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dynamo_lightning.losses.token_statistics import (
    TokenStatistics,
    chunked_loss,
    statistics_from_logits,
    token_statistics,
)

NUM_TOKENS, HIDDEN, VOCAB = 13, 8, 11


def bytes_for(num_tokens):
    """Memory that lets a block of the inputs below be so many tokens of their whole vocabulary, in float64."""
    return num_tokens * 3 * VOCAB * 8


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
    logprobs, entropy, squared_prob_lambda, squared_probs = statistics_from_logits(logits, targets)
    for token in range(NUM_TOKENS):
        probs = [float(p) for p in torch.softmax(logits[token], -1)]
        h = -sum(p * torch.tensor(p).double().log().item() for p in probs)
        expected = sum(p * p * (torch.tensor(p).double().log().item() + h) for p in probs)
        assert entropy[token].item() == pytest.approx(h, abs=1e-6)
        assert squared_prob_lambda[token].item() == pytest.approx(expected, abs=1e-6)
        assert logprobs[token].exp().item() == pytest.approx(probs[targets[token]])
        assert squared_probs[token].item() == pytest.approx(sum(p * p for p in probs))


def plain_logits(hidden, weight, bias, softcap):
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def test_impossible_tokens_give_no_nan():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    _, *others = statistics_from_logits(logits, torch.tensor([0]))
    plain = statistics_from_logits(logits[:, :2], torch.tensor([0]))
    torch.testing.assert_close(tuple(others), plain[1:])


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


@pytest.mark.parametrize("max_logits_bytes", [1, 100, bytes_for(1), bytes_for(4), bytes_for(13), 2**20])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_of_the_tiled_statistics_equals_the_plain_one(softcap, with_bias, temperature, max_logits_bytes):
    gradients = []
    for tiled in (True, False):
        hidden, weight, bias, targets = (x.requires_grad_(x.is_floating_point()) for x in make_inputs())
        bias = bias if with_bias else None
        if tiled:
            options = {"temperature": temperature, "softcap": softcap, "max_logits_bytes": max_logits_bytes}
            statistics = token_statistics(hidden, weight, targets, head_bias=bias, **options)
            parts = (statistics.logprobs, statistics.entropy, statistics.squared_prob_lambda)
        else:
            parts = statistics_from_logits(plain_logits(hidden, weight, bias, softcap) / temperature, targets)[:3]
        sum(((i + 1) * part * torch.arange(1, NUM_TOKENS + 1)).sum() for i, part in enumerate(parts)).backward()
        gradients.append([*parts, hidden.grad, weight.grad] + ([bias.grad] if with_bias else []))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_each_statistic_alone_has_the_gradient_that_autograd_finds(which):
    hidden, weight, bias, targets = (x.requires_grad_(x.is_floating_point()) for x in make_inputs())

    def chosen(hidden, weight, bias):
        statistics = token_statistics(
            hidden, weight, targets, head_bias=bias, temperature=0.7, softcap=3.0, max_logits_bytes=300
        )
        parts = (statistics.logprobs, statistics.entropy, statistics.squared_prob_lambda)
        return tuple(parts[i] for i in which)

    assert torch.autograd.gradcheck(chosen, (hidden, weight, bias))


@pytest.mark.parametrize("entropy_gradient", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("max_logits_bytes", [1, 500, bytes_for(1), bytes_for(4), 2**20])
def test_loss_in_the_chunk_equals_the_loss_of_the_statistics(entropy_gradient, softcap, with_bias, max_logits_bytes):
    advantages = torch.linspace(-1.0, 2.0, NUM_TOKENS, dtype=torch.float64)

    def token_loss(statistics, tokens):
        a = advantages[tokens]
        loss = -(a * (statistics.logprobs + 1.0).exp()).sum() - 0.3 * (a * statistics.entropy).sum()
        return loss + (statistics.squared_prob_lambda * statistics.logprobs).sum()

    results = []
    for in_chunk in (True, False):
        hidden, weight, bias, targets = (x.requires_grad_(x.is_floating_point()) for x in make_inputs())
        options = {
            "head_bias": bias if with_bias else None,
            "temperature": 0.7,
            "softcap": softcap,
            "entropy_gradient": entropy_gradient,
            "max_logits_bytes": max_logits_bytes,
        }
        if in_chunk:
            loss = chunked_loss(hidden, weight, targets, token_loss, **options)
        else:
            statistics = token_statistics(hidden, weight, targets, **options)
            loss = token_loss(statistics, slice(0, NUM_TOKENS))
        (3.0 * loss).backward()
        results.append([loss, hidden.grad, weight.grad] + ([bias.grad] if with_bias else []))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def one_token_loss(statistics, tokens):
    return statistics.logprobs.sum()


@pytest.mark.parametrize("in_chunk", [True, False])
def test_a_frozen_head_gets_no_gradient_and_hidden_states_get_theirs(in_chunk):
    results = []
    for frozen in (True, False):
        hidden, weight, bias, targets = make_inputs()
        hidden.requires_grad_()
        weight.requires_grad_(not frozen)
        if in_chunk:
            chunked_loss(hidden, weight, targets, one_token_loss, head_bias=bias).backward()
        else:
            token_statistics(hidden, weight, targets, head_bias=bias).logprobs.sum().backward()
        assert (weight.grad is None) == frozen and bias.grad is None
        results.append(hidden.grad)
    torch.testing.assert_close(*results)


def test_a_tied_weight_gets_the_gradients_of_both_its_uses():
    gradients = []
    for tiled in (True, False):
        _, weight, _, targets = make_inputs()
        weight.requires_grad_()
        hidden = torch.tanh(weight[targets])  # the embedding
        if tiled:
            chunked_loss(hidden, weight, targets, one_token_loss, max_logits_bytes=bytes_for(4)).backward()
        else:
            statistics_from_logits(hidden @ weight.T, targets)[0].sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_without_gradient_the_values_are_the_same_and_nothing_is_kept():
    hidden, weight, _, targets = (x.requires_grad_(x.is_floating_point()) for x in make_inputs())
    with torch.no_grad():
        statistics = token_statistics(hidden, weight, targets)
        loss = chunked_loss(hidden, weight, targets, one_token_loss)
    assert not statistics.logprobs.requires_grad and not loss.requires_grad
    torch.testing.assert_close(statistics.logprobs, token_statistics(hidden, weight, targets).logprobs.detach())
    torch.testing.assert_close(loss, statistics.logprobs.sum())


@pytest.mark.parametrize("in_chunk", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_gradients_equal_the_float32_ones_to_its_rounding(in_chunk, autocast):
    gradients = []
    for half in (True, False):
        hidden, weight, bias, targets = make_inputs(torch.float32)
        hidden, weight, bias = (
            x.bfloat16().to(x.dtype if autocast or not half else torch.bfloat16) for x in (hidden, weight, bias)
        )
        for x in (hidden, weight, bias):
            x.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half and autocast):
            if in_chunk:
                chunked_loss(
                    hidden, weight, targets, one_token_loss, head_bias=bias, max_logits_bytes=bytes_for(4)
                ).backward()
            else:
                statistics = token_statistics(hidden, weight, targets, head_bias=bias, max_logits_bytes=bytes_for(4))
                assert statistics.logprobs.dtype == torch.float32
                statistics.logprobs.sum().backward()
        assert hidden.grad.dtype == hidden.dtype and weight.grad.dtype == weight.dtype
        gradients.append([x.grad.float() for x in (hidden, weight, bias)])
    for ours, exact in zip(*gradients, strict=True):
        assert (ours - exact).norm() < 0.02 * exact.norm()


def test_no_tensor_of_all_tokens_by_the_whole_vocabulary_is_saved_or_made():
    """Structural form of the memory claim; benchmarks/token_statistics.py measures it."""
    tokens, vocab = 64, 50
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    weight = torch.randn(vocab, HIDDEN, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(
                x.untyped_storage().nbytes() for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)
            )
            return result

    def pack(saved):
        sizes.append(saved.untyped_storage().nbytes())
        return saved

    with Watch(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        token_statistics(hidden, weight, targets, max_logits_bytes=4096).logprobs.sum().backward()
        chunked_loss(hidden, weight, targets, one_token_loss, max_logits_bytes=4096).backward()
    assert 0 < max(sizes) <= 4096 < tokens * vocab * 4


def test_confident_tokens_keep_their_small_gradient_in_bfloat16():
    """Guard: `e_a − π` is formed in float32; rounding π first would make it 0 where π(a) > 0.998."""
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0, 0.0], [0.0, 0.0]], dtype=torch.bfloat16)
    token_statistics(hidden, weight, torch.tensor([0])).logprobs.sum().backward()
    assert hidden.grad[0, 0].item() == pytest.approx(8.0 / (1.0 + math.exp(8.0)), rel=0.01)


def test_masked_logits_give_no_nan_in_the_tiled_gradient():
    hidden, weight, bias, targets = make_inputs()
    bias[3], targets = -torch.inf, torch.where(targets == 3, 0, targets)
    hidden.requires_grad_()
    statistics = token_statistics(hidden, weight, targets, head_bias=bias, max_logits_bytes=64)
    plain = statistics_from_logits(hidden @ weight.T + bias, targets)
    torch.testing.assert_close(statistics.entropy, plain[1])
    (statistics.logprobs + statistics.entropy + statistics.squared_prob_lambda).sum().backward()
    keep = torch.arange(VOCAB) != 3
    other = hidden.detach().clone().requires_grad_()
    parts = statistics_from_logits(other @ weight[keep].T + bias[keep], targets - (targets > 3).long())
    sum(parts).sum().backward()
    torch.testing.assert_close(hidden.grad, other.grad)


def test_no_tokens_give_zero_gradients():
    hidden, weight, _, targets = (x.requires_grad_(x.is_floating_point()) for x in make_inputs())
    token_statistics(hidden[:0], weight, targets[:0]).logprobs.sum().backward()
    chunked_loss(hidden[:0], weight, targets[:0], one_token_loss).backward()
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("num_idle", [4, NUM_TOKENS])
def test_chunks_without_gradient_add_none(num_idle):
    """Guard: the first chunk that has a gradient fills the weight's, whichever it is; none leaves zeros."""
    gradients = []
    for whole in (True, False):
        hidden, weight, _, targets = (x.requires_grad_(x.is_floating_point()) for x in make_inputs())
        if whole:
            loss = (statistics_from_logits(hidden @ weight.T, targets)[0][num_idle:]).sum()
        else:
            loss = chunked_loss(
                hidden,
                weight,
                targets,
                lambda found, tokens: found.logprobs.sum() if tokens.start >= num_idle else torch.zeros(()),
                max_logits_bytes=bytes_for(2),
            )
        loss.backward()
        gradients.append((hidden.grad, weight.grad))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-10)


def test_the_gradient_of_a_loss_in_the_chunk_can_be_taken_once():
    hidden, weight, _, targets = (x.requires_grad_(x.is_floating_point()) for x in make_inputs())
    loss = chunked_loss(hidden, weight, targets, one_token_loss)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_a_bound_that_is_not_positive_is_refused():
    hidden, weight, _, targets = make_inputs()
    with pytest.raises(ValueError, match="at least 1"):
        token_statistics(hidden, weight, targets, max_logits_bytes=0)


def test_float16_gradients_are_made_after_the_loss_is_scaled():
    """Guard: made before, they would vanish where the loss is small, and scaling would come too late."""
    gradients = []
    for dtype in (torch.float16, torch.float32):
        hidden, weight, _, targets = (x.to(dtype if x.is_floating_point() else x.dtype) for x in make_inputs())
        hidden.requires_grad_()
        loss = chunked_loss(hidden, weight, targets, lambda found, tokens: 1e-9 * found.logprobs.sum())
        (2.0**20 * loss).backward()
        gradients.append(hidden.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


@pytest.mark.parametrize("max_logits_bytes", [1, 500, bytes_for(4), 2**20])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_squared_probs_are_the_plain_ones_on_every_path_and_have_no_graph(softcap, max_logits_bytes):
    hidden, weight, bias, targets = (x.requires_grad_(x.is_floating_point()) for x in make_inputs())
    probs = torch.softmax(plain_logits(hidden, weight, bias, softcap) / 0.7, -1).detach()
    options = {"head_bias": bias, "temperature": 0.7, "softcap": softcap, "max_logits_bytes": max_logits_bytes}
    found = torch.zeros(NUM_TOKENS, dtype=torch.float64)

    def token_loss(statistics, tokens):
        assert not statistics.squared_probs.requires_grad
        found[tokens] = statistics.squared_probs
        return statistics.logprobs.sum()

    chunked_loss(hidden, weight, targets, token_loss, **options)
    statistics = token_statistics(hidden, weight, targets, **options)
    assert not statistics.squared_probs.requires_grad
    for ours in (found, statistics.squared_probs, statistics.detach().squared_probs):
        torch.testing.assert_close(ours, probs.square().sum(-1))
    torch.testing.assert_close(
        statistics.squared_logit_gradient(),
        (torch.nn.functional.one_hot(targets, VOCAB) - probs).square().sum(-1),
    )


def test_statistics_made_without_squared_probs_say_so():
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="without squared_probs"):
        TokenStatistics(zeros, zeros, zeros).detach().squared_logit_gradient()
