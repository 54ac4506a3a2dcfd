"""How a reward is called: which columns it takes, which collide with its parameters, and how its result is read.

It imports neither torch nor NumPy, whose scalars are read by what they offer: workers should start fast.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from numbers import Real
from types import MethodType
from typing import Any

from dynamo_lightning.errors import UserError

ARGUMENTS = ("prompt", "response", "answer")
GROUP_ARGUMENTS = ("prompt", "responses", "answer")
ADDED_COLUMNS = ("response_length", "max_response_length", "dataset")
"""Columns that the scorer adds; a row's own columns of these names are left out."""
COLUMNS_ON_REQUEST = ("answers", "prompt_text", "response_with_special_tokens")
"""Columns that only a reward gets that names them as parameters, or lists them in its `wants`."""


@dataclass(frozen=True)
class CallSignature:
    """Parameters of a reward besides its three arguments."""

    taken: frozenset[str]
    """Parameters that the three arguments fill: a column of such a name cannot be passed."""
    accepted: frozenset[str] | None
    """Columns that can be passed by name; `None` for any."""
    required: frozenset[str]
    """Columns without which the call fails."""
    named: frozenset[str]
    """Columns that are parameters of their own."""

    def select(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that the call gets."""
        if self.accepted is None:
            return {name: value for name, value in columns.items() if name not in self.taken}
        return {name: value for name, value in columns.items() if name in self.accepted}


_NOTHING = CallSignature(frozenset(), frozenset(), frozenset(), frozenset())


def read_signature(function: Callable[..., Any], label: str, arguments: tuple[str, ...] = ARGUMENTS) -> CallSignature:
    """Read what a function, or a bound `__call__`, takes after its first three parameters.

    Args:
        function: What is called with the three arguments by position.
        label: Its name, for messages.
        arguments: Names of the three.

    Raises:
        UserError: If it cannot be called with three arguments, or names them in another order.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C do not say what they take
        return _NOTHING
    listed = ", ".join(arguments)
    try:
        signature.bind_partial(*arguments)
    except TypeError:
        raise UserError(f"{label} must accept ({listed}) by position, got {signature}") from None
    parameters = list(signature.parameters.values())
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    leading, others = by_position[:3], by_position[3:] + [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    for position, parameter in enumerate(leading):
        if parameter.name in arguments and arguments.index(parameter.name) != position:
            raise UserError(f"{label} must take ({listed}) in this order, got {signature}")
    taken = {p.name for p in leading if p.kind is not p.POSITIONAL_ONLY} | {"self", _receiver(function)}
    named = {p.name for p in others if p.kind is not p.POSITIONAL_ONLY}
    required = {p.name for p in others if p.default is p.empty}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return CallSignature(
        frozenset(taken), None if takes_any else frozenset(named), frozenset(required), frozenset(named)
    )


def _receiver(function: Callable[..., Any]) -> str:
    """The first parameter of a method, mostly `self`; the call fills it."""
    method = getattr(function if inspect.ismethod(function) else type(function).__call__, "__func__", None)
    if method is None and not inspect.isfunction(function):
        method = type(function).__call__
    if not inspect.isfunction(method):
        return "self"
    return next(iter(inspect.signature(method).parameters), "self")


@lru_cache(maxsize=256)
def signature_of_class(kind: type, arguments: tuple[str, ...] = ARGUMENTS) -> CallSignature:
    """Parameters of a reward class besides its three arguments."""
    call = kind.__call__
    # Bound to anything: only the names of the parameters count.
    return read_signature(MethodType(call, kind) if inspect.isfunction(call) else call, kind.__name__, arguments)


def resolve(value: Any) -> Any:
    """The result of an `async def` reward, waited for; any other value as it is."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _event_loop().run_until_complete(wait())
    with ThreadPoolExecutor(1) as pool:  # called from a running loop, as in a notebook
        return pool.submit(asyncio.run, wait()).result()


@lru_cache(maxsize=1)
def _event_loop() -> asyncio.AbstractEventLoop:
    """One event loop for the whole worker: connections that a reward keeps open belong to a loop."""
    return asyncio.new_event_loop()


def to_number(name: str, value: Any) -> float | None:
    """Read a reward's result: `None` (does not apply), or a finite number.

    Numbers are Python's own, `Decimal` and `Fraction`, and NumPy's and torch's scalars and arrays without dimensions.

    Raises:
        TypeError: If it is something else.
    """
    if value is None:
        return None
    number = value
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        number = value.item()
    if isinstance(number, Real | Decimal):
        try:
            result = float(number)
        except (OverflowError, ValueError):  # too large for a float; a signalling NaN
            result = math.nan
        if math.isfinite(result):
            return result
    hint = "; a reward of a whole group is a GroupReward" if isinstance(value, list | tuple) else ""
    raise TypeError(f"reward {name!r} must be a finite number, got {value!r} of type {type(value).__name__}{hint}")


def to_numbers(name: str, values: Any, count: int) -> list[float | None]:
    """Read a group reward's result: a list, tuple or one-dimensional array with a number or `None` for each response.

    Raises:
        TypeError: If it is no list, or one of another length.
    """
    listed = values.tolist() if callable(getattr(values, "tolist", None)) else values
    if not isinstance(listed, list | tuple):
        raise TypeError(f"reward {name!r} must return a list of {count} numbers, got {type(values).__name__}")
    if len(listed) != count:
        raise TypeError(f"reward {name!r} must return {count} numbers, one for each response, got {len(listed)}")
    return [to_number(name, value) for value in listed]
