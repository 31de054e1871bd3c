"""Kernels of the log-sum-exps (and the other statistics) of the rows of the logits and, if symmetric, of the columns.

A state is what is known of a row or column from the tiles so far: maximum, sum of exponentials relative to a power of
two (`mass`) and, where needed, sum and number of the logits and two more sums of exponentials. The first kernel walks
over tiles and leaves states of rows and columns in slots, memory that one program alone writes; the second,
`_softmax_stats_merge_kernel`, merges the slots into the statistics. docs/design/contrastive.md, "The Triton kernels"
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logit_tile import tile_logits

LN2 = tl.constexpr(0.6931471805599453)
# As float32 it is too small by 1.3e-8 of itself, which times s = 2000 changes e^s by 3e-5. So s always meets a maximum
# or a log-sum-exp that went through the same `_binary`, and only their difference is wrong by that much.
LOG2E = tl.constexpr(1.4426950408889634)
# The columns of a tile add up the exponentials of its rows, e^s / 2^reference, while no row's reference is more than
# this above a column's largest logit (as powers of two). Float32 sums keep what is within 2^-25 of their largest term,
# and 100 + 25 powers below a reference are still above 2^-126, the least normal number.
SPREAD = tl.constexpr(100.0)


@triton.jit
def _reference(best):
    up = tl.ceil(best * LOG2E)
    return tl.where(tl.abs(up) == float("inf"), 0.0, up)


@triton.jit
def _binary(s, reference):
    """log2(e^s / 2^reference), rounded once, as s may be large."""
    return tl.fma(s, LOG2E, -reference)


@triton.jit
def _below(s, reference):
    """e^s / 2^reference."""
    return tl.exp2(_binary(s, reference))


@triton.jit
def _shift(old, new, reference):
    """The factor that takes a mass with maximum `old` from `reference` to the reference of the maximum `new`."""
    return tl.where(old == float("-inf"), 0.0, tl.exp2(reference - _reference(new)))


@triton.jit
def _merge(a, b, b_reference, beta, MOMENTS: tl.constexpr, HARD: tl.constexpr):
    """The state of the union of two disjoint sets; the mass of the second may have another reference than its own."""
    best = tl.maximum(a[0], b[0])
    mass = a[1] * _shift(a[0], best, _reference(a[0])) + b[1] * _shift(b[0], best, b_reference)
    total, count, hard, soft = a[2], a[3], a[4], a[5]
    if MOMENTS:
        total += b[2]
        count += b[3]
    if HARD:
        hard = hard * _power_shift(a[0], best, 1.0 + beta) + b[4] * _power_shift(b[0], best, 1.0 + beta)
        soft = soft * _power_shift(a[0], best, beta) + b[5] * _power_shift(b[0], best, beta)
    return best, mass, total, count, hard, soft


@triton.jit
def _power_below(s, best, power):
    """e^(power (s - best)): the difference first, as power s has no digits left for it."""
    best = tl.where(best == float("-inf"), 0.0, best)
    return tl.exp2((s - best) * (power * LOG2E))


@triton.jit
def _power_shift(old, new, power):
    return tl.where(old == float("-inf"), 0.0, _power_below(old, new, power))


@triton.jit
def _tile_state(s, best, mass, beta, AXIS: tl.constexpr, MOMENTS: tl.constexpr, HARD: tl.constexpr):
    """State of a tile's rows (AXIS 1) or columns (0), given their maxima and sums of exponentials."""
    total, count, hard, soft = mass, mass, mass, mass
    if MOMENTS:
        allowed = s != float("-inf")
        total = tl.sum(tl.where(allowed, s, 0.0), AXIS)
        count = tl.sum(allowed.to(tl.float32), AXIS)
    if HARD:
        hard = tl.sum(_power_below(s, tl.expand_dims(best, AXIS), 1.0 + beta), AXIS)
        soft = tl.sum(_power_below(s, tl.expand_dims(best, AXIS), beta), AXIS)
    return best, mass, total, count, hard, soft


@triton.jit
def _no_state(SIZE: tl.constexpr):
    zero = tl.zeros((SIZE,), tl.float32)
    return zero - float("inf"), zero, zero, zero, zero, zero


@triton.jit
def _store_state(ptr, state, index, stride, mask, MOMENTS: tl.constexpr, HARD: tl.constexpr):
    """`ptr` is a slot: (states, M)."""
    tl.store(ptr + index, state[0], mask)
    tl.store(ptr + stride + index, state[1], mask)
    if MOMENTS:
        tl.store(ptr + 2 * stride + index, state[2], mask)
        tl.store(ptr + 3 * stride + index, state[3], mask)
    if HARD:
        hard = 4 if MOMENTS else 2
        tl.store(ptr + hard * stride + index, state[4], mask)
        tl.store(ptr + (hard + 1) * stride + index, state[5], mask)


