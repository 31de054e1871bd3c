"""Kernels of the log-sum-exps (and the other statistics) of the rows of the logits and, if symmetric, of the columns.

The first kernel walks over tiles and leaves a State of each row and column in slots, memory that one program alone
writes; the second, `_softmax_stats_merge_kernel`, merges the slots into the statistics. Why so:
docs/design/contrastive.md, "The Triton kernels"
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Operands, area_in, products_block_in, sizes_in
from .blocking import walk_in
from .logit_tile import PRODUCTS, tile_logits

LN2 = tl.constexpr(0.6931471805599453)
# As float32 it is too small by 1.3e-8 of itself, which times s = 2000 changes e^s by 3e-5. So s always meets a maximum
# or a log-sum-exp that went through the same `_log2_scaled`, and only their difference is wrong by that much.
LOG2E = tl.constexpr(1.4426950408889634)
# The sums of a tile's columns reuse the exponentials e^s / 2^exponent of its rows as long as the largest exponent of a
# row exceeds the least maximum of a column by at most this many powers of two; else they would underflow, and are made
# anew. Float32 sums keep what is within 2^-25 of their largest term, and 100 + 25 powers below an exponent are still
# above 2^-126, the least normal number.
SPREAD = tl.constexpr(100.0)


class Slots(NamedTuple):
    """Memory of the states."""

    states: Any  # (splits + groups, states, pitch) float32; without columns' statistics (splits, states, pitch)
    pitch: int  # M, rounded up to whole vectors


class State(NamedTuple):
    """What is known of rows or columns from the tiles so far, one number each."""

    max: Any  # of s
    sum_exp: Any  # of e^s / 2^exponent, exponent = ceil(max / log 2)
    logit_sum: Any  # of s; used with moments only, like the next
    number: Any  # of s
    sum_exp_1p_beta: Any  # of e^((1 + beta) (s - max)); used with hardness beta only, like the next
    sum_exp_beta: Any  # of e^(beta (s - max))


@triton.jit
def _exponent(s):
    """The whole power of two that exponentials with maximum `s` are divided by."""
    up = tl.ceil(s * LOG2E)
    return tl.where(tl.abs(up) == float("inf"), 0.0, up)


@triton.jit
def _log2_scaled(s, exponent):
    """log2(e^s / 2^exponent), rounded once, as s may be large."""
    return tl.fma(s, LOG2E, -exponent)


@triton.jit
def _exp_scaled(s, exponent):
    """e^s / 2^exponent."""
    return tl.exp2(_log2_scaled(s, exponent))


@triton.jit
def _rescale(old_max, new_max, exponent):
    """What a sum with maximum `old_max`, divided by 2^exponent, is multiplied by when the maximum becomes `new_max`."""
    return tl.where(old_max == float("-inf"), 0.0, tl.exp2(exponent - _exponent(new_max)))


@triton.jit
def _power_scaled(s, s_max, power):
    """e^(power (s - s_max)): the difference first, as power s has no digits left for it."""
    s_max = tl.where(s_max == float("-inf"), 0.0, s_max)
    return tl.exp2((s - s_max) * (power * LOG2E))


@triton.jit
def _power_rescale(old_max, new_max, power):
    return tl.where(old_max == float("-inf"), 0.0, _power_scaled(old_max, new_max, power))


@triton.jit
def _merge(a, b, b_exponent, beta, MOMENTS: tl.constexpr, HARD: tl.constexpr):
    """The state of the union of two disjoint sets, the second's sum_exp being divided by 2^b_exponent."""
    new_max = tl.maximum(a.max, b.max)
    sum_exp = a.sum_exp * _rescale(a.max, new_max, _exponent(a.max)) + b.sum_exp * _rescale(b.max, new_max, b_exponent)
    logit_sum, number, sum_1p, sum_beta = a.logit_sum, a.number, a.sum_exp_1p_beta, a.sum_exp_beta
    if MOMENTS:
        logit_sum += b.logit_sum
        number += b.number
    if HARD:
        more = 1.0 + beta
        sum_1p = sum_1p * _power_rescale(a.max, new_max, more) + b.sum_exp_1p_beta * _power_rescale(
            b.max, new_max, more
        )
        sum_beta = sum_beta * _power_rescale(a.max, new_max, beta) + b.sum_exp_beta * _power_rescale(
            b.max, new_max, beta
        )
    return State(new_max, sum_exp, logit_sum, number, sum_1p, sum_beta)


