"""Rollouts of later batches: begun with the weights of now, trained on some iterations later, first in, first out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dynamo_lightning.distributed import gather_objects, rank, run_seed, stop_together, world_size
from dynamo_lightning.rollout.arrays import RolloutArrays
from dynamo_lightning.rollout.requests import make_requests, share_of_rank
from dynamo_lightning.types import PromptBatch, Rollout


@dataclass
class BatchInFlight:
    """This rank's rollouts of a later batch, under way or done."""

    sampled_at: int
    """RL iteration whose weights sample them."""
    num_filled_up: int
    """Rollouts at the end of this rank's share that only fill it up, see `share_of_rank`."""
    under_way: Future[list[Rollout]] | None = None
    rollouts: list[Rollout] = field(default_factory=list)


class RolloutsInFlight:
    """This rank's rollouts of later batches, by iteration."""

    def __init__(self) -> None:
        self._batches: dict[int, BatchInFlight] = {}
        self._saved: dict[int, Mapping[str, Any]] = {}
        self._threads = ThreadPoolExecutor(max_workers=1)

    def __contains__(self, batch: PromptBatch) -> bool:
        """True if this batch is under way or done; a saved one that is another batch by now is forgotten."""
        if batch.iteration in self._saved:
            self._restore(batch)
        return batch.iteration in self._batches

    def begin(
        self, batch: PromptBatch, sampled_at: int, num_filled_up: int, sample: Callable[[], list[Rollout]]
    ) -> None:
        """Sample a batch in the background, after those that were begun before.

        Args:
            batch: A later batch.
            sampled_at: RL iteration whose weights sample it.
            num_filled_up: See `BatchInFlight`.
            sample: Gives this rank's share.
        """
        under_way = self._threads.submit(sample)
        self._batches[batch.iteration] = BatchInFlight(sampled_at, num_filled_up, under_way)

    def add(self, batch: PromptBatch, sampled_at: int, rollouts: Sequence[Rollout], filler: Rollout) -> None:
        """Keep this rank's share of a batch that is sampled already, and any of its rollouts."""
        whole = list(rollouts) or [filler]
        self._batches[batch.iteration] = BatchInFlight(sampled_at, len(whole) - len(rollouts), None, whole)

    def wait(self) -> None:
        """Wait until nothing is under way: weights must not change under a rollout; called on all ranks at once.

        Raises:
            RunError: If sampling failed on any rank.
        """
        if not any(batch.under_way for batch in self._batches.values()):
            return
        message = ""
        for batch in self._batches.values():
            try:
                batch.rollouts = batch.under_way.result() if batch.under_way else batch.rollouts
            except (RuntimeError, ValueError) as error:
                message = message or str(error)
            batch.under_way = None
        stop_together(message)

    def take(self, batch: PromptBatch) -> tuple[list[Rollout], Rollout, int] | None:
        """This rank's share of a batch, one of its rollouts, and the iteration whose weights sampled it.

        `None` if this batch was not begun.
        """
        if batch not in self:
            return None
        self.wait()
        taken = self._batches.pop(batch.iteration)
        rollouts = taken.rollouts
        return rollouts[: len(rollouts) - taken.num_filled_up], rollouts[0], taken.sampled_at

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All ranks' rollouts, as tensors and primitives; waits for them; called on all ranks at once."""
        self.wait()
        state = {str(iteration): dict(saved) for iteration, saved in self._saved.items()}
        for iteration, batch in self._batches.items():
            own = batch.rollouts[: len(batch.rollouts) - batch.num_filled_up]
            parts = gather_objects([RolloutArrays.of(own)])
            whole = parts[0].map(lambda name, _: np.concatenate([getattr(part, name) for part in parts]))  # noqa: B023
            state[str(iteration)] = {"sampled_at": batch.sampled_at, **whole.state_dict()}
        return state

    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep the rollouts of a checkpoint until their batches are trained on."""
        if checkpoint.get("rollouts_ahead"):
            rank_zero_warn(
                "the rollouts that version 0.1 sampled ahead (model.one_step_off) are in a form that is not read any "
                "more: their batch is sampled anew, from the weights of the checkpoint"
            )
        self.load_state_dict(checkpoint.get("rollouts_in_flight", {}))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep the rollouts of `state_dict` until their batches are trained on."""
        self._batches = {}
        self._saved = {int(iteration): saved for iteration, saved in state_dict.items()}

    def _restore(self, batch: PromptBatch) -> None:
        """This rank's share of saved rollouts, on however many ranks; none if the batch is not the one of then."""
        saved = dict(self._saved.pop(batch.iteration))
        sampled_at = saved.pop("sampled_at")
        everything = make_requests(batch, "train", run_seed())
        requests, num_filled_up = share_of_rank(everything, rank(), world_size())
        arrays = RolloutArrays.from_state_dict(saved)
        if set(arrays.keys()) != {request.key for request in everything}:
            return
        found = {r.key: r for r in arrays.rollouts({prompt.prompt_id: prompt for prompt in batch.prompts})}
        rollouts = [found[request.key] for request in requests]
        self._batches[batch.iteration] = BatchInFlight(sampled_at, num_filled_up, None, rollouts)
