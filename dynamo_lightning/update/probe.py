"""Mean token entropy of some rollouts of the batch, before and after the steps of an iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from dynamo_lightning.distributed import gather_objects, sum_over_ranks
from dynamo_lightning.losses.policy_loss import PolicyLoss
from dynamo_lightning.losses.token_statistics import TokenStatistics
from dynamo_lightning.types import RolloutBatch


def probe_rollouts(batch: RolloutBatch, loss: PolicyLoss) -> Tensor | None:
    """This rank's rollouts to measure, `[num_rollouts]`, bool; `None` if nothing is measured in this iteration.

    The first ones of all ranks by prompt and sample index: the same rollouts however they are spread.

    Args:
        batch: This rank's rollouts.
        loss: Says how many rollouts it wants measured.
    """
    count = loss.num_probe_rollouts(batch.iteration)
    if count == 0:
        return None
    keys = [rollout.key for rollout in batch.rollouts]
    # A stable order that mixes prompts: by sample index first.
    chosen = set(sorted(gather_objects(keys), key=lambda key: (key[1], key[0]))[:count])
    return torch.tensor([key in chosen for key in keys], dtype=torch.bool)


def mean_probe_entropy(statistics: TokenStatistics, batch: RolloutBatch, probe: Tensor) -> float:
    """Mean entropy of the probe's response tokens, all ranks, nats; communicates.

    Args:
        statistics: Of this rank's response tokens.
        batch: This rank's rollouts.
        probe: Those to measure, `[num_rollouts]`, bool.
    """
    rows = probe[batch.token_rollouts].to(statistics.entropy.device)
    totals = sum_over_ranks({"sum": float(statistics.entropy[rows].double().sum()), "tokens": float(rows.sum())})
    return totals["sum"] / max(totals["tokens"], 1.0)
