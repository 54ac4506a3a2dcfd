"""The options of a run that decide how rollouts are trained on, in one record."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.update.config import UpdateConfig


@dataclass(frozen=True)
class UpdateSettings:
    """Options of all parts of an update."""

    loss: PolicyLoss
    """The policy loss."""
    max_response_length: int
    """The length limit of responses, tokens."""
    config: UpdateConfig = field(default_factory=UpdateConfig)
    """Numbers of passes and mini-batches, and the memory bounds."""
    temperature: float = 1.0
    """Divides the logits, as it did when the tokens were sampled."""
    uses_external_engine: bool = False
    """The rollouts' log-probabilities are those of another engine than the policy itself, which sampled them."""
    gradient_clip_val: float | None = None
    """Total gradient norm above which gradients are scaled down; `None` never does."""