@triton.jit
def _tile_state(s, s_max, sum_exp, beta, AXIS: tl.constexpr, MOMENTS: tl.constexpr, HARD: tl.constexpr):
    """State of a tile's rows (AXIS 1) or columns (0), given their maxima and sums of exponentials."""
    logit_sum, number, sum_1p, sum_beta = sum_exp, sum_exp, sum_exp, sum_exp
    if MOMENTS:
        allowed = s != float("-inf")
        logit_sum = tl.sum(tl.where(allowed, s, 0.0), AXIS)
        number = tl.sum(allowed.to(tl.float32), AXIS)
    if HARD:
        sum_1p = tl.sum(_power_scaled(s, tl.expand_dims(s_max, AXIS), 1.0 + beta), AXIS)
        sum_beta = tl.sum(_power_scaled(s, tl.expand_dims(s_max, AXIS), beta), AXIS)
    return State(s_max, sum_exp, logit_sum, number, sum_1p, sum_beta)


@triton.jit
def _no_state(SIZE: tl.constexpr):
    zero = tl.zeros((SIZE,), tl.float32)
    return State(zero - float("inf"), zero, zero, zero, zero, zero)


@triton.jit
def _store_state(ptr, state, index, stride, mask, MOMENTS: tl.constexpr, HARD: tl.constexpr):
    """`ptr` is a slot: (states, M)."""
    tl.store(ptr + index, state.max, mask)
    tl.store(ptr + stride + index, state.sum_exp, mask)
    if MOMENTS:
        tl.store(ptr + 2 * stride + index, state.logit_sum, mask)
        tl.store(ptr + 3 * stride + index, state.number, mask)
    if HARD:
        line = 4 if MOMENTS else 2
        tl.store(ptr + line * stride + index, state.sum_exp_1p_beta, mask)
        tl.store(ptr + (line + 1) * stride + index, state.sum_exp_beta, mask)


@triton.jit
def _load_state(ptr, index, stride, mask, MOMENTS: tl.constexpr, HARD: tl.constexpr):
    s_max = tl.load(ptr + index, mask, other=float("-inf"))
    sum_exp = tl.load(ptr + stride + index, mask, other=0.0)
    logit_sum, number, sum_1p, sum_beta = sum_exp, sum_exp, sum_exp, sum_exp
    if MOMENTS:
        logit_sum = tl.load(ptr + 2 * stride + index, mask, other=0.0)
        number = tl.load(ptr + 3 * stride + index, mask, other=0.0)
    if HARD:
        line = 4 if MOMENTS else 2
        sum_1p = tl.load(ptr + line * stride + index, mask, other=0.0)
        sum_beta = tl.load(ptr + (line + 1) * stride + index, mask, other=0.0)
    return State(s_max, sum_exp, logit_sum, number, sum_1p, sum_beta)


