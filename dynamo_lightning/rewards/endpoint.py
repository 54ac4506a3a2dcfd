"""A reward that a web service computes: a reward model, a sandbox, another team's verifier."""

from __future__ import annotations

import json
import math
from typing import Any

from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.posting import check_endpoint, post
from dynamo_lightning.rewards.reward import Reward

_MAX_REPLY_BYTES = 65536


class HttpReward(Reward):
    """Sends each response to an HTTP endpoint and takes the number that comes back.

    The endpoint gets a POST with the JSON object `{"prompt", "response", "answer", "columns"}` and answers with a
    number or an object that has it under `key`. A refused or broken connection and the statuses 429 and 5xx are tried
    again; a reply that is no such number is a crash of this rollout's reward, with the reply in its message, as is
    every other status. An endpoint that hangs costs `timeout` for each attempt and is stopped by
    `model.scoring.time_limit` at the latest. Each reward process waits for its own replies: with a slow endpoint, raise
    `model.scoring.num_workers`.

    Args:
        url: Where to send it; http or https.
        key: Name of the number in the reply.
        timeout: Seconds without a byte after which an attempt fails.
        attempts: How often to try, at least 1.
        headers: Further headers, such as an authorization.

    Raises:
        UserError: If the URL is none, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        key: str = "reward",
        timeout: float = 2.0,
        attempts: int = 2,
        headers: dict[str, str] | None = None,
    ) -> None:
        check_endpoint("HttpReward", url, timeout, attempts)
        self.url = url
        self.key = key
        self.timeout = timeout
        self.attempts = attempts
        self.headers = headers

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Return the endpoint's number."""
        content = {"prompt": prompt, "response": response, "answer": answer, "columns": columns}
        return post(self.url, content, self.headers, self.timeout, self.attempts, _MAX_REPLY_BYTES, self._read)

    def _read(self, reply: bytes) -> float:
        """Return the number in a reply."""
        try:
            value = json.loads(reply)
        except ValueError:  # no JSON, no UTF-8, or cut off
            value = None
        if isinstance(value, dict):
            value = value.get(self.key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"{self.url} must reply with a finite number or an object with one under {self.key!r}, "
                f"got {reply[:80]!r}"
            )
        return float(value)
