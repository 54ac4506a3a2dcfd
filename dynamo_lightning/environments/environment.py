"""The interface of environments, which answer the policy in a conversation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynamo_lightning.types import IntArray, Prompt

Message = Mapping[str, str]
"""A chat message with `role` and `content`, as chat templates take them."""


@dataclass(frozen=True, eq=False)
class Response:
    """A response of the policy in one turn."""

    text: str
    """Decoded without special tokens."""
    token_ids: IntArray
    """As it was sampled, `[response_length]`."""
    finished: bool
    """False if the length limit cut it off; the conversation ends then, whatever the environment returns."""


@dataclass(frozen=True)
class Step:
    """The environment's answer to a response.

    Example:
        `Step([{"role": "user", "content": "Wrong, try again."}])`, `Step(reward=1.0)`, `Step()`
    """

    observation: str | Sequence[Message] | None = None
    """Next thing that the policy reads: chat messages, which the tokenizer's chat template renders, or a text as
    it is; `None` ends the conversation."""
    reward: float | None = None
    """Added to the rollout's reward; `None` adds nothing. If no step gives a reward, `model.reward` does."""


class Environment(ABC):
    """Plays one conversation: `reset`, then a `step` after each response of the policy, then `close`.

    Every rollout has a copy of its own of the object that was configured, made before `reset`: attributes may hold the
    state of the conversation. Steps of different rollouts run in threads side by side. What an observation says is
    never trained on. An exception ends the rollout: it counts as a reward that failed, as `model.scoring` says.

    Observations count towards `model.sampling.max_response_length`: one that leaves no token for a response ends the
    rollout, which is truncated then.

    Example:
        An environment that lets the policy try again:

        ```python
        class TryAgain(Environment):
            def __init__(self, tries: int = 3) -> None:
                self.tries = tries

            def reset(self, prompt: Prompt) -> None:
                self.answer = prompt.answer

            def step(self, response: Response) -> Step:
                self.tries -= 1
                if self.answer in response.text or self.tries == 0:
                    return Step(reward=float(self.answer in response.text))
                return Step([{"role": "user", "content": "Wrong, try again."}])
        ```
    """

    def reset(self, prompt: Prompt) -> None:  # noqa: B027  # not every environment has something to begin
        """Begin a conversation; the policy is going to read the prompt."""

    @abstractmethod
    def step(self, response: Response) -> Step:
        """Answer a response: by an observation, or the end; and perhaps a reward."""

    def close(self) -> None:  # noqa: B027
        """Release what the conversation held; called once, also after an exception."""
