"""Files that ship inside the package: a name such as `embedded:arithmetic/train.jsonl` stands for their path."""

from __future__ import annotations

from pathlib import Path

from dynamo_lightning.errors import MissingFileError

PREFIX = "embedded:"
ASSETS = Path(__file__).parent.parent / "assets"


def local_path(name: str) -> str:
    """Return the path of an embedded file or folder; any other name comes back unchanged.

    Args:
        name: `embedded:` and a path within the package's `assets` folder, or anything else.

    Raises:
        MissingFileError: If there is no such embedded file; the message lists those there are.
    """
    if not name.startswith(PREFIX):
        return name
    wanted = name.removeprefix(PREFIX).strip("/")
    files = sorted(path for path in ASSETS.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"})
    available = [path.relative_to(ASSETS).as_posix() for path in files]
    if wanted and any(file == wanted or file.startswith(f"{wanted}/") for file in available):
        return str(ASSETS / wanted)
    listed = ", ".join(PREFIX + file for file in available) or "none in this installation"
    raise MissingFileError(f"there is no {name!r}; embedded files: {listed}")
