"""Contents of a checkpoint, one file or a folder of shards: checked before a run loads it, read for `export`.

A file is what every strategy but the sharded ones writes; FSDP2 and, if told so, FSDP1 write a folder, by PyTorch's
distributed checkpoint, under different keys.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Size, Tensor
from torch.distributed.checkpoint import Metadata, TensorStorageMetadata, load
from typing_extensions import override

from dynamo_lightning.errors import MissingFileError, UserError

WRITERS = {
    "state_dict": (ModelParallelStrategy, "fsdp2"),
    "model": (FSDPStrategy, "FSDPStrategy with state_dict_type sharded"),
}
"""By the key under which a folder has the weights, the strategy that writes and loads it, and its name."""


def is_sharded(path: Path) -> bool:
    """True for a folder of shards."""
    return (path / ".metadata").is_file()


def check_strategy(ckpt_path: str, strategy: Strategy) -> None:
    """Refuse shards that the strategy could not load, before anything is done.

    Raises:
        MissingFileError: If a shard is missing.
        UserError: If another strategy wrote them.
    """
    path = Path(ckpt_path)
    if not is_sharded(path):
        return
    writer, name = WRITERS[weights_key(read_metadata(path), path)]
    if not isinstance(strategy, writer):
        raise UserError(
            f"ckpt_path: {ckpt_path} was written in shards by trainer.strategy {name}, which "
            f"{type(strategy).__name__} cannot load: resume with that strategy, on any number of processes, or "
            "export the policy and start from there"
        )


def check_readable(ckpt_path: str) -> None:
    """Refuse a file that holds more than tensors and plain values, or is no whole checkpoint, before anything is done.

    Raises:
        MissingFileError: If there is no such file.
        UserError: Names what it holds.
    """
    path = Path(ckpt_path)
    if not is_sharded(path):
        _read_file(path)


def check_shapes(saved: Mapping[str, Size], own: Mapping[str, Size], model_name: str) -> None:
    """Raise a ValueError that names the first parameter of a checkpoint that the policy does not have like this."""
    for name, shape in saved.items():
        if own.get(name) != shape:
            raise UserError(
                f"ckpt_path: the checkpoint is of another policy than model.model_name={model_name}: {name} is "
                f"{list(shape)} in the checkpoint, {list(own[name]) if name in own else 'not there'} in the policy"
            )


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, Size]:
    """Shape of each weight, by name."""
    return {name: weight.shape for name, weight in weights.items()}


def weight_shapes(ckpt_path: str) -> dict[str, Size]:
    """Shape of each weight in a checkpoint, by name; nothing large is read.

    Raises:
        MissingFileError: If there is no such checkpoint, or a shard is missing.
        UserError: If it is no checkpoint of Lightning's.
    """
    path = Path(ckpt_path)
    if not is_sharded(path):
        return shapes_of(_read_file(path)["state_dict"])
    metadata = read_metadata(path)
    prefix = f"{weights_key(metadata, path)}."
    return {
        name.removeprefix(prefix): entry.size
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def read_weights(ckpt_path: str) -> dict[str, Tensor]:
    """The whole weights in a checkpoint, by name, on the CPU, without other processes; errors as `weight_shapes`."""
    path = Path(ckpt_path)
    if not is_sharded(path):
        return _read_file(path)["state_dict"]
    metadata = read_metadata(path)
    key = weights_key(metadata, path)
    weights = {
        name: torch.empty(shape, dtype=metadata.state_dict_metadata[f"{key}.{name}"].properties.dtype)  # type: ignore[union-attr]
        for name, shape in weight_shapes(ckpt_path).items()
    }
    load({key: weights}, checkpoint_id=path, no_dist=True)
    return weights


def read_metadata(path: Path) -> Metadata:
    """The index of a folder of shards.

    Raises:
        MissingFileError: If a shard is missing.
        UserError: If the index holds anything but PyTorch's own records.
    """
    try:
        with (path / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError) as error:
        raise _refusal(path / ".metadata", str(error)) from error
    wanted = {info.relative_path for info in metadata.storage_data.values()}
    missing = sorted(name for name in wanted if not (path / name).is_file())
    if missing:
        raise MissingFileError(
            f"ckpt_path: {path} is not complete: {len(missing)} of {len(wanted)} shards are missing, {missing[0]} first"
        )
    return metadata


def weights_key(metadata: Metadata, path: Path) -> str:
    """The key under which a folder has the weights."""
    for key in WRITERS:
        if any(name.startswith(f"{key}.") for name in metadata.state_dict_metadata):
            return key
    raise UserError(f"ckpt_path: {path} has shards, but not of a Lightning checkpoint")


def _read_file(path: Path) -> dict[str, Any]:
    """A checkpoint of one file, its tensors still on disk."""
    if not path.is_file():
        raise MissingFileError(f"ckpt_path: there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise _refusal(path, str(error)) from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error) and "mmap" not in str(error):
            raise
        raise UserError(f"ckpt_path: {path} is not a whole checkpoint: take an earlier one") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"ckpt_path: {path} is not a Lightning checkpoint")
    return checkpoint


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of a folder of shards, which PyTorch writes by pickle: nothing but its own records is built."""

    RECORDS = "torch.distributed.checkpoint.metadata"
    OTHERS = frozenset(
        {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("pathlib._local", "PosixPath"),
            ("pathlib._local", "WindowsPath"),
        }
    )

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.OTHERS or (module == self.RECORDS and name.isidentifier()):
            found = super().find_class(module, name)
            if module != self.RECORDS or getattr(found, "__module__", None) == module:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _refusal(path: Path, message: str) -> UserError:
    """The error for a pickle that holds other objects, or is none."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found is None:
        return UserError(f"ckpt_path: {path} is not a checkpoint, or not a whole one: take an earlier one")
    return UserError(
        f"ckpt_path: {path} is refused: besides tensors and plain values it holds {found.group(1)}, and loading that "
        "can run code. A run's own checkpoints hold no such thing; start from its weights alone if you need them"
    )
