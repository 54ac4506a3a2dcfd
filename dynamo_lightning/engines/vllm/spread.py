"""Jobs spread over several servers, any of which may die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from dynamo_lightning.engines.vllm.client import ServerDown
from dynamo_lightning.errors import RunError

Job = TypeVar("Job")
Result = TypeVar("Result")
MAX_ATTEMPTS = 10
REVIVAL_SECONDS = 0.5
"""Seconds between attempts to revive a server."""


class Spread(Generic[Job, Result]):
    """Does jobs on several servers; what a server that dies leaves undone goes to the others, or waits for it.

    Every job has one result, whichever server it comes from and however often it was tried. When a job fails for good,
    or the whole is cancelled, the other jobs are cancelled too.

    Args:
        urls: The servers.
        work: Does a job on a server; raises `ServerDown` if that is down.
        revive: Makes a server that was down usable again; raises `ServerDown` while it is down.
        jobs_per_server: Jobs under way on a server at once.
        patience: Seconds to wait when all servers are down.
    """

    def __init__(
        self,
        urls: Sequence[str],
        work: Callable[[str, Job], Awaitable[Result]],
        revive: Callable[[str], Awaitable[None]],
        *,
        jobs_per_server: int,
        patience: float,
    ) -> None:
        self.urls = list(urls)
        self.work = work
        self.revive = revive
        self.jobs_per_server = jobs_per_server
        self.patience = patience

    async def run(self, jobs: Sequence[Job]) -> list[Result]:
        """The results, in the order of the jobs; called once.

        Raises:
            RunError: If all servers are down for too long, or a job fails again and again.
        """
        self._jobs = jobs
        self._todo: asyncio.Queue[int] = asyncio.Queue()
        for index in range(len(jobs)):
            self._todo.put_nowait(index)
        self._results: dict[int, Result] = {}
        self._attempts = [0] * len(jobs)
        self._down: dict[str, tuple[float, str]] = {}
        """Time of each server's first failure and its message, until it is revived."""
        self._reviving = {url: asyncio.Lock() for url in self.urls}
        if not jobs:
            return []
        workers = [self._serve(url) for _ in range(min(self.jobs_per_server, len(jobs))) for url in self.urls]
        tasks = [asyncio.create_task(coroutine) for coroutine in (*workers, self._watch())]
        try:
            # Workers end by an exception only; the watch ends with the last result.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [self._results[index] for index in range(len(jobs))]

    async def _watch(self) -> None:
        """Wait for the last result.

        Raises:
            RunError: If no server has been there for too long.
        """
        self._finished = asyncio.Event()
        while not self._finished.is_set():
            try:
                await asyncio.wait_for(self._finished.wait(), 0.2)
            except TimeoutError:
                self._give_up()

    def _give_up(self) -> None:
        if len(self._down) < len(self.urls):
            return
        since, message = max(self._down.values())
        if time.monotonic() - since > self.patience:
            raise RunError(
                f"all {len(self.urls)} vLLM servers have been down for {self.patience:.0f} s with "
                f"{len(self._jobs) - len(self._results)} of {len(self._jobs)} responses missing (last: {message}): "
                "start them again or correct model.generator.urls; model.generator.patience is how long to wait"
            )

    async def _serve(self, url: str) -> None:
        """Jobs on one server, one after the other, until cancelled."""
        while True:
            if url in self._down:
                await self._revive(url)
            index = await self._todo.get()
            if url in self._down:  # since this worker began to wait
                self._todo.put_nowait(index)
                continue
            try:
                self._results[index] = await self.work(url, self._jobs[index])
            except ServerDown as error:
                self._leave(url, index, str(error))
            if len(self._results) == len(self._jobs):
                self._finished.set()

    def _leave(self, url: str, index: int, message: str) -> None:
        """Put a job back that a server did not finish."""
        self._down.setdefault(url, (time.monotonic(), message))
        self._attempts[index] += 1
        if self._attempts[index] >= MAX_ATTEMPTS:
            raise RunError(f"a response failed {MAX_ATTEMPTS} times on the vLLM servers, the last time by {message}")
        self._todo.put_nowait(index)

    async def _revive(self, url: str) -> None:
        """Wait until a server that was down can be used again; one worker tries, the others wait for it."""
        async with self._reviving[url]:
            while url in self._down:
                try:
                    await self.revive(url)
                    del self._down[url]
                except ServerDown:
                    await asyncio.sleep(REVIVAL_SECONDS)
