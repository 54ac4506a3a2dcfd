"""The configuration reference: every option of the command line and every class that one can choose, as Markdown.

Everything comes from the parser that runs use and from the docstrings of the classes; nothing is written by hand.

    python docs_site/reference.py --output_dir build/reference
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse._actions import _ActionConfigLoad, _ActionHelpClassPath, _ActionPrintConfig
from jsonargparse._link_arguments import ActionLink

PREFIX = "dynamo_lightning."
LONGEST_DEFAULT = 80
"""Characters after which a default that is text is cut off."""


@dataclass(frozen=True)
class Option:
    """One option, as a reader sees it."""

    name: str
    """With its groups, such as `model.sampling.temperature`; for a class without."""
    type: str
    default: str
    help: str
    typehint: Any
    """The type itself, from which classes to choose are found."""


def type_name(typehint: Any) -> str:
    """A type as it is written, without the modules of its parts."""
    if isinstance(typehint, type):
        return typehint.__name__
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", str(typehint))
    text = re.sub(r"Optional\[(.*)\]$", r"\1 | None", text)
    return text.replace("NoneType", "None")


def default_text(default: Any) -> str:
    """A default as YAML would have it, on one line; a class by its short name."""
    if isinstance(default, list | tuple):
        return "[" + ", ".join(default_text(item) for item in default) + "]"
    if (isinstance(default, dict) and "class_path" in default) or hasattr(default, "class_path"):
        values = default if isinstance(default, dict) else vars(default)
        arguments = values.get("init_args") or {}
        name = str(values["class_path"]).rpartition(".")[2]
        if not arguments:
            return name
        return f"{name}({', '.join(f'{key}={default_text(value)}' for key, value in dict(arguments).items())})"
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if inspect.isfunction(default):
        return "see --optimizer"
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return type(default).__name__
    text = " ".join(str(default).split())
    return (text if len(text) <= LONGEST_DEFAULT else f"{text[:LONGEST_DEFAULT]} …") or '""'


def options_of(parser: ArgumentParser, prefix: str = "") -> list[Option]:
    """Options of a parser, in its order, without helpers such as `--print_config` and without linked ones."""
    hidden = (_ActionConfigLoad, _ActionHelpClassPath, _ActionPrintConfig, ActionLink)
    found = []
    for action in parser._actions:
        if isinstance(action, hidden) or action.dest in ("help", "==SUPPRESS=="):
            continue
        typehint = getattr(action, "_typehint", None) or action.type or str
        name = action.dest.removeprefix(prefix)
        text = re.sub(r"\s+", " ", (action.help or "").replace("%%", "%")).strip()
        found.append(Option(name, type_name(typehint), default_text(action.default), text, typehint))
    return found


def parameters_of(cls: type) -> list[Option]:
    """Arguments of a class, as its options in a config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it", fail_untyped=False)
    return options_of(parser, "it.")


def description_of(cls: type) -> str:
    """The docstring of a class without its sections on arguments and errors."""
    parsed = parse_docstring(inspect.getdoc(cls) or "")
    return "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)


