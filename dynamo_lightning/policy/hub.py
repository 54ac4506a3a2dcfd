"""Models by hub id: a name that cannot be had is found out in seconds, not after a minute of retries."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from dynamo_lightning.errors import UserError

CONNECTION_SECONDS = 5.0


def require_model(model_name: str, revision: str | None = None) -> None:
    """Refuse a model that is no folder here, is not in the cache, and cannot be asked of the hub.

    Args:
        model_name: Path or hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: Says which of the three it is not.
    """
    if Path(model_name).expanduser().is_dir():
        return
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    missing = f"model.model_name={model_name!r}: there is no such folder in {str(Path.cwd())!r}"
    try:
        if isinstance(try_to_load_from_cache(model_name, "config.json", revision=revision), str):
            return
    except HFValidationError as error:
        raise UserError(f"{missing}, and it is no hub id") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{missing}, and the cache has no such model while HF_HUB_OFFLINE is set")
    address = urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies():
        return  # a proxy knows ways that this process does not
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((str(address.hostname), port), CONNECTION_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"{missing}, the cache has no such model, and the hub cannot be reached ({error}): give the path of a "
            "folder, or download the model beforehand"
        ) from error


@contextmanager
def loading(model_name: str) -> Iterator[None]:
    """Name the option in one line if transformers does not find what it needs of a model, or may not run its code.

    Raises:
        UserError: With the first line of what it says, or the option that allows the model's code.
    """
    try:
        yield
    except OSError as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"model.model_name={model_name!r}: {first}") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"model.model_name={model_name!r} comes with code of its own, which does not run unless "
            "model.policy.trust_remote_code=true: read that code first"
        ) from error
