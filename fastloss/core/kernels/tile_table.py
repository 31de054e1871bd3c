"""Tables of tiles: a line per kind of GPU, in it the tiles by the largest size that they serve."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any, TypeVar

import torch
from triton.runtime import driver

ARCHITECTURES = (120, 100, 90, 80)  # of NVIDIA's, those that a table may have a line for
T = TypeVar("T")


def target_of(device: torch.device) -> str:
    """What kernels are compiled for there, such as "sm_89"."""
    if device.type == "cpu":
        return "interpreter"
    target = driver.active.get_current_target()
    return "gfx942" if target.backend == "hip" else f"sm_{target.arch}"


def line_of(device: torch.device, table: Container[str]) -> str:
    """The line for the current device: one that the table does not know takes the newest older line of its kind."""
    target = target_of(device)
    if not target.startswith("sm_"):
        return target
    lines = (f"sm_{n}" for n in ARCHITECTURES if n <= int(target.removeprefix("sm_")))
    return next(line for line in lines if line in table)


def first_that_serves(size: int, tiles: Iterable[tuple[int, T]]) -> T | None:
    """Of (largest size, tile), the smallest first; None if none is large enough."""
    return next((tile for largest, tile in tiles if size <= largest), None)


def launch_options(warps: int, stages: int) -> dict[str, Any]:
    """Of a kernel with products."""
    # the default of enable_fp_fusion changes in triton 3.10
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def all_registers(warps: int) -> int:
    """As many for each thread as there are for a program: ptxas spills a little at round numbers of its own choice."""
    return min(255, 65536 // (32 * warps))
