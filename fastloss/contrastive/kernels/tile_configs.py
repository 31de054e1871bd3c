"""The configurations of the contrastive kernels: one line per architecture, dtype and size D of the embeddings.

Chosen by what compiles without spills at two programs per multiprocessor, so that one program's exponentials overlap
the other's products; sm_90's by measurement too, on an H200, the others' on no device yet. A tuned line replaces one
here, nothing else. `programs` is how many the forward launches at most: those that a device holds at once, fixed per
architecture so that sums have one order on all its devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...core.kernels.tile_table import all_registers, first_that_serves, launch_options, line_of
from .arguments import TileConstants


@dataclass(frozen=True)
class Tile:
    """A tile of logits, and how a program that makes it is launched."""

    rows: int
    columns: int
    dim: int  # so many numbers of the embeddings are multiplied at a time
    operands: int  # POINTERS, DESCRIPTORS or PRODUCTS, see below
    shares: bool  # rows and columns share exponentials where they can: fewer of them, for more code and registers
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most; None: as the compiler likes

    @property
    def constants(self) -> TileConstants:
        return TileConstants(self.rows, self.columns, self.dim, self.operands, self.shares)

    @property
    def options(self) -> dict[str, Any]:
        given = launch_options(self.warps, self.stages)
        return given if self.registers is None else given | {"maxnreg": self.registers}


# Embeddings by pointers or by tensor descriptors, multiplied by `tl.dot`; or a block of their products, which a library
# has made: without matrix instructions `tl.dot` reaches a tenth of its rate, and with tf32's three products no digits.
POINTERS, DESCRIPTORS, PRODUCTS = 0, 1, 2
HALF, FULL = "half", "full"
# Bytes that ptxas has on the stack in the symmetric forward that saves exponentials, at most (8 with triton 3.6):
# scalars that it reads again once a tile. A tile half as wide has none and takes a quarter longer on an H200.
SPILLED = 24
# programs; per kind of product the tiles by largest D they serve, last the tile where M and N are small
_FULL = ((1 << 30, Tile(32, 128, 16, PRODUCTS, True, 4, 1)), (0, Tile(32, 64, 16, PRODUCTS, True, 4, 1)))
TABLE: dict[str, tuple[int, dict[str, tuple[tuple[int, Tile], ...]]]] = {
    "sm_80": (216, {FULL: _FULL, HALF: (
        (32, Tile(128, 128, 32, POINTERS, False, 8, 3)),
        (1 << 30, Tile(128, 128, 64, POINTERS, False, 8, 3)), (0, Tile(64, 64, 32, POINTERS, False, 4, 3)),
    )}),
    "sm_90": (264, {FULL: _FULL, HALF: (
        (32, Tile(128, 128, 32, DESCRIPTORS, True, 4, 3)),
        (1 << 30, Tile(128, 128, 64, DESCRIPTORS, True, 4, 3)), (0, Tile(64, 64, 64, DESCRIPTORS, True, 4, 4)),
    )}),
    "sm_100": (148, {FULL: _FULL, HALF: (
        (32, Tile(128, 64, 32, DESCRIPTORS, True, 16, 4)),
        (1 << 30, Tile(128, 64, 64, DESCRIPTORS, True, 16, 4)), (0, Tile(64, 64, 64, DESCRIPTORS, True, 4, 4)),
    )}),
    "sm_120": (340, {FULL: _FULL, HALF: (
        (32, Tile(128, 64, 32, POINTERS, False, 8, 3)),
        (1 << 30, Tile(128, 64, 64, POINTERS, False, 8, 3)), (0, Tile(64, 64, 32, POINTERS, False, 4, 3)),
    )}),
    "gfx942": (608, {FULL: _FULL, HALF: (
        (1 << 30, Tile(128, 64, 32, POINTERS, False, 8, 2)), (0, Tile(64, 64, 32, POINTERS, False, 4, 2)),
    )}),
    "interpreter": (6, {
        kind: ((1 << 30, Tile(16, 16, 16, operands, True, 4, 1)), (0, Tile(16, 16, 16, operands, True, 4, 1)))
        for kind, operands in ((HALF, POINTERS), (FULL, PRODUCTS))
    }),
}  # fmt: skip


def products_kind(dtype: torch.dtype) -> str:
    return FULL if dtype == torch.float32 else HALF


def with_all_registers(tile: Tile) -> Tile:
    return replace(tile, registers=all_registers(tile.warps))


def best_tile(
    device: torch.device, kind: str, rows: int, columns: int, dim: int, register_pressure: int = 0
) -> tuple[Tile, int]:
    """The tile for a problem, and the number of programs.

    Options hold more in registers: of `register_pressure` 1 a program has more warps, of 2 it has the small tile too,
    of 3 only a part of that tile.
    """
    line = line_of(device, TABLE)
    programs, kinds = TABLE[line]
    *tiles, (_, small) = kinds[kind]
    tile = first_that_serves(dim, tiles)
    assert tile is not None
    few = -(-rows // tile.rows) * -(-columns // tile.columns) < programs // 2
    if register_pressure == 3 and line == "gfx942":
        tile = replace(small, rows=32, columns=32)
    elif register_pressure == 3:
        tile = replace(small, columns=32, warps=8, stages=2)
    elif register_pressure == 2:
        tile = replace(small, warps=8)
    elif few:
        tile = small
    elif register_pressure == 1:
        tile = replace(tile, warps=max(tile.warps, 8))
    told = line.startswith("sm_") and (kind == HALF or register_pressure == 3)
    return (with_all_registers(tile) if told else tile), programs
