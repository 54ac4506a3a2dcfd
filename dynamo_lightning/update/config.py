"""Options of training on a batch of rollouts: the section `model.updates` of a config."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_lightning.errors import UserError
from dynamo_lightning.losses.token_statistics import MAX_LOGITS_BYTES


@dataclass(frozen=True)
class UpdateConfig:
    """Options of training on a batch of rollouts."""

    num_mini_batches: int = 1
    """Optimizer steps per pass over the batch; each takes the same number of whole prompts."""
    num_epochs: int = 1
    """Passes over the batch."""
    max_tokens_per_micro_batch: int = 16384
    """Prompt and response tokens that go through the policy at once; bounds memory, does not change the result."""
    max_logits_bytes: int = MAX_LOGITS_BYTES
    """Memory for the logits that are held at once, and for working on them; does not change the result."""
    sync_every_micro_batch: bool = False
    """Add gradients up over processes after every micro-batch instead of after the last: with FSDP each process then
    holds its part of the gradient only, not the whole, for more communication; changes the result by rounding."""

    recompute_logprobs: bool = False
    """Compute log-probabilities and entropies of all responses before the update even if the engine, being the policy
    itself in float32, has given them while it sampled; a few responses of every batch are computed in any case, to
    compare."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("num_mini_batches", "num_epochs", "max_tokens_per_micro_batch", "max_logits_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"model.updates.{name} must be at least 1, got {getattr(self, name)}")
