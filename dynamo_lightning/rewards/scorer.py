"""Score rollouts in worker processes that can be killed: responses are untrusted text, a reward is anybody's code."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from dynamo_lightning.errors import RunError, UserError
from dynamo_lightning.rewards.combined import RewardLike, as_reward
from dynamo_lightning.rewards.failures import FailureWatch, check_failure_share
from dynamo_lightning.rewards.picklable import pickle_reward
from dynamo_lightning.rewards.reward import columns_on_request, describe_reward
from dynamo_lightning.rewards.worker import Item, ItemResult, initialize, score_items
from dynamo_lightning.types import Rollout, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RewardScorer", "ScoringConfig", "check_failure_share"]

_MAX_CHUNK_SIZE = 64  # items in one message to a worker: a message takes about a millisecond, a cached item 10 µs
_CHUNK_SECONDS = 0.5  # a worker starts no further item of a chunk after this time
_MAX_BROKEN_POOLS = 3  # in a row, without a single result in between


@dataclass
class ScoringConfig:
    """How rewards are computed, and what happens when that fails."""

    num_workers: int = 2
    """Processes that compute rewards, on each rank."""
    time_limit: float = 5.0
    """Wall-clock seconds for the reward of one rollout; a worker that takes longer is killed and replaced."""
    failure_score: float | Literal["drop"] = 0.0
    """Reward of a rollout whose reward timed out or crashed, or to which no reward applies; `drop` takes the rollout
    out of the batch instead."""
    max_failure_share: float = 0.05
    """Share of the global batch that may fail; training stops with an error above it, as soon as that is certain."""
    memory_limit_gb: float | None = 4.0
    """Memory in GiB that a worker may take beyond what it has when warm (Linux only); null for no limit."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.num_workers < 1:
            raise UserError(f"model.scoring.num_workers must be at least 1, got {self.num_workers}")
        if not self.time_limit > 0:
            raise UserError(f"model.scoring.time_limit must be above 0 seconds, got {self.time_limit}")
        if not 0 <= self.max_failure_share <= 1:
            raise UserError(f"model.scoring.max_failure_share must be from 0 to 1, got {self.max_failure_share}")
        if self.failure_score != "drop" and not math.isfinite(self.failure_score):
            raise UserError(f"model.scoring.failure_score must be finite or 'drop', got {self.failure_score}")
        if self.memory_limit_gb is not None and not self.memory_limit_gb > 0:
            raise UserError(f"model.scoring.memory_limit_gb must be above 0 GiB or null, got {self.memory_limit_gb}")


class _Task(NamedTuple):
    """An item on its way to a worker."""

    item: bytes
    """Pickled."""
    num_responses: int


