"""The interface of rewards: a stateless, picklable function of (prompt, response, answer) with a name.

A new reward is a subclass with `__call__`, or a plain function: see docs/new_reward.md. Combinations of rewards are in
`combined.py`, rewards of a whole group in `group.py`.
"""

from __future__ import annotations

import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.calling import (
    COLUMNS_ON_REQUEST,
    CallSignature,
    read_signature,
    resolve,
    signature_of_class,
    to_number,
)

Components = dict[str, float] | Exception
"""Named rewards of one response of a group, or the exception that came instead of them."""


class Reward(ABC):
    """Base class of all rewards. It runs in worker processes: keep it picklable, and import heavy packages lazily."""

    needs_group: bool = False
    """True if it, or a part of it, sees all responses of a prompt at once."""

    wants: ClassVar[frozenset[str]] = frozenset()
    """Columns on request, `calling.COLUMNS_ON_REQUEST`, that `__call__` reads without naming them as parameters."""

    @property
    def name(self) -> str:
        """Key in `Score.components` and in metric names: the class name in snake case, without the ending `Reward`."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()
        return words.removesuffix("_reward")

    @property
    def parts(self) -> Sequence[Reward]:
        """The rewards that it combines; none for most."""
        return ()

    @property
    def signature(self) -> CallSignature:
        """The columns that `__call__` takes."""
        return signature_of_class(type(self))

    @abstractmethod
    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float | None:
        """Return the reward of one response.

        Args:
            prompt: The question as the data set states it.
            response: The decoded response without special tokens.
            answer: The reference answer.
            **columns: The row's other columns, the lengths in tokens `response_length` and `max_response_length`, the
                data set's name as `dataset` (also as `source`, unless the row has such a column); what
                `calling.COLUMNS_ON_REQUEST` lists comes if a parameter has its name.

        Returns:
            A finite number, or `None` if the reward does not apply to this row; anything else, or an exception, counts
            as a crash of this rollout's reward.
        """

    def components(self, prompt: str, response: str, answer: str, **columns: Any) -> dict[str, float]:
        """Return each named part of the reward that applies, unweighted; arguments as in `__call__`."""
        value = call_reward(self, prompt, response, answer, columns)
        return {} if value is None else {self.name: value}

    def group_components(
        self, prompt: str, responses: Sequence[str], answer: str, columns: Sequence[Mapping[str, Any]]
    ) -> list[Components]:
        """`components` of each response of a group, a reward's exception in its place.

        Args:
            prompt: The question.
            responses: All responses of the group, `[group_size]`.
            answer: The reference answer.
            columns: Columns of each response, `[group_size]`.
        """
        results: list[Components] = []
        for response, own in zip(responses, columns, strict=True):
            try:
                results.append(self.components(prompt, response, answer, **own))
            except Exception as error:  # only this response's reward failed
                results.append(error)
        return results

    def total(self, components: Mapping[str, float]) -> float:
        """Return the reward that `components`, at least one, add up to."""
        return components[self.name]

    # Empty rather than abstract: most rewards take any answer and have nothing to prepare.

    def check_answer(self, answer: str) -> None:  # noqa: B027
        """Raise a ValueError that quotes `answer` if no response could be compared with it; called when data load."""

    def warm_up(self) -> None:  # noqa: B027
        """Import and cache what the first call would wait for; called once per worker, outside the time limit."""

    def free_memory(self) -> None:  # noqa: B027
        """Empty caches; called when a worker has used much of its memory limit."""


class FunctionReward(Reward):
    """Any function `(prompt, response, answer, **other columns) -> float | None`; its name is the reward's name.

    The first three arguments are passed by position, other columns by keyword: all of them to a function with
    `**kwargs`, otherwise only those that it names. The function may be `async def`.

    Args:
        function: The function, or its dotted path, such as `my_package.my_module.my_function`.
        keep_special_tokens: Pass the response with its special tokens, for a policy whose `<think>` is one; without
            the end-of-sequence token at its end.

    Raises:
        UserError: If the path cannot be imported, or what is there cannot be called with three arguments.
    """

    def __init__(self, function: str | Callable[..., Any], keep_special_tokens: bool = False) -> None:
        self.function = function
        self.keep_special_tokens = keep_special_tokens
        self._function = _import_function(function) if isinstance(function, str) else function
        if not callable(self._function):
            raise UserError(f"function={function!r} is a {type(self._function).__name__}, it cannot be called")
        self._signature = read_signature(self._function, f"function={function!r}")

    @property
    def wants(self) -> frozenset[str]:  # type: ignore[override]  # depends on an option
        """The response with its special tokens, if they are to be kept."""
        return frozenset({"response_with_special_tokens"}) if self.keep_special_tokens else frozenset()

    @property
    def name(self) -> str:
        """The function's own name."""
        return getattr(self._function, "__name__", type(self._function).__name__)

    @property
    def signature(self) -> CallSignature:
        """The columns that the function takes."""
        return self._signature

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float | None:
        """Call the function with the columns that it accepts."""
        if self.keep_special_tokens:
            response = columns.get("response_with_special_tokens", response)
        return resolve(self._function(prompt, response, answer, **self._signature.select(columns)))

    def components(self, prompt: str, response: str, answer: str, **columns: Any) -> dict[str, float]:
        """Return the function's reward by its name, if it applies."""
        value = to_number(self.name, self(prompt, response, answer, **columns))
        return {} if value is None else {self.name: value}

    def __reduce__(self) -> tuple[type[FunctionReward], tuple[str | Callable[..., Any], bool]]:
        """Pickle the path, not what it led to: a decorated or re-exported function need not be picklable itself."""
        return type(self), (self.function, self.keep_special_tokens)


