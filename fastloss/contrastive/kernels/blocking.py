"""How the logits are cut: into chunks of rows, into blocks, and into walks of programs."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import odd_number
from ..save_plan import MOST_PITCH, exponentials
from .tile_configs import Tile

# Of the self-similarity form the triangle above the diagonal is made, in up to STRIPS blocks of rows, of at least
# MIN_STRIP_ROWS. What lies below the diagonal in them is made in vain: with STRIPS about 1 / STRIPS of the triangle.
STRIPS, MIN_STRIP_ROWS = 16, 1024
CHUNK = 128  # a chunk has a multiple of so many rows, where the workspace holds as many


class Chunk(NamedTuple):
    """Rows whose logits are made at a time, and the memory of their exponentials."""

    rows: int
    elements: int
    pitch: int  # elements from one row to the next


class Walk(NamedTuple):
    """Program (g, s) walks over the row tiles g, g + groups, .. and in each over the column tiles s, s + splits, .."""

    groups: int
    splits: int

    def odd(self) -> Walk:
        return Walk(odd_number(self.groups), odd_number(self.splits))


@triton.jit
def walk_in(odd):
    return Walk(number_in(odd.groups), number_in(odd.splits))


def chunk_plan(rows: int, columns: int, itemsize: int, workspace_mib: float) -> Chunk:
    """As many rows as the workspace holds exponentials of, but one at least; chunks of alike sizes: a short last one
    would leave most of a device idle."""
    one_row = exponentials(1, columns, itemsize)
    fit = int(workspace_mib * 2**20) // (one_row.elements * itemsize)
    if columns > MOST_PITCH:
        fit = min(fit, 2**31 // one_row.pitch - 1)
    chunk_rows = min(rows, max(fit, 1) if fit < CHUNK else _even(rows, fit // CHUNK * CHUNK, CHUNK))
    return Chunk(chunk_rows, *exponentials(chunk_rows, columns, itemsize))


def block_plan(rows: int, columns: int, elements: int, tile: Tile, self_similarity: bool = False) -> tuple[int, int]:
    """(rows, columns) of the blocks of G that `elements` hold, whole tiles of columns: square where not all fits.

    A block reads and writes the sums of the gradients of its rows and of its columns once: of blocks of one size a
    square has the fewest of these. With `self_similarity` blocks begin at the diagonal, and the more rows they have,
    the more of them lies below it and is made in vain.
    """
    if self_similarity and rows > MIN_STRIP_ROWS:
        rows = _even(rows, max(MIN_STRIP_ROWS, rows // STRIPS), max(tile.rows, tile.columns))
    padded = triton.cdiv(columns, tile.columns) * tile.columns
    if rows * padded <= elements and padded <= MOST_PITCH:
        return rows, padded
    block_columns = min(padded, MOST_PITCH, max(math.isqrt(elements), elements // rows)) // tile.columns * tile.columns
    block_columns = _even(columns, max(block_columns, tile.columns), tile.columns)
    fit = elements // block_columns
    if fit < tile.rows:
        return min(rows, max(fit, 1)), block_columns
    return min(rows, _even(rows, fit // tile.rows * tile.rows, tile.rows)), block_columns


def _even(total: int, max_size: int, unit: int) -> int:
    """The size, at most `max_size` and a multiple of `unit`, of the fewest pieces of `total`, alike in size."""
    pieces = triton.cdiv(total, max_size)
    return triton.cdiv(triton.cdiv(total, pieces), unit) * unit


@functools.lru_cache(maxsize=256)
def walk_plan(row_tiles: int, column_tiles: int, programs: int) -> Walk:
    """The walk whose longest program is shortest and, of those about as short, the one with the fewest groups + splits.

    That sum is how many slots there are, and how many tiles of embeddings the caches must hold at a time.
    """

    def cost(walk: Walk) -> float:
        longest = -(-row_tiles // walk.groups) * -(-column_tiles // walk.splits)
        return longest * (1 + (walk.groups + walk.splits) / 2000)

    walks = (Walk(min(row_tiles, programs // s), s) for s in range(1, min(column_tiles, programs) + 1))
    return min(walks, key=cost)