@cache
def parser_of(subcommand: str) -> ArgumentParser:
    """The parser of a subcommand, as `main` builds it; nothing is run."""
    from dynamo_lightning.cli import DynamoCLI, DynamoTrainer
    from dynamo_lightning.datamodule import RolloutDataModule
    from dynamo_lightning.module import PolicyModule

    class Parsed(DynamoCLI):
        def before_instantiate_classes(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            pass

        def _run_subcommand(self, subcommand: str) -> None:
            pass

        def _set_seed(self) -> None:
            pass

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    needed = {"export": ["--ckpt_path=x", "--output_dir=y"], "warm_start": ["--config=warm_start.yaml"]}
    cli = Parsed(
        chosen=subcommand,
        model_class=PolicyModule,
        datamodule_class=RolloutDataModule,
        trainer_class=DynamoTrainer,
        auto_configure_optimizers=False,
        args=[subcommand, *needed.get(subcommand, [])],
        parser_kwargs={"prog": "python -m dynamo_lightning"},
    )
    return cli._subcommand_parsers[subcommand]


def own_dataclasses(typehint: Any) -> list[type]:
    """Dataclasses of the library within a type: their fields are options too."""
    parts = [typehint, *(part for argument in get_args(typehint) for part in (argument, *get_args(argument)))]
    classes = [part for part in parts if inspect.isclass(part)]
    return [
        cls for cls in dict.fromkeys(classes) if dataclasses.is_dataclass(cls) and cls.__module__.startswith(PREFIX)
    ]


def choices() -> dict[str, dict[str, type]]:
    """Options that choose a class of the library: by option the classes, by short name."""
    from dynamo_lightning.runs.class_names import choices_by_option

    found: dict[str, dict[str, type]] = {}
    for option, paths in choices_by_option(parser_of("fit")).items():
        classes = {name: load(path) for name, path in sorted(paths.items())}
        if not option.endswith(".help") and not all(dataclasses.is_dataclass(cls) for cls in classes.values()):
            found[option] = classes
    import dynamo_lightning.callbacks as callbacks

    own = {name: getattr(callbacks, name) for name in sorted(callbacks.__all__)}
    found["trainer.callbacks"] = {name: cls for name, cls in own.items() if inspect.isclass(cls)}
    return found


def load(path: str) -> type:
    """A class by its import path."""
    from importlib import import_module

    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def table(options: list[Option], prefix: str = "") -> Iterator[str]:
    """Rows of Markdown, one for each option."""
    yield "| option | type | default | |"
    yield "|---|---|---|---|"
    for option in options:
        # Pipes within code do not end a cell.
        cells = (f"`{prefix}{option.name}`", f"`{option.type}`", f"`{option.default}`", escape(option.help))
        yield f"| {' | '.join(cells)} |"
    yield ""


def escape(text: str) -> str:
    """Text whose pipes, but for those within code, do not end a cell of a table."""
    parts = text.split("`")
    return "`".join(part if number % 2 else part.replace("|", "\\|") for number, part in enumerate(parts))


def options_page() -> str:
    """Every option of `fit`, by group."""
    lines = [
        "# Options",
        "",
        "Every option of `fit`, on the command line (`--model.sampling.temperature 0.7`) and in a config (nested). "
        "`validate`, `test`, `predict`, `warm_start` and `export` take the same; their own are at the end. Options of "
        "a chosen class are on the page [Classes](classes.md).",
        "",
    ]
    groups: dict[str, list[Option]] = {}
    for option in options_of(parser_of("fit")):
        parent = option.name.rpartition(".")[0] or "run"
        groups.setdefault(parent, []).append(option)
    for group, options in groups.items():
        lines += [f"## {group}", ""]
        if group == "trainer":
            lines += ["Lightning's own `Trainer`, with this library's defaults.", ""]
        lines += table(options)
    takers: dict[type, list[str]] = {}
    for option in options_of(parser_of("fit")):
        for cls in own_dataclasses(option.typehint):
            takers.setdefault(cls, []).append(option.name)
    for cls, names in takers.items():
        lines += [f"## {cls.__name__}: {', '.join(names)}", "", description_of(cls), "", *table(parameters_of(cls))]
    common = {option.name for option in options_of(parser_of("fit"))}
    for subcommand in ("validate", "test", "predict", "warm_start", "export"):
        own = [option for option in options_of(parser_of(subcommand)) if option.name not in common]
        lines += [f"## Further options of {subcommand}", "", *(table(own) if own else ["None.", ""])]
    return "\n".join(lines)


def classes_page() -> str:
    """Every class that an option chooses, with its arguments."""
    lines = [
        "# Classes",
        "",
        "An option of this page takes the name of a class, short (`--data.rule NeymanRule`) or with its module, and "
        "the class's own arguments as `init_args`:",
        "",
        "```yaml",
        "data:",
        "  estimator:",
        "    class_path: dynamo_lightning.allocation.BetaPosterior",
        "    init_args: {half_life: 100}",
        "```",
        "",
    ]
    for option, classes in choices().items():
        lines += [f"## {option}", ""]
        for name, cls in classes.items():
            lines += [f"### {name}", "", f"`{cls.__module__}.{cls.__qualname__}`", "", description_of(cls), ""]
            parameters = parameters_of(cls)
            lines += table(parameters) if parameters else ["No arguments.", ""]
    return "\n".join(lines)


def write(output_dir: str = "build/reference") -> None:
    """Write both pages.

    Args:
        output_dir: Folder to write into.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.md").write_text(options_page(), encoding="utf-8")
    (folder / "classes.md").write_text(classes_page(), encoding="utf-8")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(write, as_positional=False)
