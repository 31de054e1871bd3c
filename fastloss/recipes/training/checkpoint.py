"""Checkpoints: written whole or not at all, read without running code from the file, refused with one clear line."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

VERSION = 1
LAST, BEST = "checkpoint.pt", "best.pt"


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


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The content of a checkpoint file, or of the best (else the last) checkpoint in a folder.

    Raises:
        ValueError: no such file, or one that does not load. The message has the whole first line of the cause, and
            says whether the other checkpoint of the folder loads.
    """
    if path.is_dir():
        path = next((path / name for name in (BEST, LAST) if (path / name).exists()), path / LAST)
    if not path.exists():
        raise ValueError(f"checkpoint: {path} does not exist")
    try:
        return _read(path, device)
    except ValueError as error:
        raise ValueError(f"{error}{_way_out(path)}") from None


def _read(path: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint: {path} is corrupt or no checkpoint ({reason})") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        got = content.get("version") if isinstance(content, dict) else type(content).__name__
        keys = f"; its keys are {', '.join(map(repr, [*content][:6]))}" if isinstance(content, dict) else ""
        raise ValueError(f"checkpoint: {path} has format {got!r}, this fastloss reads {VERSION}{keys}")
    return content


def _way_out(path: Path) -> str:
    """What can be done where `path` does not load: the other checkpoint beside it, if that one does."""
    if path.name not in (LAST, BEST):
        return ""
    other = path.with_name(BEST if path.name == LAST else LAST)
    try:
        step = _read(other, "cpu")["progress"]["step"]
    except (ValueError, KeyError, TypeError):
        return f"; {other.name} beside it does not load either: train again with --overwrite, or in another --out"
    if other.name == LAST:
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
