"""A tripwire: a measure, the value from which on it warns, and the value at which it is armed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from dynamo_lightning.callbacks.tripwires.observation import History


class Measurement(NamedTuple):
    """Value of a tripwire's measure, with words for the case that it is beyond the threshold."""

    value: float
    message: str


Measure = Callable[[History], Measurement | None]
"""A pure function of the history; `None` as long as there is nothing to judge."""


@dataclass(frozen=True)
class Tripwire:
    """One tripwire.

    It goes off when its measure reaches the threshold, and is armed again when the measure has gone back to `recovery`:
    a value that hovers around the threshold is said once. A recovery above the threshold makes low values the bad ones.
    """

    name: str
    measure: Measure
    threshold: float
    recovery: float
    level: Literal["warning", "error"] = "warning"
    """`error` if what is trained on is wrong, `warning` if it may not lead anywhere."""

    @property
    def low_is_bad(self) -> bool:
        """True if the tripwire goes off below its threshold."""
        return self.recovery > self.threshold

    def is_beyond(self, value: float) -> bool:
        """True if this value makes it go off."""
        return value <= self.threshold if self.low_is_bad else value >= self.threshold

    def has_recovered(self, value: float) -> bool:
        """True if this value arms it again."""
        return value >= self.recovery if self.low_is_bad else value <= self.recovery

    def at(self, threshold: float) -> Tripwire:
        """The same tripwire with another threshold; the recovery keeps its ratio to it."""
        ratio = self.recovery / self.threshold if self.threshold else 1.0
        return replace(self, threshold=threshold, recovery=threshold * ratio)
