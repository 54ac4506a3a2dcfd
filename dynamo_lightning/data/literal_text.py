"""Text on the command line that YAML would take for something else: `--data.train.answer_pattern "#### (.+)"`.

The parser reads the value of every option as YAML. There `#` begins a comment, `Answer: (.+)` is a mapping and `[A-D]`
a list. Options that are text get their text as it is; `null` still is null.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

NULL_SPELLINGS = ("null", "Null", "NULL", "~", "")
"""How nothing is written in YAML."""


class LiteralText(str):
    """Text that the parser does not read as YAML, which it does with `str` itself only."""

    __slots__ = ()


def text_options() -> re.Pattern[str]:
    """The options that are text: of data sets, and the patterns and addresses of rewards."""
    from dynamo_lightning.data.source import PromptSource

    names = [field.name for field in fields(PromptSource) if str(field.type) in ("str", "str | None")]
    of_data = rf"data\.(?:(?:train|val|test|predict)\.(?:{'|'.join(names)})|template)"
    of_reward = r"model\.reward\.(?:init_args\.)?(?:[\w.]+\.)?(?:pattern|url|key|function|model|instructions)"
    return re.compile(rf"--(?:{of_data}|{of_reward})")


def literal_arguments(arguments: Any) -> Any:
    """Arguments of a command line, with the values of text options marked as text.

    Args:
        arguments: A list of strings; anything else is returned as it is.
    """
    if not isinstance(arguments, Sequence) or isinstance(arguments, str):
        return arguments
    options = text_options()
    result: list[str] = []
    for argument in arguments:
        name, equals, value = str(argument).partition("=")
        if equals and options.fullmatch(name) and not value.startswith("-"):
            result += [name, _literal(value)]
        elif result and options.fullmatch(result[-1]) and not str(argument).startswith("--"):
            result.append(_literal(str(argument)))
        else:
            result.append(argument)
    return result


def _literal(value: str) -> str:
    return value if value in NULL_SPELLINGS else LiteralText(value)


def plain_text(config: Any) -> None:
    """Make every marked text of a parsed configuration an ordinary string again, in place."""
    if isinstance(config, list):
        for index, item in enumerate(config):
            config[index] = str(item) if isinstance(item, LiteralText) else item
            plain_text(item)
        return
    items = config if isinstance(config, dict) else vars(config) if hasattr(config, "__dict__") else {}
    for name, item in list(items.items()):
        if isinstance(item, LiteralText):
            items[name] = str(item)
        elif isinstance(item, dict | list) or type(item).__name__ == "Namespace":
            plain_text(item)


def keep_text_literal() -> None:
    """Have the parser keep text that YAML reads as nothing, though it does not spell null, for all other options.

    Whole config files, which have more than one line, are left alone.
    """
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")
    if getattr(load, "keeps_text", False):
        return

    def load_literally(text: str) -> Any:
        value = load(text)
        return text if value is None and "\n" not in text and text.strip() not in NULL_SPELLINGS else value

    load_literally.keeps_text = True  # type: ignore[attr-defined]
    set_loader("yaml", load_literally, (yaml.YAMLError,))
    yaml.SafeDumper.add_representer(LiteralText, yaml.SafeDumper.represent_str)  # for --print_config
