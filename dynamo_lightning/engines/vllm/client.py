"""HTTP client of vLLM servers: one event loop in one thread, and one pool of connections that stay open."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dynamo_lightning.errors import RunError

if TYPE_CHECKING:
    import httpx2

Result = TypeVar("Result")
BACK_OFF = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds between one attempt and the next; the last one goes on."""
IDLE_SECONDS = 2.0
"""Seconds after which an idle connection is closed: servers close theirs after 5 (vLLM's default), and a request that
crosses with that would look like a server that died."""


class ServerDown(Exception):
    """No answer, or one that says that the server itself failed: worth another attempt, or another server."""


class ServerRefused(RunError):
    """An answer that says that the request is wrong; asking again would not help."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ServerClient:
    """Requests to vLLM servers, by an event loop in a thread of its own.

    Any thread may call; coroutines given to `run` share the loop and the pool. A request that is cancelled closes its
    connection, by which vLLM notices that nobody waits any more, and stops generating.

    Args:
        max_connections: Connections to all servers together.
    """

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self._loop = asyncio.new_event_loop()
        self._http: httpx2.AsyncClient | None = None
        self._running = set[concurrent.futures.Future[Any]]()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-client", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Result of a coroutine; an exception in the caller, such as Ctrl-C, cancels it.

        Raises:
            RunError: If the client is closed meanwhile, or was before.
        """
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RunError("the connections to the vLLM servers are closed: the run has ended")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._running.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RunError("requests to the vLLM servers were cancelled: the run ends") from None
        finally:
            future.cancel()  # does nothing when it is done
            with self._lock:
                self._running.discard(future)

    def call(self, url: str, path: str, body: Mapping[str, Any] | None = None, *, time_limit: float) -> Any:
        """`request`, for callers outside the event loop."""
        return self.run(self.request(url, path, body, time_limit=time_limit))

    async def request(self, url: str, path: str, body: Mapping[str, Any] | None = None, *, time_limit: float) -> Any:
        """One HTTP request with a JSON answer: POST with a body, else GET.

        Args:
            url: Of the server, such as `http://localhost:8000`.
            path: On the server.
            body: Sent as JSON.
            time_limit: Seconds without a sign of life after which the server counts as down; a wait for a free
                connection of the pool does not count.

        Raises:
            ServerDown: If there is no answer, or a status from 500 on.
            ServerRefused: For any other status that is not of success, or an answer that is not JSON.
        """
        import httpx2

        if self._http is None:  # within the loop, so that the pool belongs to it
            limits = httpx2.Limits(
                max_connections=self.max_connections,
                max_keepalive_connections=self.max_connections,
                keepalive_expiry=IDLE_SECONDS,
            )
            self._http = httpx2.AsyncClient(limits=limits, follow_redirects=True)
        timeout = httpx2.Timeout(time_limit, pool=None)
        try:
            if body is None:
                response = await self._http.get(url + path, timeout=timeout)
            else:
                response = await self._http.post(url + path, json=body, timeout=timeout)
        except httpx2.RequestError as error:  # refused, reset, timed out, cut off
            raise ServerDown(f"{url}{path}: {type(error).__name__}: {error}") from error
        if response.status_code >= 500:
            raise ServerDown(f"{url}{path}: status {response.status_code}: {response.text[:500]}")
        if not response.is_success:
            message = f"{url}{path}: status {response.status_code}: {response.text[:500]}"
            raise ServerRefused(response.status_code, message)
        try:
            return response.json() if response.content else None
        except ValueError as error:
            message = f"{url}{path}: the answer is not JSON: {response.text[:100]!r}"
            raise ServerRefused(response.status_code, message) from error

    def close(self) -> None:
        """Cancel what is under way, close the connections, and end the thread; can be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for future in self._running:
                future.cancel()
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        """Wait for cancelled tasks, which close their connections, then close the idle ones."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()


def retry(attempt: Callable[[], Result], patience: float) -> Result:
    """The first result of an attempt that does not find the server down.

    Args:
        attempt: Called until it succeeds.
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
