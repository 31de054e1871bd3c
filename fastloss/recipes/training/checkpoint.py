"""Checkpoints: written whole or not at all, read without running code from the file, refused with one clear line."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from .sharded import METADATA, previous, read_sharded, write_sharded
from .world import World

VERSION = 1
LAST, BEST = "checkpoint.pt", "best.pt"
SHARDED = "checkpoint"  # the folder that several ranks write in place of LAST


def prepare_folder(folder: Path) -> None:
    """Make the folder and write a byte into it, so that a run fails at its start and not at its first checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder}: {error.strerror or error}") from error


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write beside the target, flush to disk, then rename: a crash leaves the earlier checkpoint as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(content | {"version": VERSION}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"out: cannot write the checkpoint {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_last(folder: Path, content: dict[str, Any], world: World) -> None:
    """The state of a run: a file by a process alone, a folder by several. Each is read on any number of ranks, so the
    one of an earlier number of them goes."""
    if world.size == 1:
        save_checkpoint(folder / LAST, content)
        for old in (folder / SHARDED, previous(folder / SHARDED)):
            shutil.rmtree(old, ignore_errors=True)
    else:
        write_sharded(folder / SHARDED, content | {"version": VERSION}, world)
        if world.main:
            (folder / LAST).unlink(missing_ok=True)


def last_checkpoint(folder: Path) -> Path | None:
    """Where the state of the run in `folder` is: the later one, where a kill left two."""
    found = [path for path in (folder / LAST, folder / SHARDED, previous(folder / SHARDED)) if path.exists()]
    return max(found, key=_written, default=None)


def _written(path: Path) -> float:
    metadata = path / METADATA
    return (metadata if metadata.exists() else path).stat().st_mtime


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, a file or a folder of :func:`write_sharded`, or of the best (else the last) one of a
    run's folder.

    Raises:
        ValueError: no such file, or one that does not load. The message has the whole first line of the cause, and
            says whether the other checkpoint of the folder loads.
    """
    if path.is_dir() and not _is_sharded(path):
        path = path / BEST if (path / BEST).exists() else last_checkpoint(path) or path / LAST
    if not path.exists():
        raise ValueError(f"checkpoint: {path} does not exist")
    try:
        return _read(path, device)
    except ValueError as error:
        raise ValueError(f"{error}{_way_out(path)}") from None


def _is_sharded(path: Path) -> bool:
    return path.name in (SHARDED, previous(path.with_name(SHARDED)).name) or (path / METADATA).exists()


def _read(path: Path, device: torch.device | str) -> dict[str, Any]:
    content = read_sharded(path, device) if path.is_dir() else _read_file(path, device)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        got = content.get("version") if isinstance(content, dict) else type(content).__name__
        keys = f"; its keys are {', '.join(map(repr, [*content][:6]))}" if isinstance(content, dict) else ""
        raise ValueError(f"checkpoint: {path} has format {got!r}, this fastloss reads {VERSION}{keys}")
    return content


def _read_file(path: Path, device: torch.device | str) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint: {path} is corrupt or no checkpoint ({reason})") from error


def check_recipe(content: dict[str, Any], recipe: str, path: Path) -> None:
    """Raise a ValueError where the checkpoint is of another recipe; those without a name are of "train"."""
    found = content.get("recipe", "train")
    if found != recipe:
        raise ValueError(f"checkpoint: {path} is of `fastloss {found}`, expected one of `fastloss {recipe}`")


def _way_out(path: Path) -> str:
    """What can be done where `path` does not load: the other checkpoint beside it, if that one does."""
    if path.name not in (LAST, BEST, SHARDED):
        return ""
    other = last_checkpoint(path.parent) or path.with_name(LAST) if path.name == BEST else path.with_name(BEST)
    try:
        step = _read(other, "cpu")["progress"]["step"]
    except (ValueError, KeyError, TypeError):
        return f"; {other.name} beside it does not load either: train again with --overwrite, or in another --out"
    if path.name == BEST:
        return f"; {other} (step {step}) loads: sample from it with --checkpoint {other}, or delete {path.name}"
    return (
        f"; {other} (the best model, of step {step}) loads: sample from it with --checkpoint {other}. It has no "
        "training state, so to train on, start again with --overwrite, or in another --out"
    )


def rng_state() -> dict[str, Any]:
    """The state of torch's generators. Data order does not depend on them, it follows from seed and epoch."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