class RewardScorer:
    """Computes rewards in a pool of processes, with a wall-clock limit for each rollout.

    Rollouts travel in chunks. When a chunk overruns or kills its worker, its items are scored again one by one, so that
    only the guilty one fails; a reward may thus be computed more than once and should have no side effects.

    Rollouts can be submitted while others are still sampled; `score` then waits for what is left.

    Args:
        reward: What to compute, see `as_reward`; it is pickled once for each worker.
        config: Limits, and what a failure is worth.
        max_response_length: Length limit of responses, tokens. Rewards get it as a column, beside `response_length`.
    """

    def __init__(self, reward: RewardLike, config: ScoringConfig, max_response_length: int | None = None) -> None:
        self.reward = as_reward(reward)
        self.config = config
        self.max_response_length = max_response_length
        self.asked_columns = columns_on_request(self.reward)
        self.watch = FailureWatch(
            describe_reward(self.reward), config.time_limit, config.max_failure_share, config.num_workers
        )
        self.tokenizer: PreTrainedTokenizerBase | None = None
        """Decodes responses with their special tokens, for rewards that ask for them."""
        self._pool: ProcessPool | None = None
        self._background = ThreadPoolExecutor(max_workers=1)
        self._submitted: list[tuple[Sequence[Rollout], Future[list[Score]]]] = []
        self._closed = threading.Event()

    def __enter__(self) -> RewardScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers without waiting for them; `score` does so by itself."""
        if self._pool is not None and not self._pool.active:  # broken, perhaps between two calls
            self._stop_pool()
        if self._pool is None:
            arguments = (pickle_reward(self.reward), os.getpid(), self.config.memory_limit_gb)
            # Not fork: the training process has threads and CUDA. Spawned workers do not run a `python -m` main again.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(
                self.config.num_workers, initializer=initialize, initargs=arguments, context=context
            )
            assert self._pool.active  # asking starts it

    def close(self) -> None:
        """End the workers at once and forget what was submitted; the next `score` starts new ones."""
        self._closed.set()  # for what runs in the background; what is submitted from now on gets an event of its own
        self._closed, self._submitted = threading.Event(), []
        self._stop_pool()

    def _stop_pool(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.stop()
            pool.join()

    def submit(self, rollouts: Sequence[Rollout]) -> None:
        """Begin to score rollouts whose scores the next `score` will be asked for."""
        items = [self._item([rollout]) for rollout in rollouts]
        self._submitted.append((rollouts, self._background.submit(self._score_each, items, self._closed)))

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return the score of each rollout, in order; a reward's failure is in its score, never raised.

        Raises:
            RunError: If workers cannot be started; after `watch.expect`, also if it is certain that too many of the
                batch fail.
            UserError: If the reward cannot be sent to a worker.
            Exception: What `pickle` raises if a prompt's columns cannot be sent to a worker.
        """
        submitted, self._submitted = self._submitted, []
        scores: dict[int, Score] = {}  # by identity: other rollouts of the same keys may come in another evaluation
        try:
            for earlier, future in submitted:
                scores.update(zip(map(id, earlier), future.result(), strict=True))
            others = [rollout for rollout in rollouts if id(rollout) not in scores]
            items = [self._item([rollout]) for rollout in others]
            scores.update(zip(map(id, others), self._score_each(items, self._closed), strict=True))
        except BaseException:  # also Ctrl-C: what is queued must not run any more
            self.close()
            raise
        finally:
            self.watch.reset()
        return [scores[id(rollout)] for rollout in rollouts]

    def score_groups(self, groups: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
        """Return the scores of whole groups, each of one prompt's rollouts; raises as `score` does."""
        try:
            return self._score([self._item(group, is_group=True) for group in groups], self._closed)
        except BaseException:
            self.close()
            raise
        finally:
            self.watch.reset()

    def _score_each(self, items: list[Item], closed: threading.Event) -> list[Score]:
        return [score for (score,) in self._score(items, closed)]

    def _score(self, items: Sequence[Item], closed: threading.Event) -> list[list[Score]]:
        """The scores of each item's responses; ends in an error once `closed` is set."""
        # Unpickled by the reward's own code path: a worker that failed to read a message would lose it silently.
        tasks = [_Task(pickle.dumps(item), len(item.responses)) for item in items]
        scores: dict[int, list[Score]] = {}
        suspects: set[int] = set()  # to be scored alone
        num_broken = 0
        while len(scores) < len(tasks):
            if closed.is_set():
                raise CancelledError
            num_before = len(scores)
            suspects, broken = self._score_once(tasks, scores, suspects)
            num_broken = num_broken + 1 if broken and len(scores) == num_before else 0
            if num_broken == _MAX_BROKEN_POOLS:
                raise RunError(
                    f"reward workers ended {num_broken} times in a row before they scored anything; if a script "
                    "starts training, its code must stand under `if __name__ == '__main__':`, as workers import it"
                )
        return [scores[index] for index in range(len(tasks))]

    def _item(self, rollouts: Sequence[Rollout], is_group: bool = False) -> Item:
        """Item of work for one rollout, or for the rollouts of a group."""
        prompt = rollouts[0].prompt
        answers = prompt.answers or (prompt.answer,)
        columns = [self._columns(rollout) for rollout in rollouts]
        return Item(prompt.question, [rollout.text for rollout in rollouts], answers, columns, is_group)

    def _columns(self, rollout: Rollout) -> dict[str, Any]:
        """The row's other columns, and what a reward cannot see from the text: lengths in tokens, the data set."""
        prompt = rollout.prompt
        columns = {
            "source": prompt.source,
            **prompt.columns,
            "dataset": prompt.source,
            "response_length": rollout.response_length,
            "max_response_length": self.max_response_length,
        }
        if "answers" in self.asked_columns:
            columns["answers"] = list(prompt.answers or (prompt.answer,))
        if "prompt_text" in self.asked_columns:
            columns["prompt_text"] = prompt.text
        if "response_with_special_tokens" in self.asked_columns:
            columns["response_with_special_tokens"] = self._with_special_tokens(rollout)
        return columns

    def _with_special_tokens(self, rollout: Rollout) -> str:
        """The response with its special tokens, but for the one that ended it."""
        if self.tokenizer is None:
            return rollout.text
        token_ids = rollout.response_ids.tolist()
        if not rollout.truncated and token_ids[-1] in self.tokenizer.all_special_ids:
            token_ids.pop()
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))

    def _score_once(
        self, tasks: list[_Task], scores: dict[int, list[Score]], suspects: set[int]
    ) -> tuple[set[int], bool]:
        """Send everything that has no score yet to the pool once, and add what comes back to `scores`.

        Returns:
            The items to send alone the next time, and whether the pool broke.
        """
        new_suspects: set[int] = set()
        self.start()
        pool = self._pool  # `close` may take it away meanwhile
        assert pool is not None
        sent = self._send(pool, tasks, scores, suspects)
        for number, (chunk, future) in enumerate(sent):
            # Tasks still queued when a pool breaks never finish, so look up from time to time.
            while not future.done() and pool.active:
                wait([future], timeout=1.0)
            if future.cancelled():
                continue
            error = future.exception() if future.done() else BrokenProcessPool()
            if error is None:
                # Fewer results than items: the chunk's time was over, the others come next time.
                for index, results in zip(chunk, future.result(), strict=False):
                    scores[index] = self._to_scores(results, tasks[index].num_responses)
                    self.watch.add(scores[index])
            elif isinstance(error, TimeoutError | ProcessExpired) and len(chunk) == 1:
                if isinstance(error, TimeoutError):
                    self.watch.overrun()
                scores[chunk[0]] = [self._to_failure(error, tasks[chunk[0]])] * tasks[chunk[0]].num_responses
                self.watch.add(scores[chunk[0]])
            elif isinstance(error, TimeoutError | ProcessExpired):
                new_suspects.update(chunk)
                if isinstance(error, TimeoutError):
                    self.watch.overrun()
                    if self.watch.none_in_time:
                        # Perhaps everything hangs: find out with these, one by one, before the other chunks' time.
                        for _, later in sent[number + self.config.num_workers :]:
                            later.cancel()
            elif not isinstance(error, BrokenProcessPool):
                raise error  # ours: a worker turns every exception of a reward into words
        if pool.active:
            return new_suspects, False
        # A worker ended while none was at work, as far as Pebble knows: any of the items may be the cause.
        return {index for index in range(len(tasks)) if index not in scores}, True

    def _send(
        self, pool: ProcessPool, tasks: list[_Task], scores: dict[int, list[Score]], suspects: set[int]
    ) -> list[tuple[list[int], ProcessFuture]]:
        """Schedule suspects and groups one by one and the other items without score in chunks."""
        todo = [index for index in range(len(tasks)) if index not in scores]
        alone = [index for index in todo if index in suspects or tasks[index].num_responses > 1]
        others = [index for index in todo if index not in suspects and tasks[index].num_responses == 1]
        size = max(1, min(_MAX_CHUNK_SIZE, len(others) // (4 * self.config.num_workers)))
        chunks = [[index] for index in alone] + [others[i : i + size] for i in range(0, len(others), size)]
        sent: list[tuple[list[int], ProcessFuture]] = []
        for chunk in chunks:
            # An item that starts within _CHUNK_SECONDS still has its whole time limit before the chunk's is over.
            limit = self.config.time_limit * tasks[chunk[0]].num_responses + _CHUNK_SECONDS * (len(chunk) > 1)
            arguments = ([tasks[index].item for index in chunk], _CHUNK_SECONDS, limit)
            try:
                sent.append((chunk, pool.schedule(score_items, args=arguments, timeout=limit)))
            except RuntimeError:
                if pool.active:
                    raise
                break  # the pool broke meanwhile: the rest goes to the next one
        return sent

    def _to_scores(self, results: list[ItemResult], num_responses: int) -> list[Score]:
        """An item's scores; one result for all responses if the item could not even be read."""
        return [self._to_score(result) for result in (results if len(results) > 1 else results * num_responses)]

    def _to_score(self, result: ItemResult) -> Score:
        if result.error is None:
            return Score(result.reward, result.components)
        return Score(self._failure_reward, {}, "crash", result.error)

    def _to_failure(self, error: TimeoutError | ProcessExpired, task: _Task) -> Score:
        """Return the score of an item that overran or ended its worker."""
        if isinstance(error, TimeoutError):
            message = f"no reward within model.scoring.time_limit={self.config.time_limit:g} seconds"
            if task.num_responses > 1:
                message += f" for each of the group's {task.num_responses} responses"
            return Score(self._failure_reward, {}, "timeout", message)
        code = error.exitcode
        cause = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        return Score(self._failure_reward, {}, "crash", f"the reward ended its worker process with {cause}")

    def own_score(self, rollout: Rollout) -> Score:
        """The score of a rollout that needs no reward function: its environment's reward, or its failure."""
        if rollout.status == "failed":
            return Score(self._failure_reward, {}, "crash", rollout.failure)
        assert rollout.environment_reward is not None
        return Score(rollout.environment_reward, {"environment": rollout.environment_reward})

    @property
    def _failure_reward(self) -> float:
        """NaN marks a rollout to drop: it poisons whatever forgets to drop it."""
        return math.nan if self.config.failure_score == "drop" else self.config.failure_score


def needs_reward(rollout: Rollout) -> bool:
    """True unless the rollout's environment has rewarded it or failed."""
    return rollout.status != "failed" and rollout.environment_reward is None
