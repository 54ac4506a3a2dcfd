"""Metrics of an RL iteration on their way to Lightning's loggers.

`LightningModule.log` copies the description of a metric each time it is logged, about 0.3 ms: with the fifty metrics
of an iteration that is some percent of a small policy's iteration. Here a metric that Lightning already knows is given
its new value only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from lightning.pytorch import LightningModule


def log_step_metrics(pl_module: LightningModule, metrics: Mapping[str, float], shown: Collection[str] = ()) -> None:
    """Log metrics as `pl_module.log_dict(metrics, on_step=True, on_epoch=False)` does.

    Args:
        pl_module: The module, in a hook that may log.
        metrics: By name.
        shown: Names that the progress bar shows.
    """
    results = None
    for name, value in metrics.items():
        key = f"{pl_module._current_fx_name}.{name}"
        known = results.get(key) if results is not None else None
        if known is None or not known.is_tensor:
            # The first one of each call goes this way too: Lightning begins an epoch with it.
            pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name in shown)
            results = getattr(pl_module._trainer, "_results", None) if pl_module._trainer is not None else None
        else:
            number = torch.tensor(float(value), dtype=known.value.dtype, device=pl_module.device)
            results.update_metrics(key, number, batch_size=1)
