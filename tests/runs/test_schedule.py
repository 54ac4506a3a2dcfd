import functools

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from dynamo_lightning.errors import UserError
from dynamo_lightning.runs.schedule import apply_options

STEPS = 5
sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
warm_up = functools.partial(LinearLR, start_factor=0.1, total_iters=10)


def advance(optimizer, scheduler, steps):
    """Learning rates of the next steps."""
    rates = []
    for _ in range(steps):
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def build(make_optimizer, make_scheduler):
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = make_optimizer([parameter])
    return optimizer, make_scheduler(optimizer) if make_scheduler else None


def checkpoint(make_optimizer, make_scheduler):
    optimizer, scheduler = build(make_optimizer, make_scheduler)
    advance(optimizer, scheduler, STEPS)
    return {
        "global_step": STEPS,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()] if scheduler else [],
    }


def resumed_rates(saved, make_optimizer, make_scheduler):
    apply_options(saved, make_optimizer, make_scheduler)
    optimizer, scheduler = build(make_optimizer, make_scheduler)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    assert optimizer.state_dict()["state"][0]["momentum_buffer"].item() > 1, "moments stay"
    if scheduler is not None:
        scheduler.load_state_dict(saved["lr_schedulers"][0])
    return advance(optimizer, scheduler, 6)


CASES = {
    "another rate": (functools.partial(sgd, lr=0.2), warm_up),
    "a schedule that ends later": (sgd, functools.partial(CosineAnnealingLR, T_max=40)),
    "a schedule that differs only later": (sgd, functools.partial(MultiStepLR, milestones=[7])),
    "no schedule": (sgd, None),
    "another momentum": (functools.partial(sgd, momentum=0.5), warm_up),
    "nothing": (sgd, warm_up),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first", [warm_up, functools.partial(MultiStepLR, milestones=[3]), None])
def test_a_resumed_run_has_the_rates_of_its_options_as_if_it_had_them_all_along(case, first):
    make_optimizer, make_scheduler = CASES[case]
    whole = advance(*build(make_optimizer, make_scheduler), STEPS + 6)
    saved = checkpoint(sgd, first)
    assert resumed_rates(saved, make_optimizer, make_scheduler) == pytest.approx(whole[STEPS:])
    assert saved["optimizer_states"][0]["param_groups"][0]["momentum"] == make_optimizer.keywords["momentum"]


def test_unchanged_options_leave_the_checkpoint_as_it_is():
    saved = checkpoint(sgd, warm_up)
    schedules = saved["lr_schedulers"]
    apply_options(saved, sgd, warm_up)
    assert saved["lr_schedulers"] is schedules


def test_another_optimizer_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"optimizer=AdamW is not the optimizer of the checkpoint.*momentum"):
        apply_options(checkpoint(sgd, warm_up), functools.partial(torch.optim.AdamW, lr=0.1), warm_up)


def test_a_restored_optimizer_of_a_sharding_strategy_is_changed_in_place():
    optimizer, scheduler = build(sgd, warm_up)
    advance(optimizer, scheduler, STEPS)
    saved = {"global_step": STEPS, "lr_schedulers": [scheduler.state_dict()]}
    apply_options(saved, functools.partial(sgd, lr=0.2), warm_up, [optimizer])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * (0.1 + 0.9 * STEPS / 10))
