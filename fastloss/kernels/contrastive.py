"""Triton kernels of the softmax contrastive op (see losses/contrastive_softmax.py for its definition).

The logits s_ij = r_i c_j <q_i, k_j> + b_j are made tile by tile with `tl.dot` and never stored. A row's or a column's
state is

    best     max of s over its allowed entries
    mass     sum of e^s / 2^reference, reference = ceil(best / log 2): a whole number, so that the powers between
             references are exact, and each exponential costs one fused multiply-add and one exp2
    total, count                  with MOMENTS: sum and number of the allowed s
    hard, soft                    with HARD: mass at (1 + beta) s and at beta s, references ceil((1 + beta) best), ..

Forward: program (group, split) walks the tiles of its row blocks (group, group + groups, ..) and, within each, of its
column blocks (split, split + splits, ..). A row's state stays in registers along the walk and goes to slot `split`; the
columns' states are merged into slot splits + group, which this program alone writes. A second kernel merges the slots in
fixed order: no atomics. A symmetric tile needs one exponential per element: the columns' sums are those of the rows'
exponentials e, c_j = sum_i e_ij 2^(ref_i - t) with t the tile's largest reference, exact unless the tile's spread of
references is so wide that e could underflow where a column needs it. Such tiles take a second exponential.

Backward: a block of G_ij r_i c_j (of `workspace_mib` at most) is made in the embeddings' dtype from the same tiles, and
two library products turn it into d query and d key, accumulated in float32 over the blocks. With p = e^(s - lse_i) the
symmetric form again needs one exponential: G = p (g_i + h_j e^(lse_i - lse_j)), the power an outer product; where the
log-sum-exps of a tile lie too far apart for that, two. Then d r_i = <q_i, dq_i> / r_i and d c_j = <k_j, dk_j> / c_j.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import STREAM_OPTIONS, AotCase, on_device
from .contrastive_table import TF32, Tile, best_tile, products_kind, walk_plan
from .contrastive_tile import tile_logits

LOG2E = tl.constexpr(1.4426950408889634)
# log 2 in two parts: whole numbers up to 2^14 times the first are exact
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440054690583e-4)
# A tile's references may differ by this much before one exponential no longer serves rows and columns: what a sum needs
# lies within 25 of its reference, and 2^-126 is the least normal number.
SPREAD = tl.constexpr(100.0)
MERGE_BLOCK = 32  # rows per program of the merging kernel
FINISH_BLOCK = (8, 256)
GROUP = 8
_EMPTY = float("-inf")


@triton.jit
def _reference(best):
    up = tl.ceil(best * LOG2E)
    return tl.where(tl.abs(up) == float("inf"), 0.0, up)


@triton.jit
def _below(s, reference):
    """e^s / 2^reference; rounded once before the power, as s may be large."""
    return tl.exp2(tl.fma(s, LOG2E, -reference))


@triton.jit
def _shift(old, new):
    """The factor that takes a mass from the reference of the maximum `old` to that of `new`."""
    return tl.where(old == float("-inf"), 0.0, tl.exp2(_reference(old) - _reference(new)))


@triton.jit
def _merge(a, b, beta, MOMENTS: tl.constexpr, HARD: tl.constexpr):
    """The state of the union of two disjoint sets."""
    best = tl.maximum(a[0], b[0])
    mass = a[1] * _shift(a[0], best) + b[1] * _shift(b[0], best)
    total, count, hard, soft = a[2], a[3], a[4], a[5]
    if MOMENTS:
        total += b[2]
        count += b[3]
    if HARD:
        up = 1.0 + beta
        hard = hard * _shift(up * a[0], up * best) + b[4] * _shift(up * b[0], up * best)
        soft = soft * _shift(beta * a[0], beta * best) + b[5] * _shift(beta * b[0], beta * best)
    return best, mass, total, count, hard, soft


@triton.jit
def _tile_state(s, best, mass, beta, AXIS: tl.constexpr, MOMENTS: tl.constexpr, HARD: tl.constexpr):
    """State of a tile's rows (AXIS 1) or columns (0), given their maxima and masses."""
    total, count, hard, soft = mass, mass, mass, mass
    if MOMENTS:
        allowed = s != float("-inf")
        total = tl.sum(tl.where(allowed, s, 0.0), AXIS)
        count = tl.sum(allowed.to(tl.float32), AXIS)
    if HARD:
        up = 1.0 + beta
        hard = tl.sum(_below(up * s, tl.expand_dims(_reference(up * best), AXIS)), AXIS)
        soft = tl.sum(_below(beta * s, tl.expand_dims(_reference(beta * best), AXIS)), AXIS)
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
def _masses(s, best, column_best):
    """A tile's row masses and column masses, with one exponential per element where none underflows for the columns."""
    reference = _reference(best)
    top = tl.max(reference, 0)
    wide = top - tl.min(column_best, 0) * LOG2E > SPREAD
    if wide:
        mass = tl.sum(_below(s, reference[:, None]), 1)
        column_mass = tl.sum(_below(s, _reference(column_best)[None, :]), 0)
    else:
        e = _below(s, reference[:, None])
        mass = tl.sum(e, 1)
        column_mass = tl.sum(e * tl.exp2(reference - top)[:, None], 0)
    shift = tl.where(wide, 0.0, top - _reference(column_best))
    return mass, column_mass * tl.exp2(shift)