@triton.jit
def _load_state(ptr, index, stride, mask, MOMENTS: tl.constexpr, HARD: tl.constexpr):
    best = tl.load(ptr + index, mask, other=float("-inf"))
    mass = tl.load(ptr + stride + index, mask, other=0.0)
    total, count, hard, soft = mass, mass, mass, mass
    if MOMENTS:
        total = tl.load(ptr + 2 * stride + index, mask, other=0.0)
        count = tl.load(ptr + 3 * stride + index, mask, other=0.0)
    if HARD:
        at = 4 if MOMENTS else 2
        hard = tl.load(ptr + at * stride + index, mask, other=0.0)
        soft = tl.load(ptr + (at + 1) * stride + index, mask, other=0.0)
    return best, mass, total, count, hard, soft


@triton.jit
def _merge_columns(
    slot, s, found, first, known, end, stride, beta, MOMENTS: tl.constexpr, HARD: tl.constexpr
):  # fmt: skip
    """Merge the states of a tile's columns, `found` their (maxima, masses, reference), into those in `slot`, which has
    none yet for columns from `known` on."""
    index = first + tl.arange(0, s.shape[1])
    before = _load_state(slot, index, stride, index < known, MOMENTS, HARD)
    seen = _tile_state(s, found[0], found[1], beta, 0, MOMENTS, HARD)
    seen = _merge(before, seen, found[2], beta, MOMENTS, HARD)
    _store_state(slot, seen, index, stride, index < end, MOMENTS, HARD)


