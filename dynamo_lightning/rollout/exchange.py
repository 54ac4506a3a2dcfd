"""Rollouts exchanged between ranks, so that all have about as much to compute; each goes only where it is trained on.

Every rank knows all outcomes, so all come to the same distribution by themselves. What is learned does not depend on
how rollouts are distributed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dynamo_lightning.distributed import exchange_values, world_size
from dynamo_lightning.policy.packing import balance
from dynamo_lightning.types import Outcome, Prompt, Rollout

Key = tuple[int, int]


def spread_over_ranks(
    rollouts: Sequence[Rollout], outcomes: Sequence[Outcome], prompts: Sequence[Prompt], passes: tuple[int, int]
) -> list[Rollout]:
    """Give each rank its share of the rollouts that have an outcome.

    Args:
        rollouts: Sampled on this rank.
        outcomes: Of all ranks.
        prompts: Of all outcomes.
        passes: How often the tokens of a rollout are passed through the policy: if its group's rewards differ, and if
            they are all equal.

    Returns:
        This rank's share of the rollouts of all ranks, sorted by key; without other processes all of its rollouts.
    """
    if world_size() == 1:
        return list(rollouts)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    owners = assign_ranks(outcomes, by_id, passes, world_size())
    own = [rollout for rollout in rollouts if rollout.key in owners]
    received = exchange(own, [owners[rollout.key] for rollout in own], by_id)
    return sorted(received, key=lambda rollout: rollout.key)


def assign_ranks(
    outcomes: Sequence[Outcome], prompts: Mapping[int, Prompt], passes: tuple[int, int], num_ranks: int
) -> dict[Key, int]:
    """The rank that trains on each rollout, by key: the same on every rank.

    Args:
        outcomes: Of all ranks, in any order.
        prompts: By prompt id.
        passes: As for `spread_over_ranks`.
        num_ranks: Number of ranks.
    """
    rewards: dict[int, set[float]] = {}
    for outcome in outcomes:
        rewards.setdefault(outcome.prompt_id, set()).add(outcome.score.reward)
    differing, equal = passes
    ordered = sorted(outcomes, key=lambda outcome: outcome.key)
    costs = [
        (len(prompts[outcome.prompt_id].token_ids) + outcome.response_length)
        * (differing if len(rewards[outcome.prompt_id]) > 1 else equal)
        for outcome in ordered
    ]
    shares = balance(costs, num_ranks)
    return {ordered[i].key: number for number, share in enumerate(shares) for i in share}


def exchange(rollouts: Sequence[Rollout], owners: Sequence[int], prompts: Mapping[int, Prompt]) -> list[Rollout]:
    """Send each rollout to the rank that owns it, as arrays: nothing is pickled, and no rank sees another's tokens.

    Args:
        rollouts: Of this rank.
        owners: Rank that each goes to.
        prompts: By prompt id, of the rollouts of all ranks.

    Returns:
        What this rank owns, in the order of the ranks it came from.
    """
    order = np.argsort(np.asarray(owners, dtype=np.int64), kind="stable")
    sent = [rollouts[i] for i in order]
    texts = [rollout.text.encode("utf-8", "surrogatepass") for rollout in sent]
    heads = np.array(
        [
            (*rollout.key, len(rollout.token_ids), rollout.truncated, len(text))
            for rollout, text in zip(sent, texts, strict=True)
        ],
        dtype=np.int64,
    ).reshape(len(sent), 5)
    groups = np.asarray(owners, dtype=np.int64)[order]

    def counts(sizes: np.ndarray) -> list[int]:
        return np.bincount(groups, weights=sizes, minlength=world_size()).astype(int).tolist()

    def send(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return exchange_values(torch.from_numpy(values), counts(sizes)).numpy()

    lengths, text_sizes = heads[:, 2], heads[:, 4]
    found = send(heads.reshape(-1), np.full(len(sent), 5)).reshape(-1, 5)
    empty_ids, empty_logprobs = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32)
    token_ids = send(np.concatenate([empty_ids, *(rollout.token_ids for rollout in sent)]), lengths)
    logprobs = send(np.concatenate([empty_logprobs, *(rollout.logprobs for rollout in sent)]), lengths)
    text = send(np.frombuffer(bytearray(b"".join(texts)), dtype=np.uint8), text_sizes).tobytes()
    token_ends, text_ends = np.cumsum(found[:, 2]), np.cumsum(found[:, 4])
    received = []
    for row, (prompt_id, sample_index, length, truncated, text_size) in enumerate(found.tolist()):
        tokens = slice(token_ends[row] - length, token_ends[row])
        words = text[text_ends[row] - text_size : text_ends[row]].decode("utf-8", "surrogatepass")
        prompt = prompts[prompt_id]
        received.append(Rollout(prompt, sample_index, token_ids[tokens], logprobs[tokens], words, bool(truncated)))
    return received
