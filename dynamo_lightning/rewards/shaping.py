"""Rewards that wrap another reward and shape it by something else than the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_lightning.rewards.reward import Reward


class OverlongShaping(Reward):
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
        ValueError: If the share is not in (0, 1], the weight is negative, the limit below 1, or the wrapped reward has
            a component called `overlong` itself.
    """

    def __init__(
        self, reward: Reward, buffer_share: float = 0.2, weight: float = 1.0, max_response_length: int | None = None
    ) -> None:
        if not 0 < buffer_share <= 1 or weight < 0 or (max_response_length is not None and max_response_length < 1):
            raise ValueError(
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

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Return the shaped reward."""
        return self.total(self.components(prompt, response, answer, **columns))

    def components(self, prompt: str, response: str, answer: str, **columns: Any) -> dict[str, float]:
        """Return the wrapped reward's components, and `overlong`."""
        parts = self.reward.components(prompt, response, answer, **columns)
        if "overlong" in parts:
            raise ValueError("the wrapped reward has a component called 'overlong' already: it is shaped twice")
        return {**parts, "overlong": self.punishment(columns)}

    def total(self, components: Mapping[str, float]) -> float:
        """Return the wrapped reward's total plus the weighted punishment."""
        parts = {name: value for name, value in components.items() if name != "overlong"}
        return self.reward.total(parts) + self.weight * components["overlong"]

    def punishment(self, columns: Mapping[str, Any]) -> float:
        """Return the punishment of a response from its length, in [−1, 0].

        Raises:
            ValueError: If a length is missing.
        """
        limit = self.max_response_length or columns.get("max_response_length")
        if limit is None or "response_length" not in columns:
            raise ValueError(
                "overlong shaping needs the columns response_length and max_response_length, got "
                f"{sorted(columns)}: score rollouts with RewardScorer, or pass them"
            )
        buffer = self.buffer_share * limit
        return max(-1.0, min(0.0, (limit - buffer - columns["response_length"]) / buffer))

    def check_answer(self, answer: str) -> None:
        """Check the answer with the wrapped reward."""
        self.reward.check_answer(answer)

    def warm_up(self) -> None:
        """Warm up the wrapped reward."""
        self.reward.warm_up()

    def free_memory(self) -> None:
        """Empty the wrapped reward's caches."""
        self.reward.free_memory()
