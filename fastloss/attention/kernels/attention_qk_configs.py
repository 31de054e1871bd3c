"""The sizes of tiles of the attention kernels: by kind of GPU, dtype and head dimension.

Chosen by what compiles without spills and fits into shared memory, tried for masked, causal and packed rows too, with
Triton 3.6 and 3.8; measured on no device yet. A tuned line replaces one here, nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core.kernels.launch import registers
from ...core.kernels.tile_table import all_registers, first_that_serves, launch_options, line_of

FORWARD, OF_QUERIES, OF_KEYS = "forward", "of queries", "of keys"  # what a kernel computes


class Tile(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return launch_options(self.warps, self.stages) | registers(all_registers(self.warps))


# float32 is multiplied without matrix instructions, whose tf32 has too few digits.
_Line = dict[str, tuple[tuple[int, Tile], ...]]  # by what a kernel computes, the tiles by largest head dimension
_FULL: _Line = {
    FORWARD: ((64, Tile(32, 32, 4, 1)), (256, Tile(16, 16, 4, 1))),
    OF_QUERIES: ((64, Tile(32, 32, 8, 1)), (256, Tile(16, 16, 4, 1))),
    OF_KEYS: ((64, Tile(32, 32, 8, 1)), (256, Tile(16, 16, 4, 1))),
}
# Sums of both views' 32 rows of 256 numbers fill the registers.
_WIDEST_ROWS, _WIDEST = (256, Tile(16, 32, 4, 1)), (256, Tile(32, 32, 8, 1))
_SMALL: dict[str, _Line] = {  # of matrix instructions that take any 16 rows
    "half": {
        FORWARD: ((64, Tile(32, 64, 8, 2)), (128, Tile(16, 64, 8, 2)), _WIDEST_ROWS),
        OF_QUERIES: ((128, Tile(32, 32, 8, 2)), _WIDEST),
        OF_KEYS: ((128, Tile(32, 32, 8, 2)), _WIDEST),
    },
    "full": _FULL,
}
TABLE: dict[str, dict[str, _Line]] = {
    "sm_80": _SMALL,
    "sm_90": {  # wgmma takes 64 rows: those of the outer loop, but for the widest heads
        "half": {
            FORWARD: ((64, Tile(64, 64, 8, 2)), (128, Tile(64, 16, 8, 2)), _WIDEST_ROWS),
            OF_QUERIES: ((128, Tile(64, 32, 8, 2)), _WIDEST),
            OF_KEYS: ((128, Tile(16, 64, 8, 2)), _WIDEST),
        },
        "full": _FULL,
    },
    "sm_100": {  # the same of tcgen05
        "half": {
            FORWARD: ((128, Tile(64, 32, 8, 2)), _WIDEST_ROWS),
            OF_QUERIES: ((128, Tile(64, 32, 8, 2)), _WIDEST),
            OF_KEYS: ((64, Tile(16, 64, 8, 2)), (128, Tile(32, 32, 8, 2)), _WIDEST),
        },
        "full": _FULL,
    },
    "sm_120": _SMALL,
    "gfx942": {
        "half": {
            FORWARD: ((64, Tile(64, 64, 8, 2)), (128, Tile(32, 32, 4, 1)), _WIDEST_ROWS),
            OF_QUERIES: ((64, Tile(64, 32, 8, 2)), (128, Tile(64, 32, 8, 1)), (256, Tile(16, 16, 8, 1))),
            OF_KEYS: ((128, Tile(32, 32, 4, 1)), (256, Tile(16, 32, 8, 1))),
        },
        "full": _FULL | {OF_KEYS: ((64, Tile(32, 32, 4, 1)), (256, Tile(16, 16, 4, 1)))},
    },
    "interpreter": {
        kind: {what: ((256, Tile(16, 16, 4, 1)),) for what in (FORWARD, OF_QUERIES, OF_KEYS)}
        for kind in ("half", "full")
    },
}


def tile_of(like: torch.Tensor, what: str, dim: int) -> Tile:
    """The tile for head dimensions up to `dim` on the current device."""
    kinds = TABLE[line_of(like.device, TABLE)]
    tile = first_that_serves(dim, kinds["full" if like.dtype == torch.float32 else "half"][what])
    assert tile is not None
    return tile