@triton.jit
def _merge_columns(
    slot, s, column_max, column_sum_exp, exponent, first, known, end, stride, beta,
    MOMENTS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Merge what a tile's columns hold into their states in `slot`. Columns from `known` on have no state there yet."""
    index = first + tl.arange(0, s.shape[1])
    before = _load_state(slot, index, stride, index < known, MOMENTS, HARD)
    seen = _tile_state(s, column_max, column_sum_exp, beta, 0, MOMENTS, HARD)
    merged = _merge(before, seen, exponent, beta, MOMENTS, HARD)
    _store_state(slot, merged, index, stride, index < end, MOMENTS, HARD)


@triton.jit
def _save_exponents(saved, exponent, row0, column0, sizes, BN: tl.constexpr):
    row = tl.arange(0, exponent.shape[0])
    line = (column0 // BN).to(tl.int64) * sizes.rows + row0
    tl.store(saved.exponents + line + row, exponent, mask=row < sizes.rows - row0)


@triton.jit
def _save_exps(saved, exps, e, exponent, row0, column0, sizes):
    """Store a tile's exponentials and their exponents, infinite where they do not serve the columns."""
    if exps is not None:  # through the copy engine: addresses of their own would spill
        exps.store([row0, column0], e.to(exps.dtype))
    else:
        row, column = tl.arange(0, e.shape[0]), tl.arange(0, e.shape[1])
        inside = row < sizes.rows - row0
        corner = saved.exps + tl.cast(row0, tl.int64) * saved.pitch + column0
        to = corner + (row[:, None] * saved.pitch + column[None, :])
        tl.store(to, e.to(saved.exps.dtype.element_ty), mask=inside[:, None])
    _save_exponents(saved, exponent, row0, column0, sizes, e.shape[1])


@triton.jit
def _first_above(row0, BN: tl.constexpr):
    """The index of the first tile of columns that has an entry right of the diagonal in row row0."""
    return (row0 + 1) // BN


@triton.jit
def _softmax_stats_fwd_kernel(
    query,  # see Operands; Triton 3.6 takes no tensor descriptors in a tuple
    key,
    exps,  # saved.exps as a descriptor, where the operands are; else None
    rows,  # Rows
    columns,  # Columns
    slots,  # Slots
    saved,  # SavedExps: where exponentials go
    sizes,  # Sizes
    walk,  # Walk
    area,  # Area: of the block of products, if a library makes them; else None
    beta,
    FORM: tl.constexpr,  # Form
    TILE: tl.constexpr,  # TileConstants
):
    BM: tl.constexpr = TILE.rows
    BN: tl.constexpr = TILE.columns
    OPERANDS: tl.constexpr = TILE.operands
    BOTH_SIDES: tl.constexpr = FORM.symmetric or FORM.self_similarity
    MOMENTS: tl.constexpr = FORM.moments
    HARD: tl.constexpr = beta is not None
    STATES: tl.constexpr = 2 + (2 if MOMENTS else 0) + (2 if HARD else 0)
    if OPERANDS == PRODUCTS:
        key = products_block_in(key)
    operands = Operands(query, key)
    sizes, walk = sizes_in(sizes), walk_in(walk)
    group, split = tl.program_id(0) % walk.groups, tl.program_id(0) // walk.groups
    stride = tl.cast(slots.pitch, tl.int64)
    row_slot = slots.states + split.to(tl.int64) * STATES * stride
    column_slot = slots.states + (walk.splits + group).to(tl.int64) * STATES * stride
    first_row, first_column, end_row, end_column, earlier = 0, 0, sizes.rows, sizes.columns, False
    if OPERANDS == PRODUCTS:  # the states go on from those of the blocks above and to the left
        area = area_in(area)
        first_row, first_column, end_row, end_column = area.row, area.column, area.end_row, area.end_column
        earlier = area.row > 0
    for row_tile in range(group, tl.cdiv(end_row - first_row, BM), walk.groups):
        row0 = first_row + row_tile * BM
        state = _no_state(BM)
        if OPERANDS == PRODUCTS:
            row = row0 + tl.arange(0, BM)
            known_rows = tl.where(area.column > area.first_column, end_row, 0)
            state = _load_state(row_slot, row, stride, row < known_rows, MOMENTS, HARD)
        first = split
        if FORM.self_similarity:  # the first of the split's tiles that has columns above the diagonal
            above = _first_above(row0, BN) - first_column // BN
            first += tl.cdiv(tl.maximum(above - split, 0), walk.splits) * walk.splits
        for column_tile in tl.range(first, tl.cdiv(end_column - first_column, BN), walk.splits, num_stages=1):
            column0 = first_column + column_tile * BN
            s, column_view = tile_logits(operands, row0, column0, rows, columns, sizes, FORM, TILE)
            row_max, column_max = tl.max(s, 1), tl.max(column_view, 0)
            exponent = _exponent(row_max)
            e = _exp_scaled(s, exponent[:, None])
            seen = _tile_state(s, row_max, tl.sum(e, 1), beta, 1, MOMENTS, HARD)
            state = _merge(state, seen, exponent, beta, MOMENTS, HARD)
            if saved.exps is not None and not BOTH_SIDES:
                _save_exps(saved, exps, e, exponent, row0, column0, sizes)
            if BOTH_SIDES and rows.logit_limit is None and (TILE.shares or saved.exps is not None):
                max_exponent, min_max = tl.max(exponent, 0), column_max
                if FORM.self_similarity or saved.exps is not None:  # columns without entries do not count
                    min_max = tl.where(column_max == float("-inf"), float("inf"), column_max)
                min_max = tl.min(min_max, 0)
                too_wide = max_exponent - min_max * LOG2E > SPREAD
                if too_wide:  # make the logits once more rather than hold them beside e
                    s, column_view = tile_logits(operands, row0, column0, rows, columns, sizes, FORM, TILE, True)
                    column_sum_exp = tl.sum(_exp_scaled(s, _exponent(tl.max(s, 0))[None, :]), 0)
                    if saved.exps is not None:  # the backward makes these again too
                        _save_exponents(saved, tl.zeros((BM,), tl.float32) + float("inf"), row0, column0, sizes, BN)
                else:
                    if saved.exps is not None:
                        _save_exps(saved, exps, e, exponent, row0, column0, sizes)
                    column_sum_exp = tl.sum(e * tl.exp2(exponent - max_exponent)[:, None], 0)
                exponent = tl.where(too_wide, _exponent(column_max), max_exponent)
            else:
                exponent = _exponent(column_max)
                column_sum_exp = tl.sum(_exp_scaled(column_view, exponent[None, :]), 0)
            if BOTH_SIDES:
                known = tl.where((row_tile > group) | earlier, sizes.columns, 0)
                _merge_columns(
                    column_slot, column_view, column_max, column_sum_exp, exponent, column0, known, sizes.columns,
                    stride, beta, MOMENTS, HARD,
                )  # fmt: skip
        index = row0 + tl.arange(0, BM)
        _store_state(row_slot, state, index, stride, index < end_row, MOMENTS, HARD)
        if BOTH_SIDES:
            tl.debug_barrier()  # the next row tile reads what other threads may have stored


@triton.jit(do_not_specialize=["rows"])
def _softmax_stats_merge_kernel(
    slots,  # Slots
    stats_ptr,  # (directions, states, M)
    rows,
    walk,  # Walk
    beta,
    MOMENTS: tl.constexpr,
    SELF_TILE: tl.constexpr,  # TileConstants of the walk with self-similarity, one direction; else None
    SLOTS: tl.constexpr,  # a power of two, at least groups and splits; with SELF_TILE at least their sum
    BLOCK: tl.constexpr,
):
    HARD: tl.constexpr = beta is not None
    STATES: tl.constexpr = 2 + (2 if MOMENTS else 0) + (2 if HARD else 0)
    walk = walk_in(walk)
    direction = tl.program_id(1)
    slot_stride, stride = tl.cast(slots.pitch, tl.int64), tl.cast(rows, tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    if SELF_TILE is None:
        used = (slot < tl.where(direction == 0, walk.splits, walk.groups))[:, None]
    else:  # a group of row tiles begins with its first, and has columns above the diagonal of that only
        BM: tl.constexpr = SELF_TILE.rows
        BN: tl.constexpr = SELF_TILE.columns
        above = index[None, :] // BN >= _first_above((slot - walk.splits) * BM, BN)[:, None]
        used = (slot < walk.splits)[:, None] | ((slot < walk.splits + walk.groups)[:, None] & above)
    mask = used & (index < slots.pitch)[None, :]  # rows that are not there give anything
    offset = (slot.to(tl.int64) * STATES * slot_stride)[:, None] + index[None, :]
    slot = slots.states + direction * walk.splits * STATES * slot_stride
    parts = _load_state(slot, offset, slot_stride, mask, MOMENTS, HARD)
    s_max = tl.max(parts.max, 0)
    sum_exp = tl.sum(parts.sum_exp * _rescale(parts.max, s_max[None, :], _exponent(parts.max)), 0)
    stats_ptr += direction * STATES * stride + index
    inside = index < rows
    tl.store(stats_ptr, _log(s_max, sum_exp), inside)
    tl.store(stats_ptr + stride, s_max, inside)
    if MOMENTS:
        tl.store(stats_ptr + 2 * stride, tl.sum(parts.logit_sum, 0), inside)
        tl.store(stats_ptr + 3 * stride, tl.sum(parts.number, 0), inside)
    if HARD:
        stats_ptr += (STATES - 2) * stride
        sum_1p = tl.sum(parts.sum_exp_1p_beta * _power_rescale(parts.max, s_max[None, :], 1.0 + beta), 0)
        sum_beta = tl.sum(parts.sum_exp_beta * _power_rescale(parts.max, s_max[None, :], beta), 0)
        tl.store(stats_ptr, tl.log(sum_1p), inside)
        tl.store(stats_ptr + stride, tl.log(sum_beta), inside)


@triton.jit
def _log(s_max, sum_exp):
    """The log-sum-exp of a state: the maximum itself, to the last digit, where there is nothing else in the sum."""
    whole = tl.log2(sum_exp)
    lse = s_max + (whole - _log2_scaled(s_max, _exponent(s_max))) * LN2
    return tl.where(tl.abs(s_max) == float("inf"), whole, lse)