@triton.jit
def _contrastive_fwd_kernel(
    operands,  # query (M, D), key (N, D): pointers or tensor descriptors
    rows,  # row_scale, excluded, row_ids, ceiling: (M,), all but the first or None
    columns,  # column_scale, bias, column_ids: (N,) or None
    slots_ptr,  # (splits + groups, states, M); without SYMMETRIC (splits, states, M)
    sizes,  # M, N, D
    plan,  # groups, splits
    beta,
    DIAGONAL: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,  # block of M, of N, of D, whether operands are descriptors
):
    BM: tl.constexpr = TILE[0]
    BN: tl.constexpr = TILE[1]
    HARD: tl.constexpr = beta is not None
    STATES: tl.constexpr = 2 + (2 if MOMENTS else 0) + (2 if HARD else 0)
    group, split = tl.program_id(0) % plan[0], tl.program_id(0) // plan[0]
    stride = tl.cast(sizes[0], tl.int64)
    row_slot = slots_ptr + split.to(tl.int64) * STATES * stride
    column_slot = slots_ptr + (plan[1] + group).to(tl.int64) * STATES * stride
    for row_block in range(group, tl.cdiv(sizes[0], BM), plan[0]):
        row0 = row_block * BM
        state = _no_state(BM)
        for column_block in range(split, tl.cdiv(sizes[1], BN), plan[1]):
            column0 = column_block * BN
            s, back = tile_logits(
                operands, row0, column0, rows, columns, sizes, SYMMETRIC, DIAGONAL, PRECISION, TILE
            )
            best, column_best = tl.max(s, 1), tl.max(back, 0)
            if SYMMETRIC and rows[3] is None:
                mass, column_mass = _masses(s, best, column_best)
            else:
                mass = tl.sum(_below(s, _reference(best)[:, None]), 1)
                column_mass = tl.sum(_below(back, _reference(column_best)[None, :]), 0)
            state = _merge(state, _tile_state(s, best, mass, beta, 1, MOMENTS, HARD), beta, MOMENTS, HARD)
            if SYMMETRIC:
                index = column0 + tl.arange(0, BN)
                again = index < tl.where(row_block > group, sizes[1], 0)
                before = _load_state(column_slot, index, stride, again, MOMENTS, HARD)
                seen = _tile_state(back, column_best, column_mass, beta, 0, MOMENTS, HARD)
                _store_state(
                    column_slot, _merge(before, seen, beta, MOMENTS, HARD), index, stride, index < sizes[1], MOMENTS, HARD
                )
        index = row0 + tl.arange(0, BM)
        _store_state(row_slot, state, index, stride, index < sizes[0], MOMENTS, HARD)
        if SYMMETRIC:
            tl.debug_barrier()  # the next row block reads what other threads may have stored


