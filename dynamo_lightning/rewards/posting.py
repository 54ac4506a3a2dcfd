"""POST requests with JSON, tried again where that may help; the base of rewards that a service computes."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dynamo_lightning.errors import RunError, UserError

T = TypeVar("T")

_FIRST_PAUSE = 0.1  # seconds before the second attempt, doubled before each further one


class Busy(Exception):
    """The endpoint asks to be tried again."""


def check_endpoint(name: str, url: str, timeout: float, attempts: int) -> None:
    """Check the settings of an endpoint.

    Raises:
        UserError: If the URL is none, or a number is out of range.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise UserError(f"url={url!r} must begin with http:// or https:// and a host")
    if not timeout > 0 or attempts < 1:
        raise UserError(f"{name} needs timeout > 0 and attempts ≥ 1, got {timeout} and {attempts}")


def post(
    url: str,
    content: Any,
    headers: dict[str, str] | None,
    timeout: float,
    attempts: int,
    max_bytes: int,
    read: Callable[[bytes], T],
) -> T:
    """Post JSON and read the reply.

    Args:
        url: Where to.
        content: What JSON can hold; anything else in it becomes text.
        headers: Further headers.
        timeout: Seconds without a byte after which an attempt fails.
        attempts: How often to try.
        max_bytes: Bytes of the reply that are read.
        read: Makes the result of the reply's body; raises `Busy` to have another try.

    Raises:
        RunError: If no attempt succeeds, or the endpoint refuses.
    """
    # A response may hold half a surrogate pair, which UTF-8 has no place for; JSON's escapes have.
    body = json.dumps(content, default=str).encode("ascii")
    pause = _FIRST_PAUSE
    for attempt in range(attempts):
        try:
            return read(_post_once(url, body, headers, timeout, max_bytes))
        except (OSError, Busy) as error:
            if attempt + 1 == attempts:
                raise RunError(f"no reward from {url} in {attempts} attempts: {error}") from None
        time.sleep(pause)
        pause *= 2
    raise AssertionError("the last attempt returns or raises")


def _post_once(url: str, body: bytes, headers: dict[str, str] | None, timeout: float, max_bytes: int) -> bytes:
    """The reply's body, its first bytes."""
    sent = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data=body, headers=sent, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return reply.read(max_bytes)
    except urllib.error.HTTPError as error:
        if error.code == 429 or error.code >= 500:
            raise Busy(f"status {error.code}") from None
        raise RunError(f"{url} refused a response with status {error.code}") from None
