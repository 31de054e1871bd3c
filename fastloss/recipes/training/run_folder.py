"""A run's folder: never one that has another run, none left by a failed start, no temporary files of killed runs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .checkpoint import BEST, LAST, SHARDED, prepare_folder
from .sharded import previous

RUN = (
    LAST,
    SHARDED,
    BEST,
    "report.md",
    "samples.png",
    "retrieval.png",
    "curves.png",
)  # a folder with one of them has a run
METRICS = "metrics.csv"


def check_free(folder: Path) -> None:
    """Raise a ValueError that names the ways out where the folder has a run.

    A run that was killed before its first checkpoint was whole left nothing to go on with: its folder is free.
    """
    there = [name for name in RUN if (folder / name).exists()]
    if there:
        raise ValueError(
            f"out: {folder} has a run already ({', '.join(there)}); --resume continues it, --overwrite deletes it, "
            "another --out leaves it as it is"
        )


@contextlib.contextmanager
def started(folder: Path) -> Iterator[None]:
    """Make the folder and see that it can be written to; where the block raises, folders made here go again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        prepare_folder(folder)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # one that has something in it stays
                path.rmdir()
        raise


def clear(folder: Path) -> None:
    """Delete what a run left: its pictures, curves, checkpoints, report and events. Other files stay."""
    if not any((folder / name).exists() for name in (*RUN, METRICS)):
        return
    for name in (*RUN, METRICS):
        _delete(folder / name)
    _delete(previous(folder / SHARDED))
    for path in (folder / "tensorboard").glob("events.out.tfevents.*"):
        path.unlink(missing_ok=True)


def clear_temporary(folder: Path) -> None:
    """Delete the temporary files of runs that were killed while they wrote; those of processes that live stay."""
    for path in folder.glob(".*"):
        pid = path.name.rpartition(".")[2].rpartition("-")[2]
        ours = path.name.startswith((f".{LAST}.", f".{SHARDED}.", f".{BEST}.", ".writable-")) and pid.isdigit()
        if path.name == ".metrics.csv" or (ours and not _lives(int(pid))):
            _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return pid != os.getpid()
