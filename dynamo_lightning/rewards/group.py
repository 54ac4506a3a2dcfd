"""Rewards of a whole group: all responses of one prompt are judged together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.calling import (
    GROUP_ARGUMENTS,
    CallSignature,
    read_signature,
    resolve,
    signature_of_class,
    to_numbers,
)
from dynamo_lightning.rewards.reward import Components, Reward, _import_function

PER_RESPONSE = ("response_length", "response_with_special_tokens")
"""Columns that differ within a group: a group reward gets them as lists, `[group_size]`."""


class GroupReward(Reward):
    """Base class of rewards that see all responses of one prompt at once, such as a ranking or a diversity bonus.

    A group is complete before it is scored: responses that were sampled on several processes, or in several batches of
    the engine, are gathered first. With `data.pilot`, the pilot's responses and those that follow are two groups. The
    time limit of a group is `model.scoring.time_limit` times its number of responses; if the reward hangs or raises, it
    fails for the whole group.
    """

    needs_group = True

    @property
    def signature(self) -> CallSignature:
        """The columns that `__call__` takes."""
        return signature_of_class(type(self), GROUP_ARGUMENTS)

    @abstractmethod
    def __call__(  # type: ignore[override]  # a group instead of one response
        self, prompt: str, responses: list[str], answer: str, **columns: Any
    ) -> Sequence[float | None]:
        """Return the reward of each response.

        Args:
            prompt: The question as the data set states it.
            responses: The decoded responses, `[group_size]`, by sample index.
            answer: The reference answer.
            **columns: As of any reward; `response_length` and `response_with_special_tokens` are lists, `[group_size]`.

        Returns:
            `[group_size]`: a list, tuple or array of finite numbers, `None` where the reward does not apply.
        """

    def components(self, prompt: str, response: str, answer: str, **columns: Any) -> dict[str, float]:
        """The reward of a response that is a group by itself."""
        (result,) = self.group_components(prompt, [response], answer, [columns])
        if isinstance(result, Exception):
            raise result
        return result

    def group_components(
        self, prompt: str, responses: Sequence[str], answer: str, columns: Sequence[Mapping[str, Any]]
    ) -> list[Components]:
        """See the base class."""
        shared = {name: value for name, value in columns[0].items() if name not in PER_RESPONSE}
        lists = {name: [own[name] for own in columns] for name in PER_RESPONSE if name in columns[0]}
        given = self.signature.select({**shared, **lists})
        try:
            values = to_numbers(self.name, resolve(self(prompt, list(responses), answer, **given)), len(responses))
        except Exception as error:
            return [error] * len(responses)
        return [{} if value is None else {self.name: value} for value in values]


class GroupFunctionReward(GroupReward):
    """Any function `(prompt, responses, answer, **other columns) -> list of numbers`, one for each response.

    Args:
        function: The function, or its dotted path, such as `my_package.my_module.my_function`; may be `async def`.

    Raises:
        UserError: If the path cannot be imported, or what is there cannot be called with three arguments.
    """

    def __init__(self, function: str | Callable[..., Any]) -> None:
        self.function = function
        self._function = _import_function(function) if isinstance(function, str) else function
        if not callable(self._function):
            raise UserError(f"function={function!r} is a {type(self._function).__name__}, it cannot be called")
        self._signature = read_signature(self._function, f"function={function!r}", GROUP_ARGUMENTS)

    @property
    def name(self) -> str:
        """The function's own name."""
        return getattr(self._function, "__name__", type(self._function).__name__)

    @property
    def signature(self) -> CallSignature:
        """The columns that the function takes."""
        return self._signature

    def __call__(self, prompt: str, responses: list[str], answer: str, **columns: Any) -> Any:  # type: ignore[override]
        """Call the function with the columns that it accepts."""
        return self._function(prompt, responses, answer, **self._signature.select(columns))

    def __reduce__(self) -> tuple[type[GroupFunctionReward], tuple[str | Callable[..., Any]]]:
        """Pickle the path, not what it led to."""
        return type(self), (self.function,)
