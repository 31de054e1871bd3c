"""Ranks of a test as plain processes, not by torchrun, which kills the others when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_ranks(
    module: str, arguments: Callable[[int], list[str]], world: int, folder: Path, timeout: int, **environment: str
) -> list[Any]:
    """What `python -m module *arguments(rank)` saved to FOLDER/RANK.pt on each rank; an AssertionError with the output
    of all if one failed. The processes have torchrun's RANK, LOCAL_RANK and WORLD_SIZE."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)} | environment
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments(rank)], env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [f"rank {rank}: {text[-3000:]}" for rank, text in enumerate(said) if processes[rank].returncode]
    assert not failed, "\n".join(failed)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