def call_reward(reward: Reward, prompt: str, response: str, answer: str, columns: Mapping[str, Any]) -> float | None:
    """Call any reward with the columns that it takes, and read its result.

    Raises:
        TypeError: If the result is neither a finite number nor `None`.
    """
    if isinstance(reward, FunctionReward):  # selects by itself; a column may have one of our parameters' names
        components = reward.components(prompt, response, answer, **without_arguments(columns))
        return components.get(reward.name)
    return to_number(reward.name, resolve(reward(prompt, response, answer, **reward.signature.select(columns))))


def without_arguments(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns but for those that no method of a reward can get beside its own parameters."""
    return {name: value for name, value in columns.items() if name not in NEVER_COLUMNS}


NEVER_COLUMNS = frozenset({"self", "prompt", "response", "answer"})
"""Names of our own parameters: columns of these names are never handed to a reward."""


def leaves(reward: Reward) -> Iterator[Reward]:
    """The rewards at the ends of a combination: a simple reward itself."""
    if not reward.parts:
        yield reward
    for part in reward.parts:
        yield from leaves(part)


def every_reward(reward: Reward) -> Iterator[Reward]:
    """A reward and all that it combines."""
    yield reward
    for part in reward.parts:
        yield from every_reward(part)


def columns_on_request(reward: Reward) -> frozenset[str]:
    """The columns on request that a reward or one of its parts asks for."""
    asked = frozenset[str]().union(*(one.wants | one.signature.named for one in every_reward(reward)))
    return asked & frozenset(COLUMNS_ON_REQUEST)


def describe_reward(reward: Reward) -> str:
    """A reward's name, with its parts': `weighted (math, format)`."""
    return reward.name + (f" ({', '.join(describe_reward(part) for part in reward.parts)})" if reward.parts else "")


def _import_function(path: str) -> Any:
    """Return what the dotted `path` names; UserError if there is nothing."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"function={path!r} cannot be imported ({error}); expected a dotted path such as "
            "my_package.my_module.my_function, importable from where Python was started"
        ) from error