@triton.jit
def _keep_references(kept, reference, row0, column0, sizes, BN: tl.constexpr):
    row = tl.arange(0, reference.shape[0])
    line = (column0 // BN).to(tl.int64) * sizes[0] + row0
    tl.store(kept[1] + line + row, reference, mask=row < sizes[0] - row0)


@triton.jit
def _keep(kept, e, reference, row0, column0, sizes):
    """Store a tile's exponentials and their references, infinite where they do not serve the columns."""
    row, column = tl.arange(0, e.shape[0]), tl.arange(0, e.shape[1])
    inside = row < sizes[0] - row0
    corner = kept[0] + tl.cast(row0, tl.int64) * kept[2] + column0
    tl.store(corner + (row[:, None] * kept[2] + column[None, :]), e.to(kept[0].dtype.element_ty), mask=inside[:, None])
    _keep_references(kept, reference, row0, column0, sizes, e.shape[1])


@triton.jit
def _first_above(row0, BN: tl.constexpr):
    """The first block of columns with some above the diagonal of the rows from row0 on."""
    return (row0 + 1) // BN


@triton.jit
def _softmax_stats_fwd_kernel(
    query,  # (M, D), key (N, D), or their products: see logit_tile.py; triton 3.6 has no descriptors in tuples
    key,
    rows,  # row_scale, excluded, row_ids, ceiling: (M,), all but the first or None
    columns,  # column_scale, bias, column_ids: (N,) or None
    slots_ptr,  # (splits + groups, states, M); without SYMMETRIC (splits, states, M)
    kept,  # e (M, pitch), its references (column blocks, M) and pitch, for the backward; all None: nothing
    sizes,  # M, N, D
    plan,  # groups, splits; of a block of products rows [2]..[3], columns [4]..[5], and these rows' first column, [6]
    beta,
    FORM: tl.constexpr,  # what is left out (see logit_tile.py), symmetric, moments
    TILE: tl.constexpr,  # block of M, of N, of D, what the operands are, whether to share exponentials
):
    BM: tl.constexpr = TILE[0]
    BN: tl.constexpr = TILE[1]
    DIAGONAL: tl.constexpr = FORM[0]
    SYMMETRIC: tl.constexpr = FORM[1]
    MOMENTS: tl.constexpr = FORM[2]
    HARD: tl.constexpr = beta is not None
    STATES: tl.constexpr = 2 + (2 if MOMENTS else 0) + (2 if HARD else 0)
    operands = (query, key)
    group, split = tl.program_id(0) % plan[0], tl.program_id(0) // plan[0]
    stride = tl.cast(sizes[0], tl.int64)
    row_slot = slots_ptr + split.to(tl.int64) * STATES * stride
    column_slot = slots_ptr + (plan[1] + group).to(tl.int64) * STATES * stride
    corner, end, earlier = (0, 0), (sizes[0], sizes[1]), False
    if TILE[3] == 2:  # the states go on from those of the blocks above and to the left
        corner, end, earlier = (plan[2], plan[4]), (plan[3], plan[5]), plan[2] > 0
    for row_block in range(group, tl.cdiv(end[0] - corner[0], BM), plan[0]):
        row0 = corner[0] + row_block * BM
        state = _no_state(BM)
        if TILE[3] == 2:
            row = row0 + tl.arange(0, BM)
            state = _load_state(row_slot, row, stride, row < tl.where(plan[4] > plan[6], end[0], 0), MOMENTS, HARD)
        first = split
        if DIAGONAL == 2:  # the first of the split's blocks that has columns above the diagonal
            above = _first_above(row0, BN) - corner[1] // BN
            first += tl.cdiv(tl.maximum(above - split, 0), plan[1]) * plan[1]
        for column_block in range(first, tl.cdiv(end[1] - corner[1], BN), plan[1]):
            column0 = corner[1] + column_block * BN
            s, back = tile_logits(operands, row0, column0, rows, columns, sizes, SYMMETRIC, DIAGONAL, TILE)
            best, column_best = tl.max(s, 1), tl.max(back, 0)
            reference = _reference(best)
            e = _below(s, reference[:, None])
            seen = _tile_state(s, best, tl.sum(e, 1), beta, 1, MOMENTS, HARD)
            state = _merge(state, seen, reference, beta, MOMENTS, HARD)
            if not SYMMETRIC:
                if kept[0] is not None:
                    _keep(kept, e, reference, row0, column0, sizes)
            if SYMMETRIC and rows[3] is None and (TILE[4] or kept[0] is not None):
                top, least = tl.max(reference, 0), column_best
                if DIAGONAL == 2 or kept[0] is not None:  # columns without entries do not count
                    least = tl.where(column_best == float("-inf"), float("inf"), column_best)
                least = tl.min(least, 0)
                wide = top - least * LOG2E > SPREAD
                if wide:  # make the logits once more rather than hold them beside e
                    s, back = tile_logits(
                        operands, row0, column0, rows, columns, sizes, SYMMETRIC, DIAGONAL, TILE, True
                    )
                    column_mass = tl.sum(_below(s, _reference(tl.max(s, 0))[None, :]), 0)
                    if kept[0] is not None:  # the backward makes these again too
                        _keep_references(kept, tl.zeros((BM,), tl.float32) + float("inf"), row0, column0, sizes, BN)
                else:
                    column_mass = tl.sum(e * tl.exp2(reference - top)[:, None], 0)
                    if kept[0] is not None:
                        _keep(kept, e, reference, row0, column0, sizes)
                reference = tl.where(wide, _reference(column_best), top)
            else:
                reference = _reference(column_best)
                column_mass = tl.sum(_below(back, reference[None, :]), 0)
            if SYMMETRIC:
                known = tl.where((row_block > group) | earlier, sizes[1], 0)
                _merge_columns(
                    column_slot, back, (column_best, column_mass, reference), column0, known, sizes[1], stride, beta,
                    MOMENTS, HARD,
                )  # fmt: skip
        index = row0 + tl.arange(0, BM)
        _store_state(row_slot, state, index, stride, index < end[0], MOMENTS, HARD)
        if SYMMETRIC:
            tl.debug_barrier()  # the next row block reads what other threads may have stored


@triton.jit
def _softmax_stats_merge_kernel(
    slots_ptr,  # (splits + groups, states, M)
    stats_ptr,  # (directions, states, M)
    rows,
    plan,  # groups, splits
    beta,
    MOMENTS: tl.constexpr,
    UPPER: tl.constexpr,  # (rows, columns) of a tile if the logits are symmetric ("upper": one direction), else None
    SLOTS: tl.constexpr,  # a power of two, at least groups and splits; with UPPER at least their sum
    BLOCK: tl.constexpr,
):
    HARD: tl.constexpr = beta is not None
    STATES: tl.constexpr = 2 + (2 if MOMENTS else 0) + (2 if HARD else 0)
    direction = tl.program_id(1)
    stride = tl.cast(rows, tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    if UPPER is None:
        there = (slot < tl.where(direction == 0, plan[1], plan[0]))[:, None]
    else:  # a group of row blocks begins with its first, and has columns above the diagonal of that only
        above = index[None, :] // UPPER[1] >= _first_above((slot - plan[1]) * UPPER[0], UPPER[1])[:, None]
        there = (slot < plan[1])[:, None] | ((slot < plan[1] + plan[0])[:, None] & above)
    mask = there & (index < rows)[None, :]
    where = (slot.to(tl.int64) * STATES * stride)[:, None] + index[None, :]
    slots_ptr += direction * plan[1] * STATES * stride
    a = _load_state(slots_ptr, where, stride, mask, MOMENTS, HARD)
    best = tl.max(a[0], 0)
    mass = tl.sum(a[1] * _shift(a[0], best[None, :], _reference(a[0])), 0)
    stats_ptr += direction * STATES * stride + index
    inside = index < rows
    tl.store(stats_ptr, _log(best, mass), inside)
    tl.store(stats_ptr + stride, best, inside)
    if MOMENTS:
        tl.store(stats_ptr + 2 * stride, tl.sum(a[2], 0), inside)
        tl.store(stats_ptr + 3 * stride, tl.sum(a[3], 0), inside)
    if HARD:
        stats_ptr += (STATES - 2) * stride
        hard = tl.sum(a[4] * _power_shift(a[0], best[None, :], 1.0 + beta), 0)
        soft = tl.sum(a[5] * _power_shift(a[0], best[None, :], beta), 0)
        tl.store(stats_ptr, tl.log(hard), inside)
        tl.store(stats_ptr + stride, tl.log(soft), inside)


@triton.jit
def _log(best, mass):
    """The log-sum-exp of a state: the maximum itself, to the last digit, where that is all of the mass."""
    whole = tl.log2(mass)
    above = best + (whole - _binary(best, _reference(best))) * LN2
    return tl.where(tl.abs(best) == float("inf"), whole, above)
