import itertools

import pytest
import torch

from dynamo_lightning.losses.advantages import RLOO
from dynamo_lightning.losses.policy_loss import LossInputs, PolicyLoss, k3_divergence
from dynamo_lightning.losses.surrogate import ClippedSurrogate
from dynamo_lightning.losses.token_statistics import TokenStatistics, statistics_from_logits
from dynamo_lightning.losses.weights import token_weights


def test_clipped_surrogate_by_hand():
    surrogate = ClippedSurrogate(clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 9.0])
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    objective, indicators = surrogate(ratio, advantages)
    torch.testing.assert_close(objective, torch.tensor([2.0, 2.6, 1.0, -3.0, -1.6, -6.0]))
    assert indicators["clip_ratio/high_mean"].tolist() == [0, 1, 0, 0, 0, 0]
    assert indicators["clip_ratio/low_mean"].tolist() == [0, 0, 0, 0, 1, 0]
    assert indicators["clip_ratio/region_mean"].tolist() == [0, 1, 0, 0, 1, 0]


def test_bounds_are_the_ones_given():
    """Guard: `clip_high` is used as it is set, for every run."""
    assert (ClippedSurrogate().clip_low, ClippedSurrogate().clip_high) == (0.2, 0.2)
    objective, _ = ClippedSurrogate(clip_high=0.2)(torch.tensor([1.25]), torch.tensor([1.0]))
    assert objective.item() == pytest.approx(1.2)


def test_without_dual_clip_negative_advantages_are_unbounded():
    objective, _ = ClippedSurrogate(dual_clip=None)(torch.tensor([50.0]), torch.tensor([-1.0]))
    assert objective.item() == -50.0


@pytest.mark.parametrize("settings", [{"clip_low": 0.0}, {"clip_high": -1.0}, {"dual_clip": 1.1}])
def test_impossible_bounds_are_refused(settings):
    with pytest.raises(ValueError, match="surrogate needs"):
        ClippedSurrogate(**settings)


def weights(aggregation, length_normalisation="response_length"):
    return token_weights(
        torch.tensor([2, 2, 1]),
        torch.ones(3),
        torch.tensor([4, 6, 10]),
        aggregation=aggregation,
        length_normalisation=length_normalisation,
        num_prompts=2,
        num_rollouts=3,
        num_tokens=20,
        max_response_length=16,
    )


def test_weights_by_hand():
    torch.testing.assert_close(weights("token_mean"), torch.tensor([1 / 20] * 3))
    torch.testing.assert_close(weights("sequence_mean"), torch.tensor([1 / 12, 1 / 18, 1 / 30]))
    torch.testing.assert_close(weights("prompt_mean"), torch.tensor([1 / 16, 1 / 24, 1 / 20]))
    constant = weights("prompt_mean", "max_response_length")
    torch.testing.assert_close(constant, torch.tensor([1 / 64, 1 / 64, 1 / 32]))


@pytest.mark.parametrize("aggregation", ["prompt_mean", "sequence_mean", "token_mean"])
def test_weights_of_all_tokens_add_up_to_one(aggregation):
    assert float((weights(aggregation) * torch.tensor([4, 6, 10])).sum()) == pytest.approx(1.0)


def make_tokens(num_tokens=24, vocab=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (num_tokens,), generator=generator)
    old = statistics_from_logits(logits + 0.3 * torch.randn(num_tokens, vocab, generator=generator), targets)[
        0
    ].detach()
    advantages = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    token_weight = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), targets, old, advantages, token_weight


def gradient(loss, rows_of_micro_batches, reference=False):
    logits, targets, old, advantages, token_weight = make_tokens()
    total, metrics = 0.0, {}
    for rows in rows_of_micro_batches:
        statistics = TokenStatistics(*statistics_from_logits(logits[rows], targets[rows]))
        inputs = LossInputs(old[rows], advantages[rows], token_weight[rows], old[rows] - 0.1 if reference else None)
        value, parts = loss(statistics, inputs, num_tokens=len(targets))
        value.backward()
        total += value.item()
        metrics = {name: metrics.get(name, 0.0) + float(part) for name, part in parts.items()}
    return logits.grad, total, metrics


@pytest.mark.parametrize("coefficients", [(0.0, 0.0), (0.01, 0.1)])
def test_gradient_is_independent_of_micro_batch_size(coefficients):
    """Guard: denominators are global, and no mean of micro-batch means is taken."""
    loss = PolicyLoss(entropy_coefficient=coefficients[0], kl_coefficient=coefficients[1])
    whole = gradient(loss, [list(range(24))], reference=coefficients[1] > 0)
    parts = gradient(loss, [list(range(5)), list(range(5, 6)), list(range(6, 24))], reference=coefficients[1] > 0)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-12, rtol=1e-10)
    assert parts[1] == pytest.approx(whole[1])
    assert parts[2] == pytest.approx(whole[2], abs=1e-6)


