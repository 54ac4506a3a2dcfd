"""Code of the scorer's worker processes. It imports no torch: a worker starts fast and stays small."""

from __future__ import annotations

import gc
import math
import os
import pickle
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dynamo_lightning.errors import RunError
from dynamo_lightning.rewards.calling import resolve, to_number
from dynamo_lightning.rewards.reward import (
    Components,
    Reward,
    columns_on_request,
    describe_reward,
    without_arguments,
)

MAX_MESSAGE_CHARACTERS = 500
_PARENT_CHECK_SECONDS = 1.0
_ALARM_GRACE_SECONDS = 2.0

_reward: Reward | Exception = RuntimeError("the worker was not initialized")
_free_memory_above: float = math.inf
"""Bytes of address space from which on the reward is asked to empty its caches."""


class Item(NamedTuple):
    """One response to score, or all responses of a group, in plain types."""

    prompt: str
    responses: Sequence[str]
    """One, or those of a group, `[group_size]`."""
    answers: Sequence[str]
    """Every accepted reference answer, at least one."""
    columns: Sequence[Mapping[str, Any]]
    """Columns of each response, `[group_size]`."""
    is_group: bool = False


class ItemResult(NamedTuple):
    """The reward of one response, or the exception that came instead of it."""

    reward: float
    components: dict[str, float]
    error: str | None = None


def initialize(pickled_reward: bytes, parent_pid: int, memory_limit_gb: float | None) -> None:
    """Prepare a new worker; what takes long happens here, before any item's clock runs.

    Args:
        pickled_reward: The reward. It is unpickled here, so that a failure reaches the user as a message.
        parent_pid: The process to follow to its end.
        memory_limit_gb: Memory in GiB that rewards may take beyond what the warm worker has; None for no limit.
    """
    global _reward
    # Pebble already ignores SIGINT (the parent handles Ctrl-C). Its SIGTERM handler is Python code, which has to wait
    # for a long call into C to return: restore the immediate end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(parent_pid,), daemon=True).start()
    try:
        reward: Reward = pickle.loads(pickled_reward)
        reward.warm_up()
        _reward = reward
    except Exception as error:  # a worker that fails to start would be restarted forever: every item reports it instead
        _reward = error
    if memory_limit_gb is not None and sys.platform == "linux":
        _limit_memory(int(memory_limit_gb * 2**30))


def score_items(items: list[bytes], stop_after: float, alarm_after: float) -> list[list[ItemResult]]:
    """Score pickled items in order.

    Args:
        items: Each one a pickled `Item`.
        stop_after: Seconds after which no further item is started: the result may be shorter than `items`.
        alarm_after: Seconds after which the parent kills this worker. A little later the kernel does, in case that the
            parent is gone and this worker deep in C code, where no Python thread of its own could notice.

    Returns:
        For each item that was started the results of its responses.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, alarm_after + _ALARM_GRACE_SECONDS)
    start = time.monotonic()
    results: list[list[ItemResult]] = []
    for item in items:
        if results and time.monotonic() - start > stop_after:
            break
        results.append(_score_item(item))
        # What untrusted items leave in caches must not be counted against the items that come after them.
        if _used_memory() > _free_memory_above and isinstance(_reward, Reward):
            _reward.free_memory()
            gc.collect()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return results


def _score_item(pickled_item: bytes) -> list[ItemResult]:
    """Compute and check the rewards of one item; any exception becomes a message."""
    try:
        item: Item = pickle.loads(pickled_item)
    except BaseException as error:  # a column that cannot be unpickled here
        return [ItemResult(math.nan, {}, _describe(error))]
    try:
        if isinstance(_reward, Exception):
            raise RunError("the reward could not be set up") from _reward
        return best_of_answers(_reward, item)
    except BaseException as error:  # not only Exception: sys.exit() in a reward must not end the training process
        return [ItemResult(math.nan, {}, _describe(error, item))] * len(item.responses)


def best_of_answers(reward: Reward, item: Item) -> list[ItemResult]:
    """The results of an item's responses; with several accepted answers each response's best.

    A reward that asks for the column `answers` is called once, with the first of them as `answer`.
    """
    answers = item.answers[:1] if "answers" in columns_on_request(reward) else item.answers
    best = [ItemResult(math.nan, {}, "no answer")] * len(item.responses)
    for number, answer in enumerate(answers):
        for position, result in enumerate(_results(reward, item, answer)):
            kept = best[position]
            if number == 0 or result.error is not None or (kept.error is None and result.reward > kept.reward):
                best[position] = result if number == 0 or kept.error is None else kept
    return best


def _results(reward: Reward, item: Item, answer: str) -> list[ItemResult]:
    """The results of an item's responses against one reference answer."""
    columns = [without_arguments(own) for own in item.columns]
    parts: Sequence[Components]
    if item.is_group:
        parts = reward.group_components(item.prompt, item.responses, answer, columns)
    else:
        parts = [resolve(reward.components(item.prompt, item.responses[0], answer, **columns[0]))]
    results = []
    for part in parts:
        if isinstance(part, Exception):
            results.append(ItemResult(math.nan, {}, _describe(part, item)))
            continue
        numbers = {name: to_number(name, value) for name, value in part.items()}
        components = {name: value for name, value in numbers.items() if value is not None}
        if not components:
            results.append(ItemResult(math.nan, {}, f"no reward applies: {describe_reward(reward)} returned None"))
            continue
        total = to_number("total", reward.total(components))
        if total is None:
            raise TypeError(f"total of {describe_reward(reward)} must be a finite number, got None")
        results.append(ItemResult(total, components))
    return results


def _describe(error: BaseException, item: Item | None = None) -> str:
    """Return the exception with its cause and the line that raised it, in one line of limited length."""
    message = " ".join("".join(traceback.format_exception_only(error)).split())
    if item is not None and item.columns and isinstance(error, KeyError) and error.args and _may_be_column(error):
        message += f"; the row's columns: {', '.join(sorted(map(str, item.columns[0])))}"
    if error.__cause__ is not None:
        return f"{message}: {_describe(error.__cause__)}"[:MAX_MESSAGE_CHARACTERS]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return message[: MAX_MESSAGE_CHARACTERS - len(place)] + place


def _may_be_column(error: KeyError) -> bool:
    """True if a lookup may have failed for want of a column: by its name, or with the `None` that stood for it."""
    return error.args[0] is None or str(error.args[0]).isidentifier()


def _end_with_parent(parent_pid: int) -> None:
    """Kill this process when its parent is gone, even by SIGKILL, after which nobody is left to stop it."""
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_CHECK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _used_memory() -> int:
    """Return the address space in use, bytes; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _limit_memory(num_bytes: int) -> None:
    """Limit the address space to `num_bytes` more than now: what is loaded by now depends on the user's main module."""
    global _free_memory_above
    used = _used_memory()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + num_bytes if hard == resource.RLIM_INFINITY else min(used + num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    _free_memory_above = (used + limit) / 2
