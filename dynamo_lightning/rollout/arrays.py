"""Rollouts as a few flat arrays, to be sent to other ranks and kept in checkpoints: nothing is pickled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_lightning.types import Key, Prompt, Rollout, Status, Turn

STATUSES: tuple[Status, ...] = get_args(Status)
NUM_HEADS = 10


@dataclass(frozen=True)
class RolloutArrays:
    """Rollouts laid end to end.

    Example:
        `RolloutArrays.of(rollouts).rollouts({7: prompt})` gives the rollouts again, all of prompt 7.
    """

    heads: NDArray[np.int64]
    """Key, status and lengths of each rollout, see `of`, `[num_rollouts · NUM_HEADS]`."""
    token_ids: NDArray[np.int32]
    """`[num_tokens]`."""
    loss_mask: NDArray[np.bool_]
    """`[num_tokens]`."""
    logprobs: NDArray[np.float32]
    """`[num_response_tokens]`."""
    token_statistics: NDArray[np.float32]
    """Statistics of the rollouts that have them, `[num_values]`."""
    turns: NDArray[np.int64]
    """Start, stop and version of each turn, `[3 · num_turns]`."""
    rewards: NDArray[np.float64]
    """The environments' own, NaN where there is none, `[num_rollouts]`."""
    text: NDArray[np.uint8]
    """Texts and failures in UTF-8, `[num_bytes]`."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> RolloutArrays:
        """Arrays of these rollouts."""
        texts = [[part.encode("utf-8", "surrogatepass") for part in (r.text, r.failure)] for r in rollouts]
        heads = [
            (
                *rollout.key,
                STATUSES.index(rollout.status),
                len(rollout.token_ids),
                rollout.response_length,
                0 if rollout.token_statistics is None else rollout.token_statistics.size,
                3 * len(rollout.turns),
                rollout.environment_reward is not None,
                len(text),
                len(failure),
            )
            for rollout, (text, failure) in zip(rollouts, texts, strict=True)
        ]
        turns = [(turn.start, turn.stop, turn.version) for rollout in rollouts for turn in rollout.turns]
        given = [r.token_statistics.reshape(-1) for r in rollouts if r.token_statistics is not None]
        return cls(
            np.array(heads, dtype=np.int64).reshape(-1),
            np.concatenate([np.empty(0, dtype=np.int32), *(rollout.token_ids for rollout in rollouts)]),
            np.concatenate([np.empty(0, dtype=bool), *(rollout.loss_mask for rollout in rollouts)]),
            np.concatenate([np.empty(0, dtype=np.float32), *(rollout.logprobs for rollout in rollouts)]),
            np.concatenate([np.empty(0, dtype=np.float32), *given]),
            np.array(turns, dtype=np.int64).reshape(-1),
            np.array([r.environment_reward or 0.0 for r in rollouts], dtype=np.float64),
            np.frombuffer(bytearray(b"".join(part for parts in texts for part in parts)), dtype=np.uint8),
        )

    def sizes(self) -> dict[str, NDArray[np.int64]]:
        """By array the number of entries that each rollout has in it, `[num_rollouts]`."""
        heads = self.heads.reshape(-1, NUM_HEADS)
        ones = np.ones(len(heads), dtype=np.int64)
        _, _, _, tokens, responses, statistics, turns, _, text, failure = heads.T
        return {
            "heads": NUM_HEADS * ones,
            "token_ids": tokens,
            "loss_mask": tokens,
            "logprobs": responses,
            "token_statistics": statistics,
            "turns": turns,
            "rewards": ones,
            "text": text + failure,
        }

    def map(self, change: Callable[[str, NDArray[Any]], NDArray[Any]]) -> RolloutArrays:
        """The arrays that a function gives for each name and array."""
        return RolloutArrays(**{field.name: change(field.name, getattr(self, field.name)) for field in fields(self)})

    def rollouts(self, prompts: Mapping[int, Prompt]) -> list[Rollout]:
        """The rollouts.

        Args:
            prompts: By prompt id.
        """
        heads = self.heads.reshape(-1, NUM_HEADS)
        parts = {
            name: np.split(getattr(self, name), np.cumsum(sizes)[:-1]) if len(heads) else []
            for name, sizes in self.sizes().items()
        }
        found = []
        for row, (prompt_id, index, status, _, length, statistics, _, has_reward, text, _) in enumerate(heads.tolist()):
            words = parts["text"][row].tobytes()
            turns = parts["turns"][row].reshape(-1, 3).tolist()
            found.append(
                Rollout(
                    prompts[prompt_id],
                    index,
                    parts["token_ids"][row],
                    parts["logprobs"][row],
                    words[:text].decode("utf-8", "surrogatepass"),
                    STATUSES[status],
                    parts["loss_mask"][row],
                    tuple(Turn(*turn) for turn in turns),
                    float(parts["rewards"][row][0]) if has_reward else None,
                    words[text:].decode("utf-8", "surrogatepass"),
                    parts["token_statistics"][row].reshape(length, -1) if statistics else None,
                )
            )
        return found

    def keys(self) -> list[Key]:
        """Keys of the rollouts, in order."""
        return [(prompt_id, index) for prompt_id, index in self.heads.reshape(-1, NUM_HEADS)[:, :2].tolist()]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The arrays as tensors, for a checkpoint."""
        return {field.name: torch.from_numpy(getattr(self, field.name).copy()) for field in fields(self)}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor]) -> RolloutArrays:
        """The arrays of a checkpoint."""
        return cls(**{field.name: state_dict[field.name].numpy() for field in fields(cls)})
