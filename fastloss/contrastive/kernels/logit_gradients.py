"""The kernel that makes G, the gradient of the logits, a block at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import Operands, block_in, products_block_in, sizes_in
from .logit_tile import PRODUCTS, tile_logits, tile_of_program
from .online_softmax import LOG2E, _exp_scaled, _exponent, _log2_scaled

# An exponential divided by the power of two of its row serves the columns whose exponents are at most this much lower.
SPREAD_BACKWARD = tl.constexpr(96.0)
# Which tiles a launch makes: all from recomputed logits; those whose saved exponentials serve; the others, recomputed.
RECOMPUTE, FROM_EXPS, FLAGGED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Column tiles that a program of FLAGGED looks at, all at once: hardly ever is one of them to be made, and a program a
# tile took a third as long as making all tiles from their exponentials.
CHECKED = tl.constexpr(16)


@triton.jit
def _lse_grad(stats_ptr, grad_ptr, index, mask, VOLATILE: tl.constexpr = False):
    """(exponent, g): the upstream gradient times e^(s - lse) is g e^s / 2^exponent; g is 0 where there are no terms."""
    lse = tl.load(stats_ptr + index, mask, other=0.0, volatile=VOLATILE)
    empty = lse == float("-inf")
    exponent = _exponent(lse)
    grad = tl.load(grad_ptr + index, mask, other=0.0, volatile=VOLATILE) * tl.exp2(-_log2_scaled(lse, exponent))
    return exponent, tl.where(empty, 0.0, grad)


@triton.jit
def _power_grad(d, stats_ptr, grad_ptr, index, mask, power, AXIS: tl.constexpr):
    """The upstream gradient times e^(power d - lse), 0 where there are no terms."""
    lse = tl.load(stats_ptr + index, mask, other=0.0)
    grad = tl.load(grad_ptr + index, mask, other=0.0)
    empty = lse == float("-inf")
    lse, grad = tl.where(empty, 0.0, lse), tl.where(empty, 0.0, grad)
    return tl.exp2((d * power - tl.expand_dims(lse, AXIS)) * LOG2E) * tl.expand_dims(grad, AXIS)


@triton.jit
def _grad_logits(s, stats_ptr, grad_ptr, index, stride, mask, beta, AXIS: tl.constexpr, MOMENTS: tl.constexpr):
    """G_ij of one direction, whose statistics and their gradients are (states, M)."""
    HARD: tl.constexpr = beta is not None
    exponent, grad = _lse_grad(stats_ptr, grad_ptr, index, mask)
    grad_logits = _exp_scaled(s, tl.expand_dims(exponent, AXIS)) * tl.expand_dims(grad, AXIS)
    if MOMENTS:
        grad = tl.load(grad_ptr + 2 * stride + index, mask, other=0.0)
        grad_logits += tl.where(s == float("-inf"), 0.0, tl.expand_dims(grad, AXIS))
    if HARD:
        line: tl.constexpr = 4 if MOMENTS else 2
        s_max = tl.load(stats_ptr + stride + index, mask, other=0.0)
        s_max = tl.where(s_max == float("-inf"), 0.0, s_max)
        stats_ptr, grad_ptr = stats_ptr + line * stride, grad_ptr + line * stride
        d = s - tl.expand_dims(s_max, AXIS)
        of_1p = _power_grad(d, stats_ptr, grad_ptr, index, mask, 1.0 + beta, AXIS)
        of_beta = _power_grad(d, stats_ptr + stride, grad_ptr + stride, index, mask, beta, AXIS)
        grad_logits += of_1p + beta * (of_1p + of_beta)
    return grad_logits


@triton.jit
def _grad_logits_of_both(s, stats_ptr, grad_ptr, row, column, rows, direction):
    """G_ij of rows and columns that have log-sum-exps alone: from one exponential wherever that is exact."""
    row_exponent, row_grad = _lse_grad(stats_ptr, grad_ptr, row, row < rows)
    column_exponent, column_grad = _lse_grad(stats_ptr + direction, grad_ptr + direction, column, column < rows)
    low = tl.min(column_exponent, 0)
    if tl.max(row_exponent, 0) - low > SPREAD_BACKWARD:
        # read again: the registers of a whole tile have no room to keep both
        column_exponent, column_grad = _lse_grad(
            stats_ptr + direction, grad_ptr + direction, column, column < rows, True
        )
        grad_logits = _exp_scaled(s, column_exponent[None, :]) * column_grad[None, :]
        grad_logits = tl.fma(_exp_scaled(s, row_exponent[:, None]), row_grad[:, None], grad_logits)
    else:
        grad_logits = _exp_scaled(s, row_exponent[:, None])
        of_columns = (tl.exp2(low - column_exponent) * column_grad)[None, :]
        grad_logits *= tl.fma(tl.exp2(row_exponent - low)[:, None], of_columns, row_grad[:, None])
    return grad_logits


@triton.jit
def _recomputed_grad_logits(
    operands, row0, column0, rows, columns, sizes, inputs, direction, beta, FORM: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """G_ij from logits that are made once more."""
    BM: tl.constexpr = TILE.rows
    BN: tl.constexpr = TILE.columns
    BOTH_SIDES: tl.constexpr = FORM.symmetric or FORM.self_similarity
    MOMENTS: tl.constexpr = FORM.moments
    s, column_view = tile_logits(operands, row0, column0, rows, columns, sizes, FORM, TILE)
    row, column = row0 + tl.arange(0, BM), column0 + tl.arange(0, BN)
    stride = tl.cast(sizes.rows, tl.int64)
    stats, grad = inputs.stats, inputs.stats_grad
    if not BOTH_SIDES:
        grad_logits = _grad_logits(s, stats, grad, row, stride, row < sizes.rows, beta, 1, MOMENTS)
    elif MOMENTS or beta is not None or rows.logit_limit is not None:
        grad_logits = _grad_logits(s, stats, grad, row, stride, row < sizes.rows, beta, 1, MOMENTS)
        inside = column < sizes.columns
        stats, grad = stats + direction, grad + direction
        grad_logits += _grad_logits(column_view, stats, grad, column, stride, inside, beta, 0, MOMENTS)
    else:
        grad_logits = _grad_logits_of_both(s, stats, grad, row, column, sizes.rows, direction)
    return grad_logits


@triton.jit
def _grad_logits_from_exps(exponent, inputs, row0, column0, row, column, sizes, direction, FORM: tl.constexpr):
    """G_ij from saved exponentials, those of row i divided by 2^exponent_i in this tile."""
    SELF_SIMILARITY: tl.constexpr = FORM.self_similarity
    BOTH_SIDES: tl.constexpr = FORM.symmetric or FORM.self_similarity
    inside = (row < sizes.rows)[:, None]
    corner = inputs.exps + tl.cast(row0, tl.int64) * inputs.pitch + column0
    if SELF_SIMILARITY:
        inside &= row[:, None] < column[None, :]
    e = tl.load(corner + (row - row0)[:, None] * inputs.pitch + (column - column0)[None, :], mask=inside, other=0.0)
    e = e.to(tl.float32)
    stats, grad = inputs.stats, inputs.stats_grad
    row_exponent, row_grad = _lse_grad(stats, grad, row, row < sizes.rows)
    weight = (row_grad * tl.exp2(exponent - row_exponent))[:, None]
    if BOTH_SIDES:
        column_exponent, column_grad = _lse_grad(stats + direction, grad + direction, column, column < sizes.columns)
        max_exponent = tl.max(exponent, 0)
        of_columns = (tl.exp2(max_exponent - column_exponent) * column_grad)[None, :]
        weight += tl.exp2(exponent - max_exponent)[:, None] * of_columns
    return tl.where(e == 0.0, 0.0, e * weight)  # the exponents of rows without exponentials mean nothing


@triton.jit
def _store_grad_logits(
    grad_logits, row_tile, column_tile, row0, column0, rows, columns, results, inputs, sizes, block
):  # fmt: skip
    """G r c of a tile, and its column sums, to where the block has them."""
    BM: tl.constexpr = grad_logits.shape[0]
    BN: tl.constexpr = grad_logits.shape[1]
    row, column = row0 + tl.arange(0, BM), column0 + tl.arange(0, BN)
    if inputs.positive_grad is not None:
        target = row
        if rows.targets is not None:
            target = tl.load(rows.targets + row, mask=row < sizes.rows, other=-1)
        positive = tl.load(inputs.positive_grad + row, mask=row < sizes.rows, other=0.0)
        grad_logits = tl.where(target[:, None] == column[None, :], positive[:, None], grad_logits)
    offset = column_tile * BN + tl.arange(0, BN)
    if results.column_sums is not None:
        # the last tile of the block has rows of the next block
        grad_logits = tl.where((row < block.end_row)[:, None], grad_logits, 0.0)
        tl.store(results.column_sums + row_tile.to(tl.int64) * block.pitch + offset, tl.sum(grad_logits, 0))
    if results.grad_block is not None:
        # read again: the registers of a whole tile have no room to keep the scales from the logits on
        scale = tl.load(rows.row_scale + row, mask=row < sizes.rows, other=0.0, volatile=True)
        if inputs.fp16_scale is not None:
            scale *= tl.load(inputs.fp16_scale)
        grad_logits *= scale[:, None]
        if columns.column_scale is not None:
            inside = column < sizes.columns
            grad_logits *= tl.load(columns.column_scale + column, mask=inside, other=0.0, volatile=True)[None, :]
        corner = results.grad_block + (row0 - block.row).to(tl.int64) * block.pitch + column_tile * BN
        to = corner + tl.arange(0, BM)[:, None] * block.pitch + tl.arange(0, BN)[None, :]
        tl.store(to, grad_logits.to(results.grad_block.dtype.element_ty), mask=(row < block.end_row)[:, None])


@triton.jit
def _exponents(inputs, row, column0, sizes, BN: tl.constexpr):
    """The exponents that the saved exponentials of a tile's rows were divided by."""
    line = inputs.exponents + (column0 // BN) * tl.cast(sizes.rows, tl.int64)
    return tl.load(line + row, mask=row < sizes.rows, other=-float("inf"))


@triton.jit
def _is_flagged(exponents):
    """Whether the forward has found that a tile's exponentials do not serve its columns."""
    return tl.max(exponents, 0) == float("inf")


@triton.jit
def _make_tile(
    operands, row_tile, column_tile, rows, columns, results, inputs, sizes, block, direction, beta,
    FORM: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """G r c of a tile; none where TILES is FROM_EXPS and the tile is flagged."""
    BM: tl.constexpr = TILE.rows
    BN: tl.constexpr = TILE.columns
    row0, column0 = block.row + row_tile * BM, block.column + column_tile * BN
    row, column = row0 + tl.arange(0, BM), column0 + tl.arange(0, BN)
    if TILES == RECOMPUTE:
        grad_logits = _recomputed_grad_logits(
            operands, row0, column0, rows, columns, sizes, inputs, direction, beta, FORM, TILE
        )
        _store_grad_logits(
            grad_logits, row_tile, column_tile, row0, column0, rows, columns, results, inputs, sizes, block
        )
    else:
        exponent = _exponents(inputs, row, column0, sizes, BN)
        if _is_flagged(exponent) == 0:
            grad_logits = _grad_logits_from_exps(exponent, inputs, row0, column0, row, column, sizes, direction, FORM)
            _store_grad_logits(
                grad_logits, row_tile, column_tile, row0, column0, rows, columns, results, inputs, sizes, block
            )


@triton.jit
def _softmax_stats_bwd_kernel(
    query,  # see Operands; G may take the place of the products
    key,
    rows,  # Rows
    columns,  # Columns
    results,  # BackwardResults
    inputs,  # BackwardInputs
    sizes,  # Sizes
    block,  # Block
    beta,
    FORM: tl.constexpr,  # Form
    TILE: tl.constexpr,  # TileConstants
    TILES: tl.constexpr,  # RECOMPUTE, FROM_EXPS or FLAGGED
):
    BM: tl.constexpr = TILE.rows
    BN: tl.constexpr = TILE.columns
    SELF_SIMILARITY: tl.constexpr = FORM.self_similarity
    MOMENTS: tl.constexpr = FORM.moments
    STATES: tl.constexpr = 2 + (2 if MOMENTS else 0) + (2 if beta is not None else 0)
    OPERANDS: tl.constexpr = TILE.operands
    if OPERANDS == PRODUCTS:
        key = products_block_in(key)
    operands, sizes, block = Operands(query, key), sizes_in(sizes), block_in(block)
    # from a row's statistics to those of a column, which are a row's where rows and columns are the same
    direction = (0 if SELF_SIMILARITY else STATES) * tl.cast(sizes.rows, tl.int64)
    if TILES == FLAGGED:
        row_tile = tl.program_id(0) % block.row_tiles
        first = tl.program_id(0) // block.row_tiles * CHECKED
        row = block.row + row_tile * BM + tl.arange(0, BM)
        tiles = block.column // BN + first + tl.arange(0, CHECKED)
        there = (tiles < block.column // BN + block.column_tiles)[:, None] & (row < sizes.rows)[None, :]
        lines = inputs.exponents + tiles.to(tl.int64)[:, None] * sizes.rows
        if tl.max(tl.max(tl.load(lines + row[None, :], mask=there, other=-float("inf")), 1), 0) == float("inf"):
            for column_tile in range(first, tl.minimum(first + CHECKED, block.column_tiles)):
                if _is_flagged(_exponents(inputs, row, block.column + column_tile * BN, sizes, BN)):
                    _make_tile(operands, row_tile, column_tile, rows, columns, results, inputs, sizes, block, direction,
                               beta, FORM, TILE, RECOMPUTE)  # fmt: skip
    else:
        row_tile, column_tile = tile_of_program(block)
        _make_tile(operands, row_tile, column_tile, rows, columns, results, inputs, sizes, block, direction, beta, FORM,
                   TILE, TILES)  # fmt: skip
