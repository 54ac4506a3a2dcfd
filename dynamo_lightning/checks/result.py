"""The result of one check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class CheckResult:
    """The result of one check, printed as one line.

    Example:
        `CheckResult("reward", "error", "no reference answer earns its reward", {"gold": 0.0})`
    """

    name: str
    """Short name of the check."""
    level: Level
    """`error` if a run with these settings cannot learn what it should, `warning` if it may not."""
    message: str
    """Finding, and with a warning or an error the option to change."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Measurements by name; plain values for `--json`."""

    def line(self) -> str:
        """The result for the terminal."""
        return f"{self.level:8}{self.name:12}{self.message}"


def worst(results: list[CheckResult]) -> Level:
    """The most serious level of some results; `ok` without any."""
    levels: list[Level] = ["error", "warning"]
    return next((level for level in levels if any(result.level == level for result in results)), "ok")
