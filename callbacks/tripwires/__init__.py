"""Tripwires: what fails silently in a run, said once, with numbers and a remedy."""

from dynamo_lightning.callbacks.tripwires.callback import Tripwires
from dynamo_lightning.callbacks.tripwires.table import TRIPWIRES
from dynamo_lightning.callbacks.tripwires.tripwire import Measurement, Tripwire

__all__ = ["TRIPWIRES", "Measurement", "Tripwire", "Tripwires"]
