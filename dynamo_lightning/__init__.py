"""Reinforcement learning with verifiable rewards on PyTorch Lightning.

The names below are the public face; each is imported when it is first used, so that `import dynamo_lightning` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_lightning.data.source import PromptSource
    from dynamo_lightning.datamodule import RolloutDataModule
    from dynamo_lightning.engines.engine import SamplingConfig
    from dynamo_lightning.errors import RunError, UserError
    from dynamo_lightning.losses.policy_loss import PolicyLoss
    from dynamo_lightning.module import PolicyModule
    from dynamo_lightning.policy.loading import PolicyConfig
    from dynamo_lightning.rewards.math import MathReward
    from dynamo_lightning.rewards.scorer import ScoringConfig
    from dynamo_lightning.update.config import UpdateConfig

__version__ = "0.2.0"

_HOMES = {
    "MathReward": "rewards.math",
    "PolicyConfig": "policy.loading",
    "PolicyLoss": "losses.policy_loss",
    "PolicyModule": "module",
    "PromptSource": "data.source",
    "RolloutDataModule": "datamodule",
    "RunError": "errors",
    "SamplingConfig": "engines.engine",
    "ScoringConfig": "rewards.scorer",
    "UpdateConfig": "update.config",
    "UserError": "errors",
}
"""By public name the module that defines it."""

__all__ = [
    "MathReward",
    "PolicyConfig",
    "PolicyLoss",
    "PolicyModule",
    "PromptSource",
    "RolloutDataModule",
    "RunError",
    "SamplingConfig",
    "ScoringConfig",
    "UpdateConfig",
    "UserError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted(__all__)
