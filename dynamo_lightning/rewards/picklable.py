"""Can a worker process load the reward? Found out before any worker is started, with the remedy."""

from __future__ import annotations

import io
import pickle
import sys
from typing import Any

from dynamo_lightning.errors import UserError
from dynamo_lightning.rewards.reward import Reward, every_reward

REMEDY = "put it in a module, a file such as my_rewards.py, and import it from there: rewards run in other processes"


class _Pickler(pickle.Pickler):
    """Refuses what can be pickled here but not found in a worker process."""

    def reducer_override(self, obj: Any) -> Any:
        """Look at every function and class that is pickled by name."""
        if getattr(obj, "__module__", None) == "__main__" and hasattr(obj, "__qualname__") and not main_is_importable():
            raise UserError(
                f"model.reward: {obj.__qualname__!r} is defined in a notebook or on the command line: {REMEDY}"
            )
        return NotImplemented


def main_is_importable() -> bool:
    """True if a new process imports the main module again: a script, but no notebook and no `python -m package`."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return not (spec.name == "__main__" or spec.name.endswith(".__main__"))
    file = getattr(main, "__file__", None)
    return file is not None and not file.startswith("<")


def pickle_reward(reward: Reward) -> bytes:
    """Pickle a reward for the workers.

    Raises:
        UserError: If it cannot be pickled, or a worker could not find it: a lambda, a function inside another one or
            in a notebook, a reward that holds an open connection.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(reward)
    except UserError:
        raise
    except Exception as error:  # pickle raises what the objects' own code does, too
        raise UserError(
            f"model.reward: {_culprit(reward)} cannot be sent to a worker process: {_why(error)}"
        ) from error
    return buffer.getvalue()


def _culprit(reward: Reward) -> str:
    """The first part of the reward that cannot be pickled by itself."""
    for part in list(every_reward(reward))[::-1]:
        try:
            pickle.dumps(part)
        except Exception:
            function = getattr(part, "function", None)
            name = getattr(function, "__qualname__", None) or type(part).__qualname__
            return f"the function {name!r}" if callable(function) else f"the reward {name!r}"
    return f"the reward {type(reward).__qualname__!r}"


def _why(error: Exception) -> str:
    message = " ".join(str(error).split())[:200]
    if "<lambda>" in message or "<locals>" in message or "local object" in message:
        return REMEDY
    return f"{message}; open connections, locks and models in its `warm_up`, or {REMEDY}"
