"""Tiles of contrastive logits: products, scales, biases, and -inf at what is no negative.

s_ij = r_i c_j <q_i, k_j> + b_j. What a kernel is given: `operands`, query (M, D) and key (N, D) as pointers or tensor
descriptors, or a block of their products (rows, pitch) in float32 and (pitch, first row, first column, end of the
rows) of it; `rows` (r, excluded, row_ids, ceiling), each (M,) and all but r possibly None; `columns` (c, b,
column_ids), each (N,) or None; `sizes` (M, N, D); DIAGONAL, what is left out: 0 nothing, 1 the diagonal, 2 all but what
is above it; TILE (block of M, of N, of D, what the operands are: see tile_configs.py).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def products(operands, row0, column0, sizes, TILE: tl.constexpr):
    """<q_i, k_j> of a tile; rows and columns outside give anything."""
    BM: tl.constexpr = TILE[0]
    BN: tl.constexpr = TILE[1]
    BK: tl.constexpr = TILE[2]
    width = sizes[2]
    if TILE[3] == 2:
        pitch, row, column, end = operands[1]
        corner = operands[0] + tl.cast(row0 - row, tl.int64) * pitch + (column0 - column)
        rows = tl.minimum(tl.arange(0, BM), end - 1 - row0)
        acc = tl.load(corner + rows[:, None] * pitch + tl.arange(0, BN)[None, :])
    elif TILE[3] == 1:
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, width, BK):
            q = operands[0].load([row0, k])
            acc = tl.dot(q, operands[1].load([column0, k]).T, acc)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
        inner = tl.arange(0, BK)
        rows = tl.minimum(row0 + tl.arange(0, BM), sizes[0] - 1).to(tl.int64)
        columns = tl.minimum(column0 + tl.arange(0, BN), sizes[1] - 1).to(tl.int64)
        q_ptr = operands[0] + rows[:, None] * width + inner[None, :]
        k_ptr = operands[1] + columns[None, :] * width + inner[:, None]
        for k in range(0, width, BK):
            inside = inner < width - k
            q = tl.load(q_ptr + k, mask=inside[None, :], other=0.0)
            acc = tl.dot(q, tl.load(k_ptr + k, mask=inside[:, None], other=0.0), acc)
    return acc


@triton.jit
def _excludes(excluded, column0, BN: tl.constexpr):
    """Whether a row excludes a column of the tile."""
    return tl.max(((excluded >= column0) & (excluded < column0 + BN)).to(tl.int32), 0) > 0


@triton.jit
def _masked(s, similar, at, rows, columns, sizes, DIAGONAL: tl.constexpr, OWN: tl.constexpr):
    """Logits with -inf at what is no negative. OWN: 0, the row's ceiling; 1, the column's."""
    row, column = at[0][:, None], at[1][None, :]
    keep = (row < sizes[0]) & (column < sizes[1])
    if DIAGONAL == 1:
        keep &= row != column
    if DIAGONAL == 2:
        keep &= row < column
    if rows[1] is not None:
        excluded = tl.load(rows[1] + at[0], mask=at[0] < sizes[0], other=-1)
        keep &= excluded[:, None] != column
    if rows[2] is not None:
        row_id = tl.load(rows[2] + at[0], mask=at[0] < sizes[0], other=0)
        column_id = tl.load(columns[2] + at[1], mask=at[1] < sizes[1], other=0)
        keep &= row_id[:, None] != column_id[None, :]
    if rows[3] is not None:
        ceiling = tl.load(rows[3] + at[OWN], mask=at[OWN] < sizes[OWN], other=0.0)
        keep &= (similar > tl.expand_dims(ceiling, 1 - OWN)) == 0
    return tl.where(keep, s, float("-inf"))


@triton.jit
def _scaled(acc, at, rows, columns, sizes, AGAIN: tl.constexpr):
    """(logits, the same without bias) of a tile from its products. AGAIN: read the vectors anew, do not keep them."""
    scale = tl.load(rows[0] + at[0], mask=at[0] < sizes[0], other=0.0, volatile=AGAIN)
    inside = at[1] < sizes[1]
    if columns[0] is not None:
        acc *= tl.load(columns[0] + at[1], mask=inside, other=0.0, volatile=AGAIN)[None, :]
    similar = acc * scale[:, None]
    s = similar
    if columns[1] is not None:
        s += tl.load(columns[1] + at[1], mask=inside, other=0.0, volatile=AGAIN)[None, :]
    return s, similar


@triton.jit
def tile_logits(
    operands, row0, column0, rows, columns, sizes, BACK: tl.constexpr, DIAGONAL: tl.constexpr, TILE: tl.constexpr,
    AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Logits of a tile as its rows see them and, with BACK, as its columns do; they differ by the ceiling only."""
    BM: tl.constexpr = TILE[0]
    BN: tl.constexpr = TILE[1]
    at = (row0 + tl.arange(0, BM), column0 + tl.arange(0, BN))
    acc = products(operands, row0, column0, sizes, TILE)
    s, similar = _scaled(acc, at, rows, columns, sizes, AGAIN)
    back = s
    if rows[3] is not None:
        if BACK:
            back = _masked(s, similar, at, rows, columns, sizes, DIAGONAL, 1)
        s = _masked(s, similar, at, rows, columns, sizes, DIAGONAL, 0)
    elif rows[2] is not None:
        s = _masked(s, similar, at, rows, columns, sizes, DIAGONAL, 0)
    else:
        special = (row0 + BM > sizes[0]) | (column0 + BN > sizes[1])
        if DIAGONAL == 1:
            special |= (row0 < column0 + BN) & (column0 < row0 + BM)
        if DIAGONAL == 2:
            special |= column0 < row0 + BM
        if rows[1] is not None:
            special |= _excludes(tl.load(rows[1] + at[0], mask=at[0] < sizes[0], other=-1), column0, BN)
        if special:
            s = _masked(s, similar, at, rows, columns, sizes, DIAGONAL, 0)
    if rows[3] is None:
        back = s
    return s, back
