"""What a reward is: a stateless, picklable function of (prompt, response, answer) with a name.

A new reward is a subclass with `__call__`, or a plain function named by its dotted path in `FunctionReward`.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from dynamo_lightning.errors import UserError


class Reward(ABC):
    """Base class of all rewards. It runs in worker processes: keep it picklable, and import heavy packages lazily."""

    @property
    def name(self) -> str:
        """Key in `Score.components` and in metric names: the class name in snake case, without the ending `Reward`."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()
        return words.removesuffix("_reward")

    @abstractmethod
    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Return the reward of one response.

        Args:
            prompt: The question as the data set states it.
            response: The decoded response without special tokens.
            answer: The reference answer.
            **columns: The row's other columns.

        Returns:
            A finite number; anything else, or an exception, counts as a crash of this rollout's reward.
        """

    def components(self, prompt: str, response: str, answer: str, **columns: Any) -> dict[str, float]:
        """Return each named part of the reward, unweighted; arguments as in `__call__`."""
        return {self.name: self(prompt, response, answer, **columns)}

    def total(self, components: Mapping[str, float]) -> float:
        """Return the reward that `components` add up to."""
        return components[self.name]

    # Empty rather than abstract: most rewards take any answer and have nothing to prepare.

    def check_answer(self, answer: str) -> None:  # noqa: B027
        """Raise a ValueError that quotes `answer` if no response could be compared with it; called when data load."""

    def warm_up(self) -> None:  # noqa: B027
        """Import and cache what the first call would wait for; called once per worker, outside the time limit."""

    def free_memory(self) -> None:  # noqa: B027
        """Empty caches; called when a worker has used much of its memory limit."""


class FunctionReward(Reward):
    """Any function `(prompt, response, answer, **other columns) -> float`; its name becomes the reward's name.

    The first three arguments are passed by position, other columns by keyword: all of them to a function with
    `**kwargs`, otherwise only those that it names.

    Args:
        function: The function, or its dotted path, such as `my_package.my_module.my_function`.

    Raises:
        UserError: If the path cannot be imported, or what is there cannot be called with three arguments.
    """

    def __init__(self, function: str | Callable[..., float]) -> None:
        self.function = function
        self._function = _import_function(function) if isinstance(function, str) else function
        if not callable(self._function):
            raise UserError(f"function={function!r} is a {type(self._function).__name__}, it cannot be called")
        self._columns = _accepted_columns(self._function)

    @property
    def name(self) -> str:
        """The function's own name."""
        return getattr(self._function, "__name__", type(self._function).__name__)

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Call the function with the columns that it accepts."""
        if self._columns is not None:
            columns = {column: value for column, value in columns.items() if column in self._columns}
        return self._function(prompt, response, answer, **columns)

    def __reduce__(self) -> tuple[type[FunctionReward], tuple[str | Callable[..., float]]]:
        """Pickle the path, not what it led to: a decorated or re-exported function need not be picklable itself."""
        return type(self), (self.function,)


class WeightedReward(Reward):
    """Weighted sum of rewards, `total = Σ_i weights[i] · rewards[i]`; each reward is also logged by its name.

    Args:
        rewards: The rewards to add.
        weights: One factor for each reward.

    Raises:
        UserError: If there is no reward, the lengths differ, or two rewards have the same name.
    """

    def __init__(self, rewards: list[Reward], weights: list[float]) -> None:
        if not rewards or len(rewards) != len(weights):
            raise UserError(f"rewards and weights must pair up, got {len(rewards)} rewards and {len(weights)} weights")
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):
            raise UserError(f"rewards must have different names to be told apart in metrics, got {names}")
        self.rewards = rewards
        self.weights = weights

    def __call__(self, prompt: str, response: str, answer: str, **columns: Any) -> float:
        """Return the weighted sum."""
        return self.total(self.components(prompt, response, answer, **columns))

    def components(self, prompt: str, response: str, answer: str, **columns: Any) -> dict[str, float]:
        """Return each reward by its name, unweighted."""
        return {reward.name: reward(prompt, response, answer, **columns) for reward in self.rewards}

    def total(self, components: Mapping[str, float]) -> float:
        """Return the weighted sum of `components`."""
        pairs = zip(self.weights, self.rewards, strict=True)
        return sum(weight * components[reward.name] for weight, reward in pairs)

    def check_answer(self, answer: str) -> None:
        """Check the answer with every reward."""
        for reward in self.rewards:
            reward.check_answer(answer)

    def warm_up(self) -> None:
        """Warm up every reward."""
        for reward in self.rewards:
            reward.warm_up()

    def free_memory(self) -> None:
        """Empty every reward's caches."""
        for reward in self.rewards:
            reward.free_memory()


def _import_function(path: str) -> Any:
    """Return what the dotted `path` names; ValueError if there is nothing."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"function={path!r} cannot be imported ({error}); expected a dotted path such as "
            "my_package.my_module.my_function, importable from where Python was started"
        ) from error


def _accepted_columns(function: Callable[..., float]) -> frozenset[str] | None:
    """Return the columns that `function` names after its first three parameters, or None if it takes any."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C do not say what they take
        return frozenset()
    try:
        signature.bind_partial("", "", "")
    except TypeError as error:
        raise UserError(
            f"function={function!r} must accept (prompt, response, answer) by position, got {signature}"
        ) from error
    parameters = list(signature.parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_keyword = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return frozenset(p.name for p in by_position[3:] + by_keyword if p.kind is not p.POSITIONAL_ONLY)
