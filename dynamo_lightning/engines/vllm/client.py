"""Requests to vLLM servers, and jobs spread over several of them, any of which may die."""

from __future__ import annotations

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
BACK_OFF = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds between one attempt and the next; the last one goes on."""
MAX_ATTEMPTS = 10


class ServerDown(Exception):
    """No answer, or one that says that the server itself failed: worth another attempt, or another server."""


class ServerRefused(RuntimeError):
    """An answer that says that the request is wrong; asking again would not help."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def call(url: str, path: str, body: Mapping[str, Any] | None = None, *, time_limit: float) -> Any:
    """One HTTP request with a JSON answer: POST with a body, else GET.

    Args:
        url: Of the server, such as `http://localhost:8000`.
        path: On the server.
        body: To send as JSON.
        time_limit: Seconds without a sign of life after which the server counts as down.

    Raises:
        ServerDown: If there is no answer, or a status from 500 on.
        ServerRefused: For any other status that is not 200.
    """
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=time_limit) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        words = error.read().decode(errors="replace")[:500]
        if error.code >= 500:
            raise ServerDown(f"{url}{path}: status {error.code}: {words}") from error
        raise ServerRefused(error.code, f"{url}{path}: status {error.code}: {words}") from error
    except (OSError, EOFError, urllib.error.URLError) as error:  # refused, reset, timed out, cut off
        raise ServerDown(f"{url}{path}: {error}") from error
    except Exception as error:  # http.client's own, for an answer that breaks off
        if type(error).__module__ != "http.client":
            raise
        raise ServerDown(f"{url}{path}: {type(error).__name__}: {error}") from error
    return json.loads(content) if content else None


def retry(attempt: Callable[[], Result], patience: float) -> Result:
    """The first result of an attempt that does not find the server down.

    Args:
        attempt: What to do.
        patience: Seconds after which to give up.

    Raises:
        ServerDown: The last attempt's.
    """
    give_up = time.monotonic() + patience
    for number in range(10**9):
        try:
            return attempt()
        except ServerDown:
            pause = BACK_OFF[min(number, len(BACK_OFF) - 1)]
            if time.monotonic() + pause > give_up:
                raise
            time.sleep(pause)
    raise AssertionError


class Spread(Generic[Job, Result]):
    """Does jobs on several servers; what a server that dies leaves undone goes to the others, or waits for it.

    Every job has one result, whichever server it comes from and however often it was tried.

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
        work: Callable[[str, Job], Result],
        revive: Callable[[str], None],
        *,
        jobs_per_server: int,
        patience: float,
    ) -> None:
        self.urls = list(urls)
        self.work = work
        self.revive = revive
        self.jobs_per_server = jobs_per_server
        self.patience = patience

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """The results, in the order of the jobs.

        Raises:
            RunError: If all servers are down for too long, or a job fails again and again.
        """
        self._jobs = jobs
        self._todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(jobs)):
            self._todo.put(index)
        self._results: dict[int, Result] = {}
        self._attempts = [0] * len(jobs)
        self._error: Exception | None = None
        self._down: dict[str, tuple[float, str]] = {}
        self._changed = threading.Condition()
        self._reviving = {url: threading.Lock() for url in self.urls}
        num_threads = min(self.jobs_per_server, len(jobs))
        threads = [
            threading.Thread(target=self._serve, args=(url,), daemon=True)
            for _ in range(num_threads)
            for url in self.urls
        ]
        for thread in threads:
            thread.start()
        with self._changed:
            while not self._finished():
                self._changed.wait(0.5)
                self._give_up()
        if self._error is not None:
            raise self._error
        for thread in threads:
            thread.join()
        return [self._results[index] for index in range(len(jobs))]

    def _finished(self) -> bool:
        return self._error is not None or len(self._results) == len(self._jobs)

    def _give_up(self) -> None:
        """End with an error when no server has been there for too long; called with the lock."""
        if len(self._down) < len(self.urls) or self._error is not None:
            return
        since, message = max(self._down.values())
        if time.monotonic() - since > self.patience:
            self._error = RuntimeError(
                f"all {len(self.urls)} vLLM servers have been down for {self.patience:.0f} s with "
                f"{len(self._jobs) - len(self._results)} of {len(self._jobs)} responses missing (last: {message}): "
                "start them again or correct model.generator.urls; model.generator.patience is how long to wait"
            )

    def _serve(self, url: str) -> None:
        """One thread: jobs on one server, until all are done."""
        while not self._finished():
            if url in self._down and not self._revived(url):
                continue
            try:
                index = self._todo.get(timeout=0.1)
            except queue.Empty:
                continue
            try:
                result = self.work(url, self._jobs[index])
            except ServerDown as error:
                self._leave(url, index, str(error))
                continue
            except Exception as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            with self._changed:
                self._results[index] = result
                self._changed.notify_all()

    def _leave(self, url: str, index: int, message: str) -> None:
        """Give a job back that a server did not finish."""
        with self._changed:
            self._down.setdefault(url, (time.monotonic(), message))
            self._attempts[index] += 1
            if self._attempts[index] >= MAX_ATTEMPTS:
                self._error = self._error or RuntimeError(
                    f"a response failed {MAX_ATTEMPTS} times on the vLLM servers, the last time by {message}"
                )
        self._todo.put(index)

    def _revived(self, url: str) -> bool:
        """Whether a server that was down can be used again; one thread tries, the others wait."""
        if not self._reviving[url].acquire(blocking=False):
            time.sleep(0.1)
            return False
        try:
            if url not in self._down:
                return True
            self.revive(url)
            with self._changed:
                del self._down[url]
            return True
        except ServerDown:
            time.sleep(0.5)
            return False
        except Exception as error:
            with self._changed:
                self._error = self._error or error
            return False
        finally:
            self._reviving[url].release()
