"""Arguments of a module as plain values, so that a checkpoint can build it again.

Objects become `class_path` and `init_args`, as in a config; a checkpoint with them still loads with `weights_only`, and
Lightning's `load_from_checkpoint(path)` builds the objects again.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""Path of the function that Lightning calls to build a module from such values."""
_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
LEFT_OUT = "_left_out"
"""Arguments that cannot be expressed as plain values, by name, each with its description."""


class NotExpressibleError(Exception):
    """An object cannot be built from plain values."""


def eager(value: Any) -> Any:
    """The object itself in place of one whose construction is delayed, which cannot be sent to another process."""
    if not hasattr(value, "lazy_get_init_data"):
        return value
    data = value.lazy_get_init_data()
    return value._lazy_class_type(**(data.get("init_args") or {}))


def save_arguments(module: Any, arguments: Mapping[str, Any]) -> None:
    """Keep the arguments of a module's constructor as its hyperparameters.

    From the command line these are the values of the config; otherwise the objects are described.

    Args:
        module: A Lightning module or data module.
        arguments: `locals()` of its constructor.
    """
    given = _given_hyperparameters.get()
    if given is not None:
        module.save_hyperparameters(dict(given))
        return
    plain: dict[str, Any] = {"_instantiator": INSTANTIATOR}
    left_out: dict[str, str] = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name not in arguments or name == "self" or parameter.kind in _VARIADIC:
            continue
        try:
            plain[name] = _describe_parts(name, arguments[name], left_out)
        except NotExpressibleError as error:
            if arguments[name] is not parameter.default:
                left_out[name] = str(error)
    if left_out:
        plain[LEFT_OUT] = left_out
    module.save_hyperparameters(plain)


def _describe_parts(name: str, value: Any, left_out: dict[str, str]) -> Any:
    """As `describe`; of a dataclass, a field that cannot be expressed is noted in `left_out` under its dotted name."""
    if not dataclasses.is_dataclass(value) or inspect.isclass(value):
        return describe(value)
    described = {}
    for field in dataclasses.fields(value):
        try:
            described[field.name] = _describe_parts(f"{name}.{field.name}", getattr(value, field.name), left_out)
        except NotExpressibleError as error:
            left_out[f"{name}.{field.name}"] = str(error)
    return described


def warn_of_left_out(hyperparameters: Mapping[str, Any], loader: str) -> None:
    """Say which arguments a checkpoint could not keep, when a module has been built from it."""
    for name, description in (hyperparameters.get(LEFT_OUT) or {}).items():
        warnings.warn(
            f"the checkpoint does not hold {name}={description}, which is not made of a class and plain values: the "
            f"default is used unless you pass {name.split('.')[0]}=… to {loader}.load_from_checkpoint",
            stacklevel=2,
        )


def describe(value: Any) -> Any:
    """A value as plain values.

    Args:
        value: A plain value, dataclass, importable function or class, `functools.partial` of a class, container of
            such values, or an object that keeps the arguments of its constructor as attributes of the same names.

    Returns:
        Numbers, strings, lists and dictionaries; objects as `class_path` and `init_args`.

    Raises:
        NotExpressibleError: If it is none of these.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple | set):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if hasattr(value, "lazy_get_init_data"):
        data = value.lazy_get_init_data()
        return {"class_path": data.class_path, "init_args": describe(dict(data.get("init_args") or {}))}
    if isinstance(value, functools.partial):
        if value.args or not inspect.isclass(value.func):
            raise NotExpressibleError(f"{value!r}")
        return {"class_path": _import_path(value.func), "init_args": describe(value.keywords)}
    if inspect.isclass(value) or inspect.isfunction(value):
        return _import_path(value)
    if dataclasses.is_dataclass(value):
        return {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    return {"class_path": _import_path(type(value)), "init_args": _constructor_arguments(value)}


def _import_path(value: Any) -> str:
    """Dotted path of a class or function at the top of a module that others can import."""
    path = f"{value.__module__}.{value.__qualname__}"
    if value.__module__ == "__main__" or "<" in value.__qualname__:
        code = getattr(value, "__code__", None)
        place = f" of {code.co_filename}, line {code.co_firstlineno}" if code else ""
        raise NotExpressibleError(f"{value.__qualname__}{place}")
    return path


def _constructor_arguments(value: Any) -> dict[str, Any]:
    """Arguments of an object's constructor, read off its attributes."""
    if type(value).__init__ is object.__init__:
        return {}
    described = {}
    for name, parameter in inspect.signature(type(value).__init__).parameters.items():
        if name == "self" or parameter.kind in _VARIADIC:
            continue
        if name in vars(value):
            described[name] = describe(vars(value)[name])
        elif f"_{name}" in vars(value):
            described[name] = describe(vars(value)[f"_{name}"])
        else:
            raise NotExpressibleError(f"{type(value).__qualname__} (it keeps no attribute {name})")
    return described