def test_loss_at_the_sampling_policy_is_reinforce():
    """With ratio 1 the gradient is `−Σ w A ∇ log π`, whatever the clip."""
    logits, targets, _, advantages, token_weight = make_tokens()
    statistics = TokenStatistics(*statistics_from_logits(logits, targets))
    inputs = LossInputs(statistics.logprobs.detach(), advantages, token_weight, None)
    PolicyLoss()(statistics, inputs, num_tokens=24)[0].backward()
    ours, logits.grad = logits.grad, None
    (-(token_weight * advantages * statistics_from_logits(logits, targets)[0]).sum()).backward()
    torch.testing.assert_close(ours, logits.grad)


def test_entropy_bonus_raises_entropy_and_kl_pulls_to_the_reference():
    logits, targets, old, _, token_weight = make_tokens()
    statistics = TokenStatistics(*statistics_from_logits(logits, targets))
    nothing = LossInputs(old, torch.zeros(24, dtype=torch.float64), token_weight, None)
    PolicyLoss(entropy_coefficient=1.0)(statistics, nothing, num_tokens=24)[0].backward()
    stepped = statistics_from_logits(logits - 0.1 * logits.grad, targets)[1]
    assert stepped.mean() > statistics.entropy.mean()
    logits.grad = None
    statistics = TokenStatistics(*statistics_from_logits(logits, targets))
    inputs = LossInputs(old, torch.zeros(24, dtype=torch.float64), token_weight, old)
    value, metrics = PolicyLoss(kl_coefficient=1.0)(statistics, inputs, num_tokens=24)
    value.backward()
    stepped = statistics_from_logits(logits - 0.05 * logits.grad, targets)[0]
    assert (token_weight * k3_divergence(stepped, old)).sum() < (
        token_weight * k3_divergence(statistics.logprobs, old)
    ).sum()
    assert metrics["kl"] == pytest.approx(float(k3_divergence(statistics.logprobs, old).mean()))


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    logprobs = torch.tensor([-1.0, -2.0])
    assert k3_divergence(logprobs, logprobs).tolist() == [0.0, 0.0]
    assert (k3_divergence(logprobs, torch.tensor([-3.0, -1.0])) > 0).all()


def test_only_a_loss_without_entropy_and_kl_vanishes_at_zero_advantage():
    assert PolicyLoss().vanishes_without_advantage
    assert not PolicyLoss(entropy_coefficient=0.1).vanishes_without_advantage
    assert not PolicyLoss(kl_coefficient=0.1).vanishes_without_advantage


@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_prompt_weights_make_the_gradient_independent_of_group_sizes_in_expectation(group_size):
    """Exact expectation over all outcomes of a group: RLOO with weight 1/n gives ∇p for every n."""
    p = torch.tensor(0.3, dtype=torch.float64)
    expected = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=group_size):
        rewards = torch.tensor(outcome)
        probability = torch.where(rewards > 0, p, 1 - p).prod()
        # Score of a Bernoulli with respect to its logit: (r − p); each rollout weighs 1/n.
        advantages = RLOO()(rewards, torch.zeros(group_size, dtype=torch.int64)).double()
        expected += probability * (advantages * (rewards - p)).sum() / group_size
    assert expected.item() == pytest.approx(float(p * (1 - p)), rel=1e-6)


def test_groups_of_one_prompt_share_its_weight():
    weight = token_weights(
        torch.tensor([2, 2, 4, 4, 4, 4]), torch.tensor([0.25, 0.25, 0.75, 0.75, 0.75, 0.75]), torch.full((6,), 5),
        aggregation="prompt_mean", length_normalisation="response_length", num_prompts=1, num_rollouts=6, num_tokens=30,
        max_response_length=5,
    )  # fmt: skip
    assert (weight * 5).tolist() == pytest.approx([0.125] * 2 + [0.1875] * 4)


def test_token_mean_makes_it_depend_on_group_sizes():
    """Guard: without 1/n a prompt with more rollouts weighs more."""
    sizes, lengths = torch.tensor([2, 2, 6, 6, 6, 6, 6, 6]), torch.full((8,), 5)
    shares = {}
    for aggregation in ("prompt_mean", "token_mean"):
        weight = token_weights(
            sizes, torch.ones(8), lengths, aggregation=aggregation, length_normalisation="response_length",
            num_prompts=2, num_rollouts=8, num_tokens=40, max_response_length=5,
        )  # fmt: skip
        shares[aggregation] = float((weight * lengths)[:2].sum())
    assert shares == pytest.approx({"prompt_mean": 0.5, "token_mean": 0.25})
