"""What the policy loss makes of its parts: penalty, recomputed modulation, and who may be skipped."""

import pytest
import torch

from dynamo_lightning.losses.cispo import CISPO
from dynamo_lightning.losses.covariance import KLCov
from dynamo_lightning.losses.gspo import GSPO
from dynamo_lightning.losses.modulation import DynamoModulation, entropy_change, stabilisation_factor
from dynamo_lightning.losses.policy_loss import LossInputs, PolicyLoss
from dynamo_lightning.losses.surrogate import ClippedSurrogate, UnclippedSurrogate
from dynamo_lightning.losses.token_statistics import TokenStatistics, statistics_from_logits

PAPER_CODE = {"compensation_alpha": 0.2, "tau": 0.99, "normaliser": "max", "scope": "micro_batch"}


def make_case(num_tokens=12, shift=0.3, seed=0):
    """Statistics of a policy that moved away from the one that sampled, with made-up advantages."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(7, (num_tokens,), generator=generator)
    moved = logits + shift * torch.randn(num_tokens, 7, generator=generator, dtype=torch.float64)
    old = statistics_from_logits(moved, targets)[0]
    advantages = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    weights = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    statistics = TokenStatistics(*statistics_from_logits(logits.requires_grad_(), targets))
    sequences = torch.arange(num_tokens) // 4
    return logits, statistics, LossInputs(old, advantages, weights, None, sequences, torch.ones(num_tokens))


def test_penalty_is_added_with_the_tokens_weights():
    _, statistics, inputs = make_case()
    plain, _ = PolicyLoss(modulation=None, surrogate=UnclippedSurrogate())(statistics, inputs, 12)
    loss = PolicyLoss(modulation=None, surrogate=UnclippedSurrogate(), penalty=KLCov(coefficient=0.5))
    value, metrics = loss(statistics, inputs, 12)
    log_ratio = (statistics.logprobs - inputs.old_logprobs).detach()
    smooth = (log_ratio**2 + 1e-6).sqrt() - 1e-3
    assert value.item() == pytest.approx(plain.item() + 0.5 * float((inputs.weights * smooth).sum()))
    assert metrics["kl_cov"].item() == pytest.approx(0.5 * float(smooth.mean()))
    assert metrics["policy_loss"].item() == pytest.approx(plain.item())


def test_unclipped_surrogate_by_hand():
    objective, indicators = UnclippedSurrogate()(torch.tensor([9.0, 0.1]), torch.tensor([1.0, -2.0]))
    assert objective.tolist() == pytest.approx([9.0, -0.2])
    assert indicators == {}


def test_parts_that_do_not_vanish_skip_nothing():
    assert not PolicyLoss(penalty=KLCov()).vanishes_without_advantage
    assert not PolicyLoss(modulation=DynamoModulation(**PAPER_CODE)).vanishes_without_advantage
    for surrogate in (ClippedSurrogate(), UnclippedSurrogate(), GSPO(), CISPO()):
        assert PolicyLoss(modulation=None, surrogate=surrogate).vanishes_without_advantage


@pytest.mark.parametrize("surrogate", [ClippedSurrogate(), UnclippedSurrogate(), GSPO(), CISPO()])
def test_a_surrogate_that_says_so_vanishes_without_advantage(surrogate):
    logits, statistics, inputs = make_case()
    nothing = LossInputs(inputs.old_logprobs, torch.zeros_like(inputs.advantages), inputs.weights, None)
    nothing = LossInputs(**{**vars(nothing), "sequence_indices": inputs.sequence_indices})
    PolicyLoss(modulation=None, surrogate=surrogate)(statistics, nothing, 12)[0].backward()
    assert logits.grad.abs().max() == 0.0


@pytest.mark.parametrize("surrogate", [ClippedSurrogate(), UnclippedSurrogate(), GSPO(), CISPO()])
def test_every_surrogate_is_reinforce_at_the_sampling_policy(surrogate):
    logits, statistics, inputs = make_case()
    inputs = LossInputs(**{**vars(inputs), "old_logprobs": statistics.logprobs.detach()})
    loss = PolicyLoss(modulation=None, surrogate=surrogate)
    (ours,) = torch.autograd.grad(loss(statistics, inputs, 12)[0], logits, retain_graph=True)
    (plain,) = torch.autograd.grad(-(inputs.weights * inputs.advantages * statistics.logprobs).sum(), logits)
    torch.testing.assert_close(ours, plain)


def test_update_sizes_are_ratio_times_advantage_where_nothing_is_clipped():
    log_ratio = torch.tensor([0.0, 0.1, 0.5, -0.1, -0.5, 0.5], dtype=torch.float64)
    advantages = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    inputs = LossInputs(log_ratio, advantages, torch.ones(6), None)
    sizes = PolicyLoss(surrogate=ClippedSurrogate(0.2, 0.28)).update_sizes(log_ratio, inputs)
    ratio = log_ratio.exp()
    expected = [2.0, 2.0 * ratio[1], 0.0, -ratio[3], 0.0, -ratio[5]]
    assert sizes.tolist() == pytest.approx([float(value) for value in expected])


def test_scope_micro_batch_takes_its_normalisers_from_each_micro_batch():
    """Each half by hand: H_min, H_max and Ξ_max of its own tokens, at the current policy and ratio."""
    logits, statistics, inputs = make_case(shift=0.1)
    loss = PolicyLoss(modulation=DynamoModulation(**PAPER_CODE), surrogate=UnclippedSurrogate())
    for rows in (slice(0, 5), slice(5, 12)):
        part = TokenStatistics(*(column[rows] for column in vars(statistics).values()))
        own = LossInputs(inputs.old_logprobs[rows], inputs.advantages[rows], inputs.weights[rows], None)
        (ours,) = torch.autograd.grad(loss(part, own, 12)[0], logits, retain_graph=True)
        entropy, ratio = part.entropy.detach(), (part.logprobs - own.old_logprobs).exp()
        boost = 1 + 0.2 * (entropy.max() - entropy) / (entropy.max() - entropy.min())
        change = entropy_change(part.detach(), ratio.detach() * own.advantages)
        damping = stabilisation_factor(change, alpha=0.4, gamma=50.0, tau=0.99, change_max=float(change.abs().max()))
        final = own.advantages * torch.where(own.advantages > 0, boost, 1.0) * damping
        (plain,) = torch.autograd.grad(-(own.weights * ratio * final).sum(), logits, retain_graph=True)
        torch.testing.assert_close(ours, plain)
        assert damping.min() < 0.85


def test_scope_batch_leaves_the_advantages_of_an_update_alone():
    _, statistics, inputs = make_case()
    with_modulation = PolicyLoss()(statistics, inputs, 12)
    without = PolicyLoss(modulation=None)(statistics, inputs, 12)
    assert with_modulation[0].item() == without[0].item()
    assert with_modulation[1].keys() == without[1].keys()


def test_recomputed_modulation_logs_its_factors_with_the_loss():
    _, statistics, inputs = make_case()
    metrics = PolicyLoss(modulation=DynamoModulation(**PAPER_CODE))(statistics, inputs, 12)[1]
    assert 1.0 <= metrics["mod/beta_comp_mean"].item() <= 1.2


def test_a_ratio_of_its_own_or_a_penalty_that_says_so_is_given_whole_rollouts():
    class SequenceRatio(UnclippedSurrogate):
        def importance_ratio(self, log_ratio, sequence_indices):
            return log_ratio.mean().exp().expand(len(log_ratio))

    class Narrower(SequenceRatio):
        pass

    class OfAToken(UnclippedSurrogate):
        couples_tokens = False

        def importance_ratio(self, log_ratio, sequence_indices):
            return log_ratio.exp().sqrt()

    class SequencePenalty(KLCov):
        couples_tokens = True

    def couples(**parts):
        return PolicyLoss(**{"modulation": None, **parts}).couples_tokens

    assert couples(surrogate=SequenceRatio()) and couples(surrogate=Narrower()) and couples(surrogate=GSPO())
    assert not couples(surrogate=OfAToken()) and not couples(surrogate=CISPO()) and not couples(penalty=KLCov())
    assert couples(penalty=SequencePenalty())
