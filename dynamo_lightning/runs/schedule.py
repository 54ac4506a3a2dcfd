"""The learning rate of a resumed run: that of its options as they are now, at the step where the run stands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from dynamo_lightning.errors import UserError

_COUNTERS = {"_step_count", "_get_lr_called_within_step", "_is_initial", "verbose", "_last_lr"}
"""State of a schedule that says nothing about its future."""
_OF_THE_RUN = {"params", "initial_lr"}


def apply_options(
    checkpoint: dict[str, Any],
    make_optimizer: Callable[[Sequence[torch.nn.Parameter]], Optimizer],
    make_scheduler: Callable[[Optimizer], Any] | None,
    optimizers: Sequence[Optimizer] = (),
) -> None:
    """Have a resumed run use changed options of the optimizer and its schedule, which a checkpoint would override.

    The options as they are now are run forward to the step of the checkpoint; if anything differs from the checkpoint's
    state, it takes its place. Moments stay.

    Args:
        checkpoint: A Lightning checkpoint that is about to be restored, changed in place.
        make_optimizer: Makes the optimizer.
        make_scheduler: Makes its schedule; none without one.
        optimizers: Those whose state a sharding strategy has restored already.

    Raises:
        UserError: If the optimizer is of another kind than the checkpoint's.
    """
    states = checkpoint.get("optimizer_states") or []
    saved_groups = states[0]["param_groups"] if states else [group for o in optimizers[:1] for group in o.param_groups]
    saved_schedules = checkpoint.get("lr_schedulers") or []
    if not saved_groups:
        return
    steps = saved_schedules[0].get("last_epoch", 0) if saved_schedules else checkpoint.get("global_step", 0)
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    scheduler = make_scheduler(optimizer) if make_scheduler is not None else None
    new_groups = optimizer.state_dict()["param_groups"]
    if new_groups[0].keys() - _OF_THE_RUN != saved_groups[0].keys() - _OF_THE_RUN:
        raise UserError(
            f"optimizer={type(optimizer).__name__} is not the optimizer of the checkpoint, whose options are "
            f"{', '.join(sorted(map(str, saved_groups[0].keys() - _OF_THE_RUN)))}: resume with the same one, or start "
            "a new run from the exported policy (model.model_name)"
        )
    if len(new_groups) != len(saved_groups):
        return  # groups that depend on the parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step was taken before the schedule's
        for _ in range(steps if scheduler is not None else 0):
            scheduler.step()  # type: ignore[union-attr]
    new_groups = optimizer.state_dict()["param_groups"]
    new_schedules = [scheduler.state_dict()] if scheduler is not None else []
    changes = [
        f"{name} {old[name]} → {new[name]}"
        for old, new in zip(saved_groups, new_groups, strict=True)
        for name in new.keys() - {"params"}
        if old.get(name, new[name]) != new[name]
    ]
    if [_future(state) for state in saved_schedules] != [_future(state) for state in new_schedules]:
        changes.append("lr_scheduler")
    if not changes:
        return
    for old, new in zip(saved_groups, new_groups, strict=True):
        old.update({name: value for name, value in new.items() if name != "params"})
    checkpoint["lr_schedulers"] = new_schedules
    rank_zero_info(f"optimizer: options changed on this resume, from step {steps} on: {', '.join(sorted(changes))}")


def _future(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in _COUNTERS}