@triton.jit
def _contrastive_merge_kernel(
    slots_ptr,  # (splits + groups, states, M)
    stats_ptr,  # (directions, states, M)
    rows,
    plan,  # groups, splits
    beta,
    MOMENTS: tl.constexpr,
    SLOTS: tl.constexpr,  # a power of two, at least groups and splits
    BLOCK: tl.constexpr,
):
    HARD: tl.constexpr = beta is not None
    STATES: tl.constexpr = 2 + (2 if MOMENTS else 0) + (2 if HARD else 0)
    direction = tl.program_id(1)
    stride = tl.cast(rows, tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    mask = (slot[:, None] < tl.where(direction == 0, plan[1], plan[0])) & (index < rows)[None, :]
    where = (slot.to(tl.int64) * STATES * stride)[:, None] + index[None, :]
    slots_ptr += direction * plan[1] * STATES * stride
    a = _load_state(slots_ptr, where, stride, mask, MOMENTS, HARD)
    best = tl.max(a[0], 0)
    mass = tl.sum(a[1] * _shift(a[0], best[None, :]), 0)
    stats_ptr += direction * STATES * stride + index
    inside = index < rows
    tl.store(stats_ptr, _log(best, mass), inside)
    tl.store(stats_ptr + stride, best, inside)
    if MOMENTS:
        tl.store(stats_ptr + 2 * stride, tl.sum(a[2], 0), inside)
        tl.store(stats_ptr + 3 * stride, tl.sum(a[3], 0), inside)
    if HARD:
        stats_ptr += (STATES - 2) * stride
        up = 1.0 + beta
        tl.store(stats_ptr, _log(up * best, tl.sum(a[4] * _shift(up * a[0], (up * best)[None, :]), 0)), inside)
        soft = tl.sum(a[5] * _shift(beta * a[0], (beta * best)[None, :]), 0)
        tl.store(stats_ptr + stride, _log(beta * best, soft), inside)


@triton.jit
def _log(best, mass):
    """The log-sum-exp of a state."""
    reference = _reference(best)
    return reference * LN2_HIGH + (reference * LN2_LOW + tl.log(mass))


@triton.jit
def _log_sum(stats_ptr, grad_ptr, index, mask):
    """(n, g) such that upstream times e^(s - lse) is g e^s / 2^n, n a whole number; (0, 0) where the sum has no terms."""
    lse = tl.load(stats_ptr + index, mask, other=0.0)
    empty = lse == float("-inf")
    reference = _reference(lse)
    rest = tl.exp2((reference * LN2_HIGH - lse + reference * LN2_LOW) * LOG2E)
    upstream = tl.load(grad_ptr + index, mask, other=0.0) * rest
    return reference, tl.where(empty, 0.0, upstream)


@triton.jit
def _pull(s, stats_ptr, grad_ptr, index, stride, mask, beta, AXIS: tl.constexpr, MOMENTS: tl.constexpr):
    """G_ij of one direction, whose stats and upstream are (states, M)."""
    HARD: tl.constexpr = beta is not None
    reference, up = _log_sum(stats_ptr, grad_ptr, index, mask)
    pull = _below(s, tl.expand_dims(reference, AXIS)) * tl.expand_dims(up, AXIS)
    if MOMENTS:
        up = tl.load(grad_ptr + 2 * stride + index, mask, other=0.0)
        pull += tl.where(s == float("-inf"), 0.0, tl.expand_dims(up, AXIS))
    if HARD:
        at: tl.constexpr = 4 if MOMENTS else 2
        reference, up = _log_sum(stats_ptr + at * stride, grad_ptr + at * stride, index, mask)
        more = 1.0 + beta
        pull += _below(more * s, tl.expand_dims(reference, AXIS)) * tl.expand_dims(more * up, AXIS)
        reference, up = _log_sum(stats_ptr + (at + 1) * stride, grad_ptr + (at + 1) * stride, index, mask)
        pull += _below(beta * s, tl.expand_dims(reference, AXIS)) * tl.expand_dims(beta * up, AXIS)
    return pull


@triton.jit
def _pull_both(s, stats_ptr, grad_ptr, row, column, rows, stride, STATES: tl.constexpr):
    """G_ij of both directions where log-sum-exps alone have an upstream: from one exponential wherever that is exact."""
    own, up = _log_sum(stats_ptr, grad_ptr, row, row < rows)
    other, down = _log_sum(stats_ptr + STATES * stride, grad_ptr + STATES * stride, column, column < rows)
    low, high = tl.min(other, 0), tl.max(other, 0)
    wide = (tl.max(own, 0) - low > SPREAD / 2) | (high - tl.min(own, 0) > SPREAD / 2)
    if wide:
        pull = _below(s, own[:, None]) * up[:, None] + _below(s, other[None, :]) * down[None, :]
    else:
        pull = _below(s, own[:, None]) * (up[:, None] + tl.exp2(own - low)[:, None] * (tl.exp2(low - other) * down)[None, :])
    return pull


@triton.jit
def _contrastive_bwd_kernel(
    operands,  # query (M, D), key (N, D): pointers or tensor descriptors
    rows,  # row_scale, excluded, row_ids, ceiling: (M,), all but the first or None
    columns,  # column_scale, bias, column_ids: (N,) or None
    results,  # G r c (block rows, pitch) in the embeddings' dtype, or None; column sums of G (row blocks, pitch), or None
    stats,  # stats, its upstream: (directions, states, M); factor of G (1,) or None
    sizes,  # M, N, D
    block,  # first row, first column, end of the rows, row blocks, column blocks, pitch
    beta,
    FORM: tl.constexpr,  # diagonal, symmetric, moments
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,  # row blocks walked together, so that the caches serve the keys of a group
):
    BM: tl.constexpr = TILE[0]
    BN: tl.constexpr = TILE[1]
    STATES: tl.constexpr = 2 + (2 if FORM[2] else 0) + (2 if beta is not None else 0)
    program = tl.program_id(0)
    first = program // (GROUP * block[4]) * GROUP
    height = tl.minimum(block[3] - first, GROUP)
    rest = program % (GROUP * block[4])
    row_block, column_block = first + rest % height, rest // height
    row0, column0 = block[0] + row_block * BM, block[1] + column_block * BN
    row, column = row0 + tl.arange(0, BM), column0 + tl.arange(0, BN)
    s, back = tile_logits(operands, row0, column0, rows, columns, sizes, FORM[1], FORM[0], PRECISION, TILE)
    stride = tl.cast(sizes[0], tl.int64)
    if not FORM[1]:
        pull = _pull(s, stats[0], stats[1], row, stride, row < sizes[0], beta, 1, FORM[2])
    elif FORM[2] or beta is not None or rows[3] is not None:
        pull = _pull(s, stats[0], stats[1], row, stride, row < sizes[0], beta, 1, FORM[2])
        other = STATES * stride
        inside = column < sizes[1]
        pull += _pull(back, stats[0] + other, stats[1] + other, column, stride, inside, beta, 0, FORM[2])
    else:
        pull = _pull_both(s, stats[0], stats[1], row, column, sizes[0], stride, STATES)
    at = column_block * BN + tl.arange(0, BN)
    if results[1] is not None:
        tl.store(results[1] + row_block.to(tl.int64) * block[5] + at, tl.sum(pull, 0))
    if results[0] is not None:
        scale = tl.load(rows[0] + row, mask=row < sizes[0], other=0.0)
        if stats[2] is not None:
            scale *= tl.load(stats[2])
        pull *= scale[:, None]
        if columns[0] is not None:
            pull *= tl.load(columns[0] + column, mask=column < sizes[1], other=0.0)[None, :]
        line = (row - block[0]).to(tl.int64) * block[5]
        out = results[0] + line[:, None] + at[None, :]
        tl.store(out, pull.to(results[0].dtype.element_ty), mask=(row < block[2])[:, None])


@triton.jit
def _contrastive_finish_kernel(
    sum_ptr,  # (rows, D) float32, contiguous: a gradient times the factor
    x_ptr,  # (rows, D), rows `pitch` apart: the embeddings it belongs to
    grad_ptr,  # (rows, D) contiguous: the gradient, or None
    scale_ptr,  # (rows,): scale of the embeddings, or None
    dot_ptr,  # (rows,): its gradient, or None
    factor_ptr,  # (1,) or None
    sizes,  # rows, D, pitch
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < sizes[0]
    line = row.to(tl.int64)[:, None]
    dot = tl.zeros((ROWS,), tl.float32)
    factor = 1.0
    if factor_ptr is not None:
        factor = 1.0 / tl.load(factor_ptr)
    for start in range(0, sizes[1], WIDTH):
        inner = start + tl.arange(0, WIDTH)[None, :]
        mask = inside[:, None] & (inner < sizes[1])
        value = tl.load(sum_ptr + line * sizes[1] + inner, mask=mask, other=0.0) * factor
        if grad_ptr is not None:
            tl.store(grad_ptr + line * sizes[1] + inner, value.to(grad_ptr.dtype.element_ty), mask=mask)
        if dot_ptr is not None:
            dot += tl.sum(value * tl.load(x_ptr + line * sizes[2] + inner, mask=mask, other=0.0).to(tl.float32), 1)
    if dot_ptr is not None:
        scale = tl.load(scale_ptr + row, mask=inside, other=1.0)
        tl.store(dot_ptr + row, tl.where(scale == 0, 0.0, dot / tl.where(scale == 0, 1.0, scale)), mask=inside)


def _embeddings(x: Tensor) -> Tensor:
    """`x` contiguous, aligned, and its rows padded with zeros to a multiple of 16 elements."""
    if x.shape[1] % 16:
        return F.pad(x, (0, -x.shape[1] % 16))
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


class _Call:
    """What both directions give their kernels: operands, vectors, form, tile."""

    def __init__(self, query: Tensor, key: Tensor, rows: tuple, columns: tuple, kind: str, hardness: float) -> None:
        self.query, self.key = _embeddings(query), _embeddings(key)
        self.rows = tuple(None if v is None else v.contiguous() for v in rows)
        self.columns = tuple(None if v is None else v.contiguous() for v in columns)
        if self.rows[2] is None or self.columns[2] is None:  # ids count only in pairs
            self.rows, self.columns = (*self.rows[:2], None, self.rows[3]), (*self.columns[:2], None)
        self.diagonal, self.symmetric, self.moments = (word in kind for word in ("diagonal", "symmetric", "moments"))
        self.beta = hardness if hardness > 0 else None
        self.states = 2 + 2 * self.moments + 2 * (hardness > 0)
        self.sizes = (query.shape[0], key.shape[0], self.query.shape[1])
        self.products = products_kind(query.dtype)
        self.tile, self.programs = best_tile(query.device, self.products, *self.sizes)
        self.options = self.tile.options

    def operands(self) -> tuple:
        if not self.tile.descriptors:
            return self.query, self.key
        blocks = (self.tile.rows, self.tile.columns)
        pairs = zip((self.query, self.key), blocks, strict=True)
        return tuple(TensorDescriptor.from_tensor(x, [block, self.tile.width]) for x, block in pairs)

    @property
    def precision(self) -> str:
        return "tf32" if self.products == TF32 else "ieee"


def contrastive_fwd(
    query: Tensor, key: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None,
    excluded: Tensor | None, row_ids: Tensor | None, column_ids: Tensor | None, ceiling: Tensor | None, kind: str,
    hardness: float, workspace_mib: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with on_device(query):
        rows, columns = (row_scale, excluded, row_ids, ceiling), (column_scale, bias, column_ids)
        call = _Call(query, key, rows, columns, kind, hardness)
        directions, count = 1 + call.symmetric, query.shape[0]
        stats = row_scale.new_empty((directions, call.states, count))
        stash = row_scale.new_empty(0)
        if count == 0 or key.shape[0] == 0:
            stats.zero_()[:, :2] = _EMPTY
            stats[:, 2 + 2 * call.moments :] = _EMPTY
            return stats, stash
        tile = call.tile
        plan = walk_plan(triton.cdiv(count, tile.rows), triton.cdiv(key.shape[0], tile.columns), call.programs)
        groups, splits = plan
        slots = row_scale.new_empty((splits + groups * call.symmetric, call.states, count))
        _contrastive_fwd_kernel[(groups * splits,)](
            call.operands(), call.rows, call.columns, slots, call.sizes, plan, call.beta,
            call.diagonal, call.symmetric, call.moments, call.precision, tile.constants, **call.options,
        )  # fmt: skip
        _contrastive_merge_kernel[(triton.cdiv(count, MERGE_BLOCK), directions)](
            slots, stats, count, plan, call.beta, call.moments, triton.next_power_of_2(max(splits, groups)),
            MERGE_BLOCK, **STREAM_OPTIONS,
        )  # fmt: skip
        return stats, stash


def block_plan(rows: int, columns: int, elements: int, tile: Tile) -> tuple[int, int]:
    """(rows, columns) of the blocks of G that `elements` hold, whole tiles of columns: square where not all fits.

    Each block reads and writes the gradients' sums once, so that a square has the least of that per product.
    """
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


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out (+)= a @ b; float32 sums of half-precision products."""
    if not a.is_cuda:  # the interpreter
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif first:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _half_range(grad: Tensor, call: _Call) -> Tensor:
    """A power of two (1,) that takes the largest |G| r c near 2^14: float16's range would lose the small ones."""
    weight = [1.0, 0.0] + [1.0, 0.0] * call.moments + ([1.0 + call.beta, call.beta] if call.beta else [])
    pulls = sum(w * grad[:, i].abs() for i, w in enumerate(weight) if w)
    largest = call.rows[0].abs().amax()
    across = 1.0 if call.columns[0] is None else call.columns[0].abs().amax()
    bound = (pulls[0] * call.rows[0].abs()).amax() * across
    if call.symmetric:
        bound = bound + pulls[1].amax() * largest * across
    power = torch.floor(14.0 - torch.log2(bound))
    return torch.exp2(torch.where(power.isfinite(), power, 0.0).clamp(-60.0, 60.0)).reshape(1)


class _Side:
    """The gradient of one of the embeddings, made of blocks, and of its scale."""

    def __init__(
        self, x: Tensor, width: int, scale: Tensor | None, needs: tuple[bool, bool], height: int, single: bool,
        factor: Tensor | None,
    ) -> None:  # fmt: skip
        self.x, self.scale, self.factor, self.height = x, scale, factor, height
        rows, (needs_x, needs_scale) = x.shape[0], needs
        self.grad = x.new_empty((rows, width) if needs_x else 0)
        self.dot = x.new_empty(rows if needs_scale else 0, dtype=torch.float32)
        self.needed = needs_x or needs_scale
        # sums in the gradient itself, where it is float32 or one rounded product is all
        self.direct = needs_x and factor is None and (x.dtype == torch.float32 or (single and not needs_scale))
        self.finishes = self.needed and (needs_scale or not self.direct)
        self.sums = self.grad if self.direct else x.new_empty((height if self.needed else 0, width), dtype=torch.float32)

    def part(self, start: int, stop: int) -> Tensor:
        """The sums of these rows, which are those of one block when sums are kept for one only."""
        return self.sums[start:stop] if self.direct or self.height == self.x.shape[0] else self.sums[: stop - start]

    def finish(self, start: int, stop: int) -> None:
        if not self.finishes:
            return
        x, sums = self.x[start:stop], self.part(start, stop)
        grad = None if self.direct or not self.grad.numel() else self.grad[start:stop]
        scaled = self.dot.numel() > 0
        _contrastive_finish_kernel[(triton.cdiv(stop - start, FINISH_BLOCK[0]),)](
            sums, x, grad, self.scale[start:stop] if scaled else None, self.dot[start:stop] if scaled else None,
            self.factor, (*sums.shape, x.stride(0)), *FINISH_BLOCK, **STREAM_OPTIONS,
        )  # fmt: skip


def contrastive_bwd(
    grad: Tensor, query: Tensor, key: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None,
    excluded: Tensor | None, row_ids: Tensor | None, column_ids: Tensor | None, ceiling: Tensor | None, kind: str,
    hardness: float, workspace_mib: float, stats: Tensor, stash: Tensor, needs_query: bool, needs_key: bool,
    needs_row_scale: bool, needs_column_scale: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (m, width), n = query.shape, key.shape[0]
    with on_device(query):
        rows, columns = (row_scale, excluded, row_ids, ceiling), (column_scale, bias, column_ids)
        call = _Call(query, key, rows, columns, kind, hardness)
        elements = int(workspace_mib * 2**20) // query.element_size()
        high, wide = block_plan(max(m, 1), max(n, 1), elements, call.tile)
        factor = _half_range(grad, call) if query.dtype == torch.float16 and m else None
        needs = ((needs_query, needs_row_scale), (needs_key, needs_column_scale))
        q = _Side(call.query, width, call.rows[0], needs[0], min(high, m), wide >= n, factor)
        k = _Side(call.key, width, call.columns[0], needs[1], n, high >= m, factor)
        bias_grad = row_scale.new_zeros(n if needs_bias else 0)
        out = (q.grad, k.grad, q.dot, k.dot, bias_grad)
        if m == 0 or n == 0:
            for each in out:
                each.zero_()
            return out
        _gradients(call, grad.contiguous(), stats, (high, wide), q, k, bias_grad)
    return out


def _gradients(
    call: _Call, grad: Tensor, stats: Tensor, blocks: tuple[int, int], q: _Side, k: _Side, bias_grad: Tensor
) -> None:
    """Fill the gradients block by block."""
    (m, n, _), (high, wide), tile = call.sizes, blocks, call.tile
    work = call.query.new_empty((high, wide)) if q.needed or k.needed else None
    sums = grad.new_empty((triton.cdiv(high, tile.rows), wide)) if bias_grad.numel() else None
    if work is None and sums is None:
        return
    form, operands = (call.diagonal, call.symmetric, call.moments), call.operands()
    for row, column in itertools.product(range(0, m, high), range(0, n, wide)):
        end, stop = min(row + high, m), min(column + wide, n)
        tiles = triton.cdiv(end - row, tile.rows), triton.cdiv(stop - column, tile.columns)
        _contrastive_bwd_kernel[(tiles[0] * tiles[1],)](
            operands, call.rows, call.columns, (work, sums), (stats, grad, q.factor), call.sizes,
            (row, column, end, *tiles, wide), call.beta, form, call.precision, tile.constants, GROUP, **call.options,
        )  # fmt: skip
        if sums is not None:
            bias_grad[column:stop] += sums[: tiles[0], : stop - column].sum(0)
        block = None if work is None else work[: end - row, : stop - column]
        if q.needed:
            _add_product(q.part(row, end), block, call.key[column:stop, : q.sums.shape[1]], column == 0)
            if stop == n:
                q.finish(row, end)
        if k.needed:
            _add_product(k.part(column, stop), block.T, call.query[row:end, : k.sums.shape[1]], row == 0)
            if end == m:
                k.finish(column, stop)


def _aot_call(
    dtype: torch.dtype, shape: tuple[int, int, int], kind: str, extras: tuple[str, ...] = (), hardness: float = 0.0
) -> tuple[tuple, tuple]:
    """Arguments of the two launchers on the meta device; `extras` names the optional vectors that are given."""
    rows, columns, width = shape
    meta = torch.device("meta")
    query, key = (torch.empty((size, width), dtype=dtype, device=meta) for size in (rows, columns))
    floats = {"column_scale": columns, "bias": columns, "ceiling": rows}
    vectors = {name: torch.empty(size, device=meta) if name in extras else None for name, size in floats.items()}
    whole = {"excluded": rows, "row_ids": rows, "column_ids": columns}
    ids = {
        name: torch.empty(size, dtype=torch.int64, device=meta) if name.split("_")[-1] in extras else None
        for name, size in whole.items()
    }
    given = (query, key, torch.empty(rows, device=meta), vectors["column_scale"], vectors["bias"], ids["excluded"])
    forward = (*given, ids["row_ids"], ids["column_ids"], vectors["ceiling"], kind, hardness, 256.0)
    count = 2 + 2 * ("moments" in kind) + 2 * (hardness > 0)
    stats = torch.empty((1 + ("symmetric" in kind), count, rows), device=meta)
    needs = (True, True, True, "column_scale" in extras, "bias" in extras)
    return forward, (stats, *forward, stats, torch.empty(0, device=meta), *needs)


def aot_cases() -> Iterator[AotCase]:
    """The forms of the losses in every dtype, widths of common encoders, small, odd and very large batches."""
    clip, one = ("diagonal+symmetric", ("column_scale",), 0.0), ("diagonal", ("column_scale",), 0.0)
    forms = [
        clip, one, ("diagonal+symmetric", (), 0.0), ("", ("column_scale", "excluded", "ids", "bias"), 0.0),
        ("diagonal+moments", ("column_scale", "excluded"), 0.0), ("diagonal", ("column_scale", "excluded"), 0.5),
        ("diagonal+symmetric+moments", ("column_scale", "ids"), 0.5), ("diagonal+symmetric", ("ceiling", "bias"), 0.0),
    ]  # fmt: skip
    calls = [(form, (4096, 4096, 512)) for form in forms]
    calls += [(clip, (4096, 4096, width)) for width in (64, 77, 640, 768, 1024, 1152, 16)]
    calls += [(form, shape) for form in (clip, one) for shape in ((200, 200, 512), (2**20, 2**20, 768))]
    for dtype, ((kind, extras, hardness), shape) in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), calls
    ):
        forward, backward = _aot_call(dtype, shape, kind, extras, hardness)
        words = (str(dtype).removeprefix("torch."), kind, *extras, f"beta {hardness}", "x".join(map(str, shape)))
        # without tf32 the float32 products of NVIDIA devices are plain multiply-adds
        half = dtype != torch.float32
        label = " ".join(words)
        yield AotCase(f"forward {label}", contrastive_fwd, forward, (), ("_contrastive_fwd_kernel",) * half)
        yield AotCase(f"backward {label}", contrastive_bwd, backward, (), ("_contrastive_bwd_kernel",) * half)
