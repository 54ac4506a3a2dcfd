"""The mode of every pass over a policy but sampling: without dropout, which would make each pass another policy.

Importance ratios compare the log-probabilities of the update with those of the pass before it and of sampling. With
dropout they would differ at the first step already, where the ratio must be 1, and PPO's clip would cut at random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def disable_dropout(policy: PreTrainedModel) -> None:
    """Set every dropout probability of a model to 0: its modules', and the numbers that layers apply by themselves.

    Layers keep such numbers as `dropout`, `attention_dropout`, `activation_dropout`, `resid_pdrop`, `layerdrop`, …
    """
    for module in policy.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if is_dropout_name(name) and isinstance(value, float):
                setattr(module, name, 0.0)


def is_dropout_name(name: str) -> bool:
    """True if an attribute of this name is a dropout probability."""
    return "dropout" in name or name.endswith("_pdrop") or name == "layerdrop"


def set_training_mode(policy: PreTrainedModel) -> None:
    """Put a policy into the mode of log-probabilities and updates: evaluation mode, in which nothing is random.

    Router noise of mixtures of experts and layers that are skipped at random are off as well. transformers recomputes
    activations (gradient checkpointing) in training mode only: layers that do are in it, but not what is inside them.
    """
    policy.eval()
    for module in policy.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
