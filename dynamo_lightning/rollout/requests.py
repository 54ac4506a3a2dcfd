"""From a batch with its group sizes to sampling requests, and their shares among ranks."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_lightning.distributed import derive_seed
from dynamo_lightning.types import PromptBatch, RolloutRequest


def make_requests(batch: PromptBatch, stage: str, seed: int) -> list[RolloutRequest]:
    """One request for each rollout of the global batch.

    Training seeds change with the iteration. Evaluation seeds do not, so that two evaluations of a run differ by the
    policy and not by luck.

    Args:
        batch: The global batch.
        stage: `train`, or the name of the evaluation.
        seed: Seed of the run.
    """
    iteration = batch.iteration if stage == "train" else 0
    return [
        RolloutRequest(plan.prompt, index, derive_seed(seed, stage, iteration, plan.prompt.prompt_id, index))
        for plan in batch.plans
        for index in range(plan.first_sample_index, plan.first_sample_index + plan.size)
    ]


def share_of_rank(requests: Sequence[RolloutRequest], rank: int, world_size: int) -> tuple[list[RolloutRequest], int]:
    """This rank's share of the requests, filled up so that all ranks have equally many.

    Args:
        requests: Of the global batch, at least one.
        rank: This process.
        world_size: Number of processes.

    Returns:
        The share, and how many requests at its end only fill it up: their rollouts are to be thrown away.
    """
    share = list(requests[rank::world_size])
    missing = -(-len(requests) // world_size) - len(share)
    return share + [requests[0]] * missing, missing
