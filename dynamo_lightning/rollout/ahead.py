"""Asynchronous sampling, one step off: servers sample the next batch while the policy is trained on the current one.

Its rollouts come from weights that are one RL iteration old when they are trained on. The scoring pass gives
`old_logprobs` of the newer weights, so the importance weights for another engine's log-probabilities correct this too.
The group sizes of the next batch are decided when all outcomes of the current one are known, as in synchronous
sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynamo_lightning.distributed import gather_objects, rank, run_seed, stop_together, world_size
from dynamo_lightning.engines.engine import Engine, SamplingConfig
from dynamo_lightning.rollout.requests import make_requests, share_of_rank
from dynamo_lightning.types import PromptBatch, Rollout, RolloutRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RolloutsAhead:
    """This rank's rollouts of a later batch.

    Args:
        generator: An engine that samples asynchronously.
        sampling: Options of sampling.
    """

    def __init__(self, generator: Engine, sampling: SamplingConfig) -> None:
        self.generator = generator
        self.sampling = sampling
        self.version = 0
        """Optimizer steps of the weights that sample, or sampled last."""
        self._batch: PromptBatch | None = None
        self._num_filled_up = 0
        self._under_way: Future[list[Rollout]] | None = None
        self._done: list[Rollout] = []
        self._saved: Mapping[str, Any] | None = None
        self._threads = ThreadPoolExecutor(max_workers=1)

    def has(self, batch: PromptBatch) -> bool:
        """True if rollouts of this batch are under way or done; saved ones of another batch are dropped."""
        if self._saved is not None:
            self._restore(batch)
        return self._batch is not None

    def begin(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch, version: int
    ) -> None:
        """Start sampling the rollouts of a batch, from the weights that were pushed last.

        Args:
            policy: Still has these weights.
            tokenizer: Decodes the responses.
            batch: The next batch.
            version: Optimizer steps so far.
        """
        requests, self._num_filled_up = share_of_rank(make_requests(batch, "train", run_seed()), rank(), world_size())
        sample = self.generator.begin(
            policy,
            tokenizer,
            requests,
            max_response_length=self.sampling.max_response_length,
            temperature=self.sampling.temperature,
            **self.sampling.stop_options(),
        )
        self._batch, self.version = batch, version
        self._under_way = self._threads.submit(sample)

    def wait(self) -> None:
        """Wait until nothing is under way: weights must not change under a rollout; called on all ranks at once.

        Raises:
            RunError: If sampling failed on any rank.
        """
        if self._under_way is None:
            return
        message = ""
        try:
            self._done = self._under_way.result()
        except RuntimeError as error:
            message = str(error)
        self._under_way = None
        stop_together(message)

    def take(self, batch: PromptBatch) -> tuple[list[Rollout], Rollout] | None:
        """This rank's share of the batch's rollouts and a spare one; `None` if this batch was not sampled ahead."""
        self.wait()
        if self._batch is None:
            return None
        same = self._batch.iteration == batch.iteration and self._batch.group_sizes == batch.group_sizes
        assert same and self._batch.prompts == batch.prompts
        rollouts, self._batch, self._done = self._done, None, []
        return rollouts[: len(rollouts) - self._num_filled_up], rollouts[0]

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All ranks' rollouts, as tensors and primitives; waits for them; called on all ranks at once."""
        self.wait()
        if self._saved is not None:  # nothing has happened since they were loaded
            return dict(self._saved)
        if self._batch is None:
            return {}
        own = self._done[: len(self._done) - self._num_filled_up]
        rollouts = gather_objects(own)
        return {
            "iteration": self._batch.iteration,
            "version": self.version,
            "prompt_ids": torch.tensor([rollout.prompt.prompt_id for rollout in rollouts]),
            "sample_indices": torch.tensor([rollout.sample_index for rollout in rollouts]),
            "lengths": torch.tensor([len(rollout.token_ids) for rollout in rollouts]),
            "token_ids": torch.from_numpy(np.concatenate([rollout.token_ids for rollout in rollouts])),
            "logprobs": torch.from_numpy(np.concatenate([rollout.logprobs for rollout in rollouts])),
            "truncated": torch.tensor([rollout.truncated for rollout in rollouts]),
            "texts": [rollout.text for rollout in rollouts],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep the rollouts of `state_dict` until their batch is trained on."""
        self._batch, self._done, self._saved = None, [], state_dict or None

    def _restore(self, batch: PromptBatch) -> None:
        """This rank's share of saved rollouts, on however many ranks; none if the batch is not the one of then."""
        saved, self._saved = self._saved, None
        assert saved is not None
        everything = make_requests(batch, "train", run_seed())
        requests, self._num_filled_up = share_of_rank(everything, rank(), world_size())
        keys = list(zip(saved["prompt_ids"].tolist(), saved["sample_indices"].tolist(), strict=True))
        rows = {key: row for row, key in enumerate(keys)}
        if saved["iteration"] != batch.iteration or set(rows) != {key_of(request) for request in everything}:
            return
        tokens = saved["token_ids"].split(saved["lengths"].tolist())
        logprobs = saved["logprobs"].split(saved["lengths"].tolist())
        self._batch, self.version = batch, saved["version"]
        self._done = [
            Rollout(
                request.prompt,
                request.sample_index,
                tokens[row].numpy().astype(np.int32),
                logprobs[row].numpy().astype(np.float32),
                saved["texts"][row],
                bool(saved["truncated"][row]),
            )
            for request in requests
            for row in (rows[key_of(request)],)
        ]


def key_of(request: RolloutRequest) -> tuple[int, int]:
    """`(prompt_id, sample_index)`, as of its rollout."""
    return request.prompt.prompt_id, request.sample_index
