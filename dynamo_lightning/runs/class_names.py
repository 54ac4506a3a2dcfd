"""Short class names as the documentation writes them, and "did you mean" for misspelled options and names."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, get_args

from dynamo_lightning.engines.renamed import current_path

PACKAGES = ("losses", "allocation", "rewards", "engines", "engines.vllm", "callbacks")
"""Packages with classes to choose from; none imports an engine."""
_NAME = r"[A-Za-z][\w. -]*?"


def _letters(name: str) -> str:
    """A name without capitals, spaces, dots and hyphens: `Dr. GRPO` is `DrGRPO`, `Clip-Cov` is `ClipCov`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def import_choices() -> None:
    """Import what can be chosen by class name: only imported classes are found by their short names."""
    for package in PACKAGES:
        module = importlib.import_module(f"dynamo_lightning.{package}")
        for entry in pkgutil.iter_modules(module.__path__):
            importlib.import_module(f"dynamo_lightning.{package}.{entry.name}")


def _subclasses(base: type) -> Iterator[type]:
    children: list[type] = base.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


@cache
def class_choices(typehint: Any) -> dict[str, str]:
    """Import paths of the library's own classes of a type, by short name; empty for a type that is no choice.

    Args:
        typehint: A class, or a union with one.
    """
    bases = [part for part in (typehint, *get_args(typehint)) if inspect.isclass(part)]
    ours = [base for base in bases if base.__module__.startswith("dynamo_lightning.")]
    import_choices()
    found = (child for base in ours for child in _subclasses(base))
    return {
        child.__name__: f"{child.__module__}.{child.__qualname__}"
        for child in found
        if child.__module__.startswith("dynamo_lightning.")
        and not inspect.isabstract(child)
        and not child.__name__.startswith(("_", "LazyInstance_"))
    }


def choices_by_option(parser: Any) -> dict[str, dict[str, str]]:
    """Options of a parser that choose a class of the library, each with the import paths by short name."""
    options = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    found = {dest: class_choices(typehint) for dest, typehint in options.items() if typehint is not None}
    return {dest: choices for dest, choices in found.items() if choices}


def _resolve(name: str, choices: dict[str, str]) -> str:
    """The import path of a class whose short name is written in some way, or the name as it is."""
    name = current_path(name, set(choices.values()))
    by_letters = {_letters(short): path for short, path in choices.items()}
    return by_letters.get(_letters(name), name) if re.fullmatch(_NAME, name) else name


def with_class_paths(arguments: Sequence[str], options: dict[str, dict[str, str]]) -> list[str]:
    """Command line arguments with import paths in place of short class names.

    Args:
        arguments: As the shell gives them.
        options: See `choices_by_option`.
    """
    resolved: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        choices = options.get(option.removeprefix("--").removesuffix(".class_path")) if option[:2] == "--" else None
        if equals and choices:
            argument = f"{option}={_resolve(value, choices)}"
        elif resolved and resolved[-1].startswith("--") and "=" not in resolved[-1]:
            choices = options.get(resolved[-1].removeprefix("--").removesuffix(".class_path"))
            argument = _resolve(argument, choices) if choices else argument
        resolved.append(argument)
    return resolved


def config_with_class_paths(text: str, options: dict[str, dict[str, str]]) -> str:
    """A config's text with import paths in place of short class names, as in `surrogate: GSPO`."""
    for dest, choices in options.items():
        key = re.escape(dest.rsplit(".", 1)[-1])
        pattern = rf"(?m)^( +|.*[{{,] *){key}: +(['\"]?)({_NAME})\2(?= *(#.*)?$| *[,}}])"

        def replace(match: re.Match[str], choices: dict[str, str] = choices, key: str = key) -> str:
            return f"{match[1]}{key}: {_resolve(match[3], choices)}"

        text = re.sub(pattern, replace, text)
        nested = rf"(?m)^( *{key}:\s*\n? *\{{? *class_path: +)(['\"]?)({_NAME})\2(?= *(#.*)?$| *[,}}])"
        text = re.sub(nested, lambda match, choices=choices: f"{match[1]}{_resolve(match[3], choices)}", text)  # type: ignore[misc]
    return text


def did_you_mean(message: str, parser: Any) -> str:
    """An error message of the parser, with the nearest option or class name if it complains about one.

    Args:
        message: What the parser says.
        parser: Of the subcommand; none leaves the message as it is.
    """
    if parser is None:
        return message
    names = [option for action in parser._actions for option in action.option_strings]
    if unknown := re.search(r"[Uu]nrecognized arguments: (--[^\s=]+)", message):
        return message + nearest(unknown[1], names)
    if unknown := re.search(r"Group '([\w.]+)' does not accept (?:nested key|option) '([\w.]+)'", message):
        return message + nearest(f"--{unknown[1]}.{unknown[2]}", names)
    if unknown := re.search(r"does not accept (?:nested key|option) '([\w.]+)'", message):
        return message + nearest(f"--{unknown[1]}", names)
    option = re.search(r'Parser key "([\w.]+)"', message)
    given = re.search(r"Expected a dot import path string: (\S+)", message) or re.search(
        r"Expected a path but (\S+) either not accessible", message
    )
    choices = choices_by_option(parser).get(option[1].removesuffix(".class_path"), {}) if option else {}
    if option and given and choices:
        line = f"{option[1]}={given[1]} is no class that can be imported"
        return line + (nearest(given[1], list(choices)) or f": choose one of {', '.join(sorted(choices))}")
    return message


def nearest(given: str, names: Sequence[str]) -> str:
    """`: did you mean …?` with the name that is nearest to the given one, or nothing."""
    by_lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.7)
    return f": did you mean {by_lower[found[0]]}?" if found else ""
