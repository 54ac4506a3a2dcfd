"""Names of version 0.1 that still work in version 0.2, each with one warning that gives the new name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

RENAMED = {
    "dynamo_lightning.rollout.generator.Generator": "dynamo_lightning.engines.engine.Engine",
    "dynamo_lightning.rollout.generator.SamplingConfig": "dynamo_lightning.engines.engine.SamplingConfig",
    "dynamo_lightning.rollout.transformers.TransformersGenerator": (
        "dynamo_lightning.engines.transformers.TransformersEngine"
    ),
    "dynamo_lightning.rollout.vllm_colocated.VLLMColocatedGenerator": (
        "dynamo_lightning.engines.vllm.colocated.VLLMColocatedEngine"
    ),
    "dynamo_lightning.rollout.vllm_generator.TokenFilter": "dynamo_lightning.engines.vllm.engine.TokenFilter",
    "dynamo_lightning.rollout.vllm_generator.VLLMGenerator": "dynamo_lightning.engines.vllm.engine.VLLMEngine",
    "dynamo_lightning.rollout.vllm_server.VLLMServerGenerator": (
        "dynamo_lightning.engines.vllm.server.VLLMServerEngine"
    ),
    "dynamo_lightning.rollout.vllm_worker.WeightSyncExtension": (
        "dynamo_lightning.engines.vllm.worker.WeightSyncExtension"
    ),
}
"""Import path of 0.1 → import path now."""
_warned: set[str] = set()


def warn_once(old: str, new: str) -> None:
    """Warn that a name has changed, once per process and name, in the first process of a run."""
    if old not in _warned:
        _warned.add(old)
        rank_zero_warn(f"{old} is now {new}; the old name goes in version 0.3", category=FutureWarning, stacklevel=6)


def old_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module of 0.1, which has nothing but renamed classes.

    Args:
        module: Its import path.
    """

    def find(name: str) -> Any:
        old = f"{module}.{name}"
        if old not in RENAMED:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_once(old, RENAMED[old])
        home, _, attribute = RENAMED[old].rpartition(".")
        return getattr(import_module(home), attribute)

    return find


def current_path(name: str, paths: set[str]) -> str:
    """The import path of a class that is given by its path or its short name of 0.1; any other name as it is.

    Args:
        name: As the user writes it.
        paths: Import paths of the classes that may be meant.
    """
    for old, new in RENAMED.items():
        if new in paths and name in (old, old.rpartition(".")[2]) and name != new.rpartition(".")[2]:
            warn_once(name, new)
            return new
    return name
