"""A tile of the logits s_ij = r_i c_j <q_i, k_j> + b_j, with -inf at what is no negative.

r, c and b are row_scale, column_scale and bias. The named tuples that these functions are given: arguments.py; FORM is
the Form of options.py. A field of a compile-time tuple is a plain number to Triton 3.6, so each is declared
tl.constexpr before it is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import pairs
from . import tile_configs

DESCRIPTORS, PRODUCTS = tl.constexpr(tile_configs.DESCRIPTORS), tl.constexpr(tile_configs.PRODUCTS)
WORD = tl.constexpr(pairs.WORD)
GROUP = tl.constexpr(8)  # rows of tiles that programs walk together


@triton.jit
def tile_of_program(block):
    """(row tile, column tile) of this program: those of GROUP rows of tiles are neighbours, so that the caches serve
    the keys of the group."""
    program = tl.program_id(0)
    first = program // (GROUP * block.column_tiles) * GROUP
    group_tiles = tl.minimum(block.row_tiles - first, GROUP)
    rest = program % (GROUP * block.column_tiles)
    return first + rest % group_tiles, rest // group_tiles


@triton.jit
def products(operands, row0, column0, sizes, TILE: tl.constexpr):
    """<q_i, k_j> of a tile; rows and columns outside give anything."""
    BM: tl.constexpr = TILE.rows
    BN: tl.constexpr = TILE.columns
    BK: tl.constexpr = TILE.dim
    OPERANDS: tl.constexpr = TILE.operands
    if OPERANDS == PRODUCTS:
        block = operands.key
        corner = operands.query + tl.cast(row0 - block.row, tl.int64) * block.pitch + (column0 - block.column)
        rows = tl.minimum(tl.arange(0, BM), block.end_row - 1 - row0)
        acc = tl.load(corner + rows[:, None] * block.pitch + tl.arange(0, BN)[None, :])
    elif OPERANDS == DESCRIPTORS:
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, sizes.dim, BK):
            q = operands.query.load([row0, k])
            acc = tl.dot(q, operands.key.load([column0, k]).T, acc)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
        inner = tl.arange(0, BK)
        rows = tl.minimum(row0 + tl.arange(0, BM), sizes.rows - 1).to(tl.int64)
        columns = tl.minimum(column0 + tl.arange(0, BN), sizes.columns - 1).to(tl.int64)
        q_ptr = operands.query + rows[:, None] * sizes.dim + inner[None, :]
        k_ptr = operands.key + columns[None, :] * sizes.dim + inner[:, None]
        for k in range(0, sizes.dim, BK):
            inside = inner < sizes.dim - k
            q = tl.load(q_ptr + k, mask=inside[None, :], other=0.0)
            acc = tl.dot(q, tl.load(k_ptr + k, mask=inside[:, None], other=0.0), acc)
    return acc


@triton.jit
def _has_target(targets, column0, BN: tl.constexpr):
    """Whether the target of some row is a column of the tile."""
    return tl.max(((targets >= column0) & (targets < column0 + BN)).to(tl.int32), 0) > 0


@triton.jit
def _listed(rows, columns, row, column, column0, sizes):
    """Which pairs of a tile the words list. Its columns are whole words, or a part of one."""
    BN: tl.constexpr = column.shape[0]
    inside = row < sizes.rows
    span = rows.pair_spans + 2 * row.to(tl.int64)
    begin = tl.load(span, mask=inside, other=0)
    count = (tl.load(span + 1, mask=inside, other=0) - begin).to(tl.int32)
    words = columns.pair_words + 2 * begin
    number = column0 // WORD
    low, high = tl.zeros_like(count), count  # between which a row's first word of this tile is searched, by halves
    steps = tl.cast(tl.log2(tl.max(count, 0).to(tl.float32) + 1.0), tl.int32) + 1
    for _ in range(steps):
        middle = (low + high) // 2
        before = (low < high) & (tl.load(words + 2 * middle, mask=low < high, other=0) < number)
        low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
    bits = tl.zeros((row.shape[0], BN), tl.int32)
    for word in tl.static_range(0, max(BN // WORD, 1)):
        there = low < count
        found = there & (tl.load(words + 2 * low, mask=there, other=-1) == number + word)
        of_word = tl.load(words + 2 * low + 1, mask=found, other=0)
        low += found.to(tl.int32)
        bits = tl.where((column // WORD == number + word)[None, :], of_word[:, None], bits)
    return ((bits >> (column % WORD)[None, :]) & 1) != 0


@triton.jit
def _masked(
    s, similar, row, column, column0, rows, columns, sizes, FORM: tl.constexpr, COLUMN_LIMIT: tl.constexpr = False
):  # fmt: skip
    """Logits with -inf at what is no negative. COLUMN_LIMIT: the limit is the column's, not the row's."""
    DIAGONAL: tl.constexpr = FORM.diagonal
    SELF_SIMILARITY: tl.constexpr = FORM.self_similarity
    allowed = (row[:, None] < sizes.rows) & (column[None, :] < sizes.columns)
    if SELF_SIMILARITY:
        allowed &= row[:, None] < column[None, :]
    elif DIAGONAL:
        allowed &= row[:, None] != column[None, :]
    if rows.targets is not None:
        target = tl.load(rows.targets + row, mask=row < sizes.rows, other=-1)
        allowed &= target[:, None] != column[None, :]
    if rows.row_ids is not None:
        row_id = tl.load(rows.row_ids + row, mask=row < sizes.rows, other=0)
        column_id = tl.load(columns.column_ids + column, mask=column < sizes.columns, other=0)
        allowed &= row_id[:, None] != column_id[None, :]
    if rows.pair_spans is not None:
        ARE_NEGATIVES: tl.constexpr = FORM.are_negatives
        allowed &= _listed(rows, columns, row, column, column0, sizes) == ARE_NEGATIVES
    if rows.logit_limit is not None:
        if COLUMN_LIMIT:
            logit_limit = tl.load(rows.logit_limit + column, mask=column < sizes.columns, other=0.0)[None, :]
        else:
            logit_limit = tl.load(rows.logit_limit + row, mask=row < sizes.rows, other=0.0)[:, None]
        allowed &= (similar > logit_limit) == 0
    return tl.where(allowed, s, float("-inf"))


@triton.jit
def _scaled(acc, row, column, rows, columns, sizes, VOLATILE: tl.constexpr):
    """(logits, the same without bias) of a tile from its products."""
    scale = tl.load(rows.row_scale + row, mask=row < sizes.rows, other=0.0, volatile=VOLATILE)
    inside = column < sizes.columns
    if columns.column_scale is not None:
        acc *= tl.load(columns.column_scale + column, mask=inside, other=0.0, volatile=VOLATILE)[None, :]
    similar = acc * scale[:, None]
    s = similar
    if columns.bias is not None:
        s += tl.load(columns.bias + column, mask=inside, other=0.0, volatile=VOLATILE)[None, :]
    return s, similar


@triton.jit
def tile_logits(
    operands, row0, column0, rows, columns, sizes, FORM: tl.constexpr, TILE: tl.constexpr,
    VOLATILE: tl.constexpr = False,
):  # fmt: skip
    """(logits as the tile's rows have them, as its columns have them); they differ by the limit only, and only where
    the form has statistics of columns. VOLATILE: the vectors are read from memory again, not kept in registers."""
    BM: tl.constexpr = TILE.rows
    BN: tl.constexpr = TILE.columns
    DIAGONAL: tl.constexpr = FORM.diagonal
    SELF_SIMILARITY: tl.constexpr = FORM.self_similarity
    BOTH_SIDES: tl.constexpr = FORM.symmetric or FORM.self_similarity
    row, column = row0 + tl.arange(0, BM), column0 + tl.arange(0, BN)
    acc = products(operands, row0, column0, sizes, TILE)
    s, similar = _scaled(acc, row, column, rows, columns, sizes, VOLATILE)
    column_view = s
    if rows.logit_limit is not None:
        if BOTH_SIDES:
            column_view = _masked(s, similar, row, column, column0, rows, columns, sizes, FORM, True)
        s = _masked(s, similar, row, column, column0, rows, columns, sizes, FORM)
    elif rows.row_ids is not None or rows.pair_spans is not None:
        s = _masked(s, similar, row, column, column0, rows, columns, sizes, FORM)
    else:  # most tiles hold nothing that must be left out
        special = (row0 + BM > sizes.rows) | (column0 + BN > sizes.columns)
        if SELF_SIMILARITY:
            special |= column0 < row0 + BM
        elif DIAGONAL:
            special |= (row0 < column0 + BN) & (column0 < row0 + BM)
        if rows.targets is not None:
            special |= _has_target(tl.load(rows.targets + row, mask=row < sizes.rows, other=-1), column0, BN)
        if special:
            s = _masked(s, similar, row, column, column0, rows, columns, sizes, FORM)
    if rows.logit_limit is None:
        column_view = s
    return s, column_view
