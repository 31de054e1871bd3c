"""A checkpoint that all ranks write, a folder in the format of torch.distributed.checkpoint.

The tensors of a nested state stand in it under their paths ("model.norm.weight"), so that other programs find them; all
else is one more tensor of bytes. It is read whole, on any number of ranks or on one, and no code of it is run.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from .world import World

METADATA = ".metadata"
_REST, _TENSOR = "rest", "a tensor of this checkpoint"
_OF_METADATA = "torch.distributed.checkpoint.metadata"
_NAMES = {
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
    "collections": ("OrderedDict",),
}
_NAMES["pathlib._local"] = _NAMES["pathlib"]  # its name in Python 3.13


def write_sharded(folder: Path, content: dict[str, Any], world: World) -> None:
    """Write into a temporary folder beside `folder`, then rename: a crash leaves an earlier checkpoint as it was, for a
    moment under the name of :func:`previous`. The tensors are the same on all ranks, which share the writing."""
    tensors: dict[str, Tensor] = {}
    rest = _taken_apart(content, "", tensors)
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    tensors[_REST] = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    temporary = folder.with_name(f".{folder.name}.{world.same(os.getpid())}")

    def rename() -> None:
        before = previous(folder)
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            os.replace(folder, before)
        os.replace(temporary, folder)
        shutil.rmtree(before, ignore_errors=True)

    try:
        world.first(lambda: temporary.mkdir())
        tensors[_REST] = world.same(tensors[_REST])  # rank 0's; and as large on all
        with _quiet():
            dcp.save(tensors, checkpoint_id=str(temporary), process_group=world.control, no_dist=world.size == 1)
        world.first(rename)
    except (OSError, CheckpointException) as error:
        raise ValueError(f"out: cannot write the checkpoint {folder}: {_reason(error)}") from error
    finally:
        if world.main:
            shutil.rmtree(temporary, ignore_errors=True)


def previous(folder: Path) -> Path:
    """Where the earlier checkpoint is while a new one takes its place."""
    return folder.with_name(f".{folder.name}.previous")


def read_sharded(folder: Path, device: torch.device | str = "cpu") -> Any:
    """What was written.

    Raises:
        ValueError: files are missing or damaged, or it was not written by :func:`write_sharded`.
    """
    try:
        metadata = _read_metadata(folder / METADATA)
        shapes = {name: entry for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}
        if _REST not in shapes:
            raise ValueError(f"its entries are {', '.join(map(repr, [*metadata.state_dict_metadata][:6])) or 'none'}")
        tensors = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in shapes.items()}
        with _quiet():
            dcp.load(tensors, checkpoint_id=str(folder), no_dist=True)
        rest = torch.load(io.BytesIO(tensors[_REST].numpy().tobytes()), weights_only=True)
        return _put_together(rest, {name: tensor.to(device) for name, tensor in tensors.items()})
    except (Exception, CheckpointException) as error:  # damaged files raise all kinds of errors
        raise ValueError(f"checkpoint: {folder} is corrupt or no checkpoint ({_reason(error)})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _taken_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value with a mark in place of each tensor, which goes to `tensors` under its path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {key: _taken_apart(item, f"{path}.{key}" if path else str(key), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_taken_apart(item, f"{path}.{i}", tensors) for i, item in enumerate(value)])
    return value


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if list(value) == [_TENSOR]:
            return tensors[value[_TENSOR]]
        return {key: _put_together(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_put_together(item, tensors) for item in value])
    return value


class _MetadataReader(pickle.Unpickler):
    """Makes nothing but what torch's own metadata are of: a pickle can name any function to be called."""

    def find_class(self, module: str, name: str) -> Any:
        kinds = (torch.dtype, torch.layout, type)
        of_torch = module == "torch" and isinstance(getattr(torch, name, None), kinds)
        if of_torch or module == _OF_METADATA or name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its {METADATA} names {module}.{name}, which no checkpoint needs")


def _read_metadata(path: Path) -> Any:
    if not path.exists():
        raise ValueError(f"it has no {METADATA}, which is written last: it is not whole")
    with open(path, "rb") as file:
        return _MetadataReader(file).load()


def _reason(error: BaseException) -> str:
    """The first line of the cause; torch.distributed.checkpoint wraps those of the ranks."""
    if isinstance(error, CheckpointException):
        error = next((cause for cause, _ in error.failures.values()), error)
    text = str(error)
    return text.splitlines()[0] if text else type(error).__name__
