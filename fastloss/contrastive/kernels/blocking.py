"""How the logits are cut: into chunks of rows, into blocks, and into walks of programs."""

from __future__ import annotations

import functools
import math

import triton

from ..save_plan import exponentials
from .tile_configs import Tile

# "upper": the triangle above the diagonal is made in up to STRIPS blocks of rows, of LOWEST rows at least. What lies
# below the diagonal in them is made in vain: with STRIPS of them about 1 / STRIPS of the triangle.
STRIPS, LOWEST = 16, 1024
CHUNK = 128  # a chunk has a multiple of so many rows, where the workspace holds as many


def chunk_plan(rows: int, columns: int, itemsize: int, workspace_mib: float) -> tuple[int, int, int]:
    """(rows, elements, pitch) of a chunk: as many rows of exponentials as the workspace holds, one at least."""
    one, pitch = exponentials(1, columns, itemsize)
    height = int(workspace_mib * 2**20) // (one * itemsize)
    height = min(rows, max(height // CHUNK * CHUNK or height, 1))
    return height, exponentials(height, columns, itemsize)[0], pitch


def block_plan(rows: int, columns: int, elements: int, tile: Tile, upper: bool = False) -> tuple[int, int]:
    """(rows, columns) of the blocks of G that `elements` hold, whole tiles of columns: square where not all fits.

    A block reads and writes the sums of the gradients of its rows and of its columns once: of blocks of one size a
    square has the fewest of these. `upper`: blocks begin at the diagonal, and the more rows they have, the more of them
    lies below it and is made in vain.
    """
    if upper and rows > LOWEST:
        rows = _even(rows, max(LOWEST, rows // STRIPS), max(tile.rows, tile.columns))
    padded = triton.cdiv(columns, tile.columns) * tile.columns
    if rows * padded <= elements:
        return rows, padded
    wide = min(padded, max(math.isqrt(elements), elements // rows)) // tile.columns * tile.columns
    wide = _even(columns, max(wide, tile.columns), tile.columns)
    high = elements // wide
    return min(rows, _even(rows, high // tile.rows * tile.rows, tile.rows) if high >= tile.rows else max(high, 1)), wide


def _even(total: int, most: int, unit: int) -> int:
    """The size, at most `most` and a multiple of `unit`, of the fewest pieces of `total`, alike in size."""
    pieces = triton.cdiv(total, most)
    return triton.cdiv(triton.cdiv(total, pieces), unit) * unit


@functools.lru_cache(maxsize=256)
def walk_plan(row_blocks: int, column_blocks: int, programs: int) -> tuple[int, int]:
    """(groups, splits): program (g, s) walks over row blocks g, g + groups, .. and column blocks s, s + splits, ..

    Chosen is the plan whose longest walk is shortest and, of those about as short, the one with the fewest slots,
    groups + splits. That is also how many blocks of embeddings the caches must hold at a time.
    """

    def cost(groups: int, splits: int) -> float:
        return -(-row_blocks // groups) * -(-column_blocks // splits) * (1 + (groups + splits) / 2000)

    plans = ((min(row_blocks, programs // s), s) for s in range(1, min(column_blocks, programs) + 1))
    return min(plans, key=lambda plan: cost(*plan))
