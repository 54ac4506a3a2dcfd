"""A warning for runs in which no group has a learning signal, which would otherwise end unnoticed and unchanged."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from dynamo_lightning.allocation.outcomes import group_rewards
from dynamo_lightning.errors import UserError
from dynamo_lightning.types import IterationRecord


class LearningSignalMonitor(Callback):
    """Warns when all advantages have been 0 in several iterations in a row, and at the end if they always were.

    A group whose rewards are all equal has advantages of 0. The warning says how many groups had only correct and how
    many only incorrect responses, and what to do. It is repeated when the number of iterations has doubled.

    Args:
        patience: Iterations in a row without a learning signal before the first warning.

    Raises:
        UserError: If `patience` is below 1.
    """

    def __init__(self, patience: int = 10) -> None:
        if patience < 1:
            raise UserError(f"LearningSignalMonitor needs patience of at least 1, got {patience}")
        self.patience = patience
        self.num_iterations = 0
        self.num_teaching = 0
        """Iterations in which a group had differing rewards."""
        self.idle = [0, 0, 0]
        """Since the last of them: iterations, groups of correct and groups of incorrect responses only."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the rewards of the iteration's groups."""
        loss = getattr(pl_module, "loss", None)
        threshold = getattr(getattr(trainer, "datamodule", None), "success_threshold", 0.5)
        self.observe(outputs["record"], threshold, loss is None or loss.advantage.equal_rewards_give_zero)
        repeats = self.idle[0] / self.patience
        if repeats >= 1 and repeats.is_integer() and int(repeats).bit_count() == 1:
            rank_zero_warn(f"no group had a learning signal in {self.idle[0]} iterations in a row: {self._reason()}")

    def observe(self, record: IterationRecord, success_threshold: float, equal_rewards_give_zero: bool) -> None:
        """Counts an iteration.

        Args:
            record: The iteration.
            success_threshold: A rollout with at least this reward is correct.
            equal_rewards_give_zero: False if the loss learns from equal rewards.
        """
        self.num_iterations += 1
        groups = [group for group in group_rewards(record.batch, record.outcomes) if group]
        if not equal_rewards_give_zero or any(max(group) != min(group) for group in groups):
            self.num_teaching += 1
            self.idle = [0, 0, 0]
            return
        correct = sum(group[0] >= success_threshold for group in groups)
        counts = (1, correct, len(groups) - correct)
        self.idle = [old + new for old, new in zip(self.idle, counts, strict=True)]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so if the whole run learned nothing."""
        if self.num_iterations and not self.num_teaching:
            reason = self._reason()
            rank_zero_info(
                f"nothing was learned: no group had a learning signal in {self.num_iterations} iterations: {reason}"
            )

    def _reason(self) -> str:
        _, correct, incorrect = self.idle
        counts = (
            f"the responses of {correct} groups were all correct, of {incorrect} all incorrect, and equal rewards give "
            "advantages of 0. "
        )
        if correct and incorrect:
            return counts + "Train on prompts of medium difficulty (data.train), or raise data.rollouts_per_prompt"
        if correct:
            return counts + "The policy solves these prompts: train on harder ones (data.train)"
        return counts + (
            "Look at some responses: the prompts may be too hard (data.train), the template wrong (data.template), "
            "responses cut off (model.sampling.max_response_length), or correct answers not recognized (model.reward)"
        )

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {"num_iterations": self.num_iterations, "num_teaching": self.num_teaching, "idle": self.idle}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting from a saved state."""
        for name in ("num_iterations", "num_teaching", "idle"):
            setattr(self, name, state_dict[name])
