import pytest
import torch

from dynamo_lightning.losses.gspo import GSPO

SEQUENCES = torch.tensor([3, 3, 0, 0, 0])


def test_ratio_is_that_of_the_sequence_by_hand():
    log_ratio = torch.tensor([0.1, 0.3, -0.3, 0.0, 0.0])
    ratio = GSPO().importance_ratio(log_ratio, SEQUENCES)
    torch.testing.assert_close(ratio, torch.tensor([0.2, 0.2, -0.1, -0.1, -0.1]).exp())


def test_gradient_is_that_of_the_sequence_level_objective():
    """`Σ_i s_i A_i` by whole sequences, and by tokens that each weigh 1/length."""
    log_ratio = torch.tensor([0.1, 0.3, -0.3, 0.0, 0.02], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, 2.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    weights = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    (weights * GSPO().importance_ratio(log_ratio, SEQUENCES) * advantages).sum().backward()
    by_tokens, log_ratio.grad = log_ratio.grad, None
    (2.0 * log_ratio[:2].mean().exp() - log_ratio[2:].mean().exp()).backward()
    torch.testing.assert_close(by_tokens, log_ratio.grad)


def test_a_sequence_is_clipped_as_a_whole():
    log_ratio = torch.tensor([0.01, -0.001, 0.0002, 0.0002, 0.0002], requires_grad=True)
    ratio = GSPO().importance_ratio(log_ratio, SEQUENCES)
    objective, indicators = GSPO()(ratio, torch.ones(5))
    assert indicators["clip_ratio/high_mean"].tolist() == [1, 1, 0, 0, 0]
    objective.sum().backward()
    assert log_ratio.grad[:2].tolist() == [0.0, 0.0]
    assert (log_ratio.grad[2:] > 0.9).all()


def test_default_bounds_are_the_papers():
    assert (GSPO().clip_low, GSPO().clip_high, GSPO().dual_clip) == (3e-4, 4e-4, None)


def test_impossible_bounds_are_refused():
    with pytest.raises(ValueError, match="surrogate needs"):
        GSPO(sequence_clip_low=0.0)


def test_no_tokens_give_no_ratios():
    empty = torch.zeros(0)
    assert GSPO().importance_ratio(empty, empty.long()).shape == (0,)
