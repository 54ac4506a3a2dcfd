import pytest
import torch

from dynamo_lightning.losses.cispo import CISPO


def test_gradient_by_hand():
    """`min(r, 5) A` times the gradient of log π, also where the ratio is clipped."""
    log_ratio = torch.tensor([0.5, 3.0, -2.0, 3.0]).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -2.0])
    objective, indicators = CISPO()(log_ratio.exp(), advantages)
    objective.sum().backward()
    ratio = log_ratio.detach().exp()
    expected = torch.stack([ratio[0], torch.tensor(5.0), -ratio[2], torch.tensor(-10.0)])
    torch.testing.assert_close(log_ratio.grad, expected)
    torch.testing.assert_close(objective.detach(), expected)
    assert indicators["clip_ratio/high_mean"].tolist() == [0, 1, 0, 1]


def test_lower_bound_by_hand():
    log_ratio = torch.tensor([-3.0], requires_grad=True)
    CISPO(min_ratio=0.5)(log_ratio.exp(), torch.tensor([2.0]))[0].sum().backward()
    assert log_ratio.grad.item() == pytest.approx(1.0)


def test_a_ratio_that_underflowed_gives_no_nan():
    log_ratio = torch.tensor([-1000.0], requires_grad=True)
    CISPO()(log_ratio.exp(), torch.tensor([1.0]))[0].sum().backward()
    assert log_ratio.grad.item() == 0.0


@pytest.mark.parametrize("settings", [{"max_ratio": 0.5}, {"min_ratio": 1.5}, {"min_ratio": -0.1}])
def test_bounds_that_do_not_enclose_one_are_refused(settings):
    with pytest.raises(ValueError, match="CISPO needs"):
        CISPO(**settings)
