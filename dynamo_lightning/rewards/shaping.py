"""Rewards by something else than the answer: format and length, alone for a weighted sum or around another reward."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.combined import CombinedReward
from dynamo_lightning.rewards.math import last_boxed
from dynamo_lightning.rewards.reward import Components, Reward, without_arguments


class FormatReward(Reward):
    r"""1 if the response has the wanted form, else 0.

    A response begins where its prompt ends. Where the template already opens a tag, as those that end with `<think>`
    do, the response is also tried with that tag before it; and where the tokenizer has special tokens, such as a
    `</think>` that decoding leaves out, also with these: it has the form if one of these texts has.

    Args:
        pattern: Regular expression that the whole response must match, with `.` for line ends too, such as
            `<think>.*</think>.*\\boxed\{.*\}.*`; `null` wants one complete `\boxed{…}` anywhere.

    Raises:
        UserError: If the pattern is no regular expression.
    """

    wants = frozenset({"prompt_text", "response_with_special_tokens"})

    def __init__(self, pattern: str | None = None) -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL) if pattern is not None else None
        except re.error as error:
            raise UserError(f"pattern={pattern!r} is no regular expression: {error}") from None
        self.pattern = pattern

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Return 1.0 or 0.0."""
        if self._pattern is None:
            return float(last_boxed(response) is not None)
        opened = opened_tag(columns.get("prompt_text", ""))
        texts = [response, columns.get("response_with_special_tokens", response)]
        candidates = dict.fromkeys(before + text for text in texts for before in ("", opened))
        return float(any(self._pattern.fullmatch(text.strip()) for text in candidates))


_OPENED_TAG = re.compile(r"(?:<(?![/|])[^<>\s]+>|<\|(?:START|begin)[^<>\s|]*\|>|\[[A-Z]+\])\s*\Z")


def opened_tag(prompt_text: str) -> str:
    """The tag that a prompt's text ends with, such as `<think>` and a line end; empty if it ends with none."""
    match = _OPENED_TAG.search(prompt_text)
    return match[0] if match else ""


class LengthPenalty(Reward):
    """`−min(1, max(0, n − free) / (L − free))` for a response of `n` tokens under the limit `L`.

    That is 0 up to `free` and −1 at `L`, for a weighted sum with a reward of the answer. Keep its weight below the
    success threshold's distance from 1, or long right responses no longer count as success.

    Args:
        free_length: `free`, tokens that cost nothing.
        max_response_length: `L`; `null` takes the limit of the run, `model.sampling.max_response_length`.

    Raises:
        UserError: If a length is negative or the limit is not above the free length.
    """

    def __init__(self, free_length: int = 0, max_response_length: int | None = None) -> None:
        if free_length < 0 or (max_response_length is not None and max_response_length <= free_length):
            raise UserError(
                "LengthPenalty needs 0 ≤ free_length < max_response_length, got "
                f"{free_length} and {max_response_length}"
            )
        self.free_length = free_length
        self.max_response_length = max_response_length

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Return the penalty, in [−1, 0]; ValueError if a length is missing or the limit too small."""
        length, limit = _lengths("LengthPenalty", columns, self.max_response_length)
        if limit <= self.free_length:
            raise UserError(f"LengthPenalty's free_length={self.free_length} is not below the limit of {limit} tokens")
        return -min(1.0, max(0.0, (length - self.free_length) / (limit - self.free_length)))


class OverlongShaping(CombinedReward):
    """Adds DAPO's soft punishment of overlong responses to a reward (arXiv 2503.14476, section 3.4).

    With `L` the length limit and `C = buffer_share · L`, a response of `n` tokens gets `max(−1, min(0, (L − C − n)/C))`
    times the weight: nothing up to `L − C`, then linearly down to −1 at the limit. A response that the limit cut off
    thus loses as much as a right answer wins, and one that came close is warned.

    Needs the columns `response_length` and, unless the option is set, `max_response_length`, both in tokens; the scorer
    adds them. Beside the wrapped reward's own components, `overlong` is the punishment before its weight.

    Args:
        reward: The reward to shape.
        buffer_share: C as a share of the limit; DAPO has 4,096 of 20,480 tokens.
        weight: Factor of the punishment.
        max_response_length: L; `null` takes the limit of the run, `model.sampling.max_response_length`.

    Raises:
        UserError: If the share is not in (0, 1], the weight is negative, the limit below 1, or the wrapped reward has
            a component called `overlong` itself.
    """

    def __init__(
        self, reward: Reward, buffer_share: float = 0.2, weight: float = 1.0, max_response_length: int | None = None
    ) -> None:
        if not 0 < buffer_share <= 1 or weight < 0 or (max_response_length is not None and max_response_length < 1):
            raise UserError(
                "overlong shaping needs buffer_share in (0, 1], weight ≥ 0 and max_response_length ≥ 1, got "
                f"{buffer_share}, {weight} and {max_response_length}"
            )
        self.reward = reward
        self.buffer_share = buffer_share
        self.weight = weight
        self.max_response_length = max_response_length

    @property
    def name(self) -> str:
        """The wrapped reward's name: it is still that reward, shaped."""
        return self.reward.name

    @property
    def parts(self) -> Sequence[Reward]:
        """The wrapped reward."""
        return (self.reward,)

    def components(self, prompt: str, response: str, answer: str, **columns: Any) -> dict[str, float]:
        """Return the wrapped reward's components, and `overlong`; nothing if the wrapped reward does not apply."""
        parts = self.reward.components(prompt, response, answer, **without_arguments(columns))
        return self._shaped(parts, columns)

    def group_components(
        self, prompt: str, responses: Sequence[str], answer: str, columns: Sequence[Mapping[str, Any]]
    ) -> list[Components]:
        """See the base class."""
        parts = self.reward.group_components(prompt, responses, answer, columns)
        return [
            part if isinstance(part, Exception) else self._shaped(part, own)
            for part, own in zip(parts, columns, strict=True)
        ]

    def _shaped(self, parts: dict[str, float], columns: Mapping[str, Any]) -> dict[str, float]:
        if "overlong" in parts:
            raise UserError("the wrapped reward has a component called 'overlong' already: it is shaped twice")
        return {**parts, "overlong": self.punishment(columns)} if parts else {}

    def total(self, components: Mapping[str, float]) -> float:
        """Return the wrapped reward's total plus the weighted punishment."""
        parts = {name: value for name, value in components.items() if name != "overlong"}
        return self.reward.total(parts) + self.weight * components["overlong"]

    def punishment(self, columns: Mapping[str, Any]) -> float:
        """Return the punishment of a response from its length, in [−1, 0].

        Raises:
            UserError: If a length is missing.
        """
        length, limit = _lengths("overlong shaping", columns, self.max_response_length)
        buffer = self.buffer_share * limit
        return max(-1.0, min(0.0, (limit - buffer - length) / buffer))


def _lengths(name: str, columns: Mapping[str, Any], max_response_length: int | None) -> tuple[int, int]:
    """Return a response's length and its limit, tokens; ValueError if one is missing."""
    limit = max_response_length or columns.get("max_response_length")
    if limit is None or "response_length" not in columns:
        raise UserError(
            f"{name} needs the columns response_length and max_response_length, got {sorted(columns)}: score rollouts "
            "with RewardScorer, or pass them"
        )
    return columns["response_length"], limit
