"""Log-sum-exps of rows and the keys weighted by their softmax, in one pass over keys that need no gradient.

    s_ij = r_i c_j <q_i, k_j>          state_i: maximum, and sum of e^s_ij / 2^exponent_i      as in online_softmax.py
    sum_i = sum_j e^s_ij / 2^exponent_i c_j k_j                 over it and the sum of exponentials: the weighted keys

A tile of keys is read once for both products: the logits, and what they weigh. So no exponential is ever stored, and a
byte of keys serves twice the multiplications. The sums of a tile's rows stay in registers, which bounds D. Each split
of the keys leaves a state and a sum of each row; who merges them: softmax_loss_shared.py.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import odd_number
from ...core.kernels.tile_table import first_that_serves, line_of
from . import tile_configs
from .arguments import Columns, Operands, Rows, Sizes, sizes_in
from .logit_tile import DESCRIPTORS
from .online_softmax import State, _exp_scaled, _exponent, _no_state, _rescale, _store_state
from .passes import SLOT_ROWS
from .tile_configs import POINTERS, Tile

_TMA = tile_configs.DESCRIPTORS
# Programs that a device of the architecture holds at once, fixed so that sums have one order on all of these; tiles by
# the largest D whose sums and logits fit into the registers, and whose keys, two tiles of them, fit into shared memory
# beside the queries. A tile's `dim` is D, padded to a power of two. No device has measured them yet.
TABLE: dict[str, tuple[int, tuple[tuple[int, Tile], ...]]] = {
    "sm_80": (108, (
        (128, Tile(64, 64, 128, POINTERS, False, 8, 2, 255)), (256, Tile(64, 32, 256, POINTERS, False, 8, 2, 255)),
    )),
    "sm_90": (132, (
        (128, Tile(128, 128, 128, _TMA, False, 8, 2, 255)), (256, Tile(128, 64, 256, _TMA, False, 8, 2, 255)),
        (512, Tile(64, 64, 512, _TMA, False, 8, 2, 255)),
    )),
    "sm_100": (148, (
        (128, Tile(128, 128, 128, _TMA, False, 8, 2, 255)), (256, Tile(128, 64, 256, _TMA, False, 8, 2, 255)),
    )),
    "sm_120": (170, (
        (128, Tile(64, 64, 128, _TMA, False, 8, 2, 255)), (256, Tile(64, 32, 256, _TMA, False, 8, 2, 255)),
    )),
    "interpreter": (6, ((32, Tile(16, 16, 32, POINTERS, False, 4, 1)),)),
}  # fmt: skip
EDGE_TILES = 4  # so many tiles take as long as what a program does before its first and after its last


class Partials(NamedTuple):
    """What the splits leave."""

    states: Tensor  # [splits, 2, pitch] float32: maxima, and sums of exponentials
    sums: Tensor  # [splits, M, D] float32
    pitch: int  # M, rounded up to whole vectors


@triton.jit
def _weighted_keys_kernel(
    query,  # (M, D): see Operands
    key,  # (N, D)
    row_scale_ptr,  # (M,)
    column_scale_ptr,  # (N,) or None
    row_ids_ptr,  # (M,) int64 or None: keys of the same id are left out
    column_ids_ptr,  # (N,) int64 or None
    partials,  # Partials
    sizes,  # Sizes
    splits,  # an odd_number
    TILE: tl.constexpr,  # TileConstants; its dim is D, padded to a power of two
):
    BM: tl.constexpr = TILE.rows
    BN: tl.constexpr = TILE.columns
    DIM: tl.constexpr = TILE.dim
    OPERANDS: tl.constexpr = TILE.operands
    # Of a product that another one takes, Triton gives each warp rows of its own; eight warps would make 64 rows twice.
    # It does not see through a branch that the other one takes it.
    FEW_ROWS: tl.constexpr = BM == 64
    sizes, splits = sizes_in(sizes), number_in(splits)
    row_tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    row0 = row_tile * BM
    row, inner = row0 + tl.arange(0, BM), tl.arange(0, DIM)
    inside = (row < sizes.rows)[:, None] & (inner < sizes.dim)[None, :]
    if OPERANDS == DESCRIPTORS:
        q = query.load([row0, 0])
    else:
        q = tl.load(query + row.to(tl.int64)[:, None] * sizes.dim + inner[None, :], mask=inside, other=0.0)
    row_scale = tl.load(row_scale_ptr + row, mask=row < sizes.rows, other=0.0)
    state = _no_state(BM)
    sums = tl.zeros((BM, DIM), tl.float32)
    for column_tile in range(split, tl.cdiv(sizes.columns, BN), splits):
        column0 = column_tile * BN
        column = column0 + tl.arange(0, BN)
        there = column < sizes.columns
        if OPERANDS == DESCRIPTORS:
            k = key.load([column0, 0])
        else:
            k_ptr = key + column.to(tl.int64)[:, None] * sizes.dim + inner[None, :]
            k = tl.load(k_ptr, mask=there[:, None] & (inner < sizes.dim)[None, :], other=0.0)
        s = tl.dot(q, k.T)
        if FEW_ROWS:
            if sizes.columns > 0:  # always, which the compiler does not know
                s *= row_scale[:, None]
        else:
            s *= row_scale[:, None]
        if column_scale_ptr is not None:
            column_scale = tl.load(column_scale_ptr + column, mask=there, other=0.0)
            s *= column_scale[None, :]
        allowed = there[None, :]
        if column_ids_ptr is not None:
            row_id = tl.load(row_ids_ptr + row, mask=row < sizes.rows, other=0)
            allowed &= row_id[:, None] != tl.load(column_ids_ptr + column, mask=there, other=0)[None, :]
        s = tl.where(allowed, s, float("-inf"))
        row_max = tl.maximum(state.max, tl.max(s, 1))
        exponent = _exponent(row_max)
        e = _exp_scaled(s, exponent[:, None])
        before = _rescale(state.max, row_max, _exponent(state.max))
        sum_exp = state.sum_exp * before + tl.sum(e, 1)
        state = State(row_max, sum_exp, sum_exp, sum_exp, sum_exp, sum_exp)
        if column_scale_ptr is not None:
            e *= column_scale[None, :]
        sums = tl.dot(e.to(k.dtype), k, sums * before[:, None])
    stride = tl.cast(partials.pitch, tl.int64)
    _store_state(partials.states + split * 2 * stride, state, row, stride, row < sizes.rows, False, False)
    corner = partials.sums + (split.to(tl.int64) * sizes.rows + row0) * sizes.dim
    offset = tl.arange(0, BM)[:, None] * sizes.dim + inner[None, :]
    tl.store(corner + offset, sums, mask=inside)


def tile_of(query: Tensor, elements: int) -> tuple[Tile, int] | None:
    """The tile for padded embeddings, and the number of programs; None: another way must be taken.

    Only bfloat16 has the range of float32, which the product of exponentials and inverse norms needs. The workspace, of
    so many float32 `elements`, must hold the sums of all rows at least once.
    """
    dim = query.shape[1]
    if query.dtype != torch.bfloat16 or query.numel() > elements:
        return None
    programs, tiles = TABLE.get(line_of(query.device, tile_configs.TABLE), (0, ()))
    tile = first_that_serves(dim, tiles)
    return None if tile is None else (replace(tile, dim=triton.next_power_of_2(dim)), programs)


@functools.lru_cache(maxsize=256)
def splits_of(row_tiles: int, column_tiles: int, programs: int, most: int) -> int:
    """Into how many parts, `most` at most, the keys are cut: the fewest of those that are about the fastest."""

    def cost(splits: int) -> float:
        rounds = -(-row_tiles * splits // programs)
        return rounds * (-(-column_tiles // splits) + EDGE_TILES) * (1 + splits / 2000)

    return min(range(1, max(min(column_tiles, programs, most), 1) + 1), key=cost)


def weighted_keys(
    query: Tensor, key: Tensor, rows: Rows, columns: Columns, tile: Tile, programs: int, workspace_mib: float
) -> Partials:  # fmt: skip
    """The states and sums of each split of the keys, of padded embeddings; of the vectors the scales and ids count."""
    (m, dim), n = query.shape, key.shape[0]
    row_tiles, column_tiles = triton.cdiv(m, tile.rows), triton.cdiv(n, tile.columns)
    splits = splits_of(row_tiles, column_tiles, programs, int(workspace_mib * 2**18) // (m * dim))
    pitch = triton.cdiv(m, SLOT_ROWS) * SLOT_ROWS
    new_float32 = rows.row_scale.new_empty
    partials = Partials(new_float32((splits, 2, pitch)), new_float32((splits, m, dim)), pitch)
    operands = Operands(query, key)
    if tile.operands == tile_configs.DESCRIPTORS:
        pairs = ((query, tile.rows), (key, tile.columns))
        operands = Operands(*[TensorDescriptor.from_tensor(x, [block, tile.dim]) for x, block in pairs])
    _weighted_keys_kernel[(row_tiles * splits,)](
        *operands, rows.row_scale, columns.column_scale, rows.row_ids, columns.column_ids, partials,
        Sizes(m, n, dim).odd(), odd_number(splits), tile.constants, **tile.options,
    )  # fmt: skip
    return partials
