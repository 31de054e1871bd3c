"""Kernels of the contrastive gradients: blocks of G."""

from __future__ import annotations

import triton
import triton.language as tl

from .logit_tile import tile_logits
from .online_softmax import LOG2E, _below, _binary, _reference

# An exponential below a row's reference serves the columns whose references lie no further than this under it.
SPREAD_BACK = tl.constexpr(96.0)
AGAIN, KEPT, FLAGGED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _log_sum(stats_ptr, grad_ptr, index, mask, ANEW: tl.constexpr = False):
    """(n, g): upstream times e^(s - lse) is g _below(s, n), n a whole number; (0, 0) where it has no terms."""
    lse = tl.load(stats_ptr + index, mask, other=0.0, volatile=ANEW)
    empty = lse == float("-inf")
    reference = _reference(lse)
    upstream = tl.load(grad_ptr + index, mask, other=0.0, volatile=ANEW) * tl.exp2(-_binary(lse, reference))
    return reference, tl.where(empty, 0.0, upstream)


@triton.jit
def _hard_pull(d, stats_ptr, grad_ptr, index, mask, power, AXIS: tl.constexpr):
    """Upstream times e^(power d - lse), 0 where there are no terms."""
    lse = tl.load(stats_ptr + index, mask, other=0.0)
    up = tl.load(grad_ptr + index, mask, other=0.0)
    empty = lse == float("-inf")
    lse, up = tl.where(empty, 0.0, lse), tl.where(empty, 0.0, up)
    return tl.exp2((d * power - tl.expand_dims(lse, AXIS)) * LOG2E) * tl.expand_dims(up, AXIS)


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
        best = tl.load(stats_ptr + stride + index, mask, other=0.0)
        best = tl.where(best == float("-inf"), 0.0, best)
        stats_ptr, grad_ptr = stats_ptr + at * stride, grad_ptr + at * stride
        d = s - tl.expand_dims(best, AXIS)
        harder = _hard_pull(d, stats_ptr, grad_ptr, index, mask, 1.0 + beta, AXIS)
        pull += harder + beta * (harder + _hard_pull(d, stats_ptr + stride, grad_ptr + stride, index, mask, beta, AXIS))
    return pull


@triton.jit
def _pull_both(s, stats_ptr, grad_ptr, row, column, rows, across):
    """G_ij of both directions of log-sum-exps alone: from one exponential wherever that is exact."""
    own, up = _log_sum(stats_ptr, grad_ptr, row, row < rows)
    other, down = _log_sum(stats_ptr + across, grad_ptr + across, column, column < rows)
    low = tl.min(other, 0)
    if tl.max(own, 0) - low > SPREAD_BACK:
        # read anew: the registers of a whole tile have no room to keep both
        other, down = _log_sum(stats_ptr + across, grad_ptr + across, column, column < rows, True)
        pull = _below(s, other[None, :]) * down[None, :]
        pull = tl.fma(_below(s, own[:, None]), up[:, None], pull)
    else:
        pull = _below(s, own[:, None])
        pull *= tl.fma(tl.exp2(own - low)[:, None], (tl.exp2(low - other) * down)[None, :], up[:, None])
    return pull


@triton.jit
def _pull_again(
    operands, row0, column0, rows, columns, sizes, stats, across, beta, FORM: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """G_ij from logits that are made again."""
    s, back = tile_logits(operands, row0, column0, rows, columns, sizes, FORM[1], FORM[0], TILE)
    row, column = row0 + tl.arange(0, TILE[0]), column0 + tl.arange(0, TILE[1])
    stride = tl.cast(sizes[0], tl.int64)
    if not FORM[1]:
        pull = _pull(s, stats[0], stats[1], row, stride, row < sizes[0], beta, 1, FORM[2])
    elif FORM[2] or beta is not None or rows[3] is not None:
        pull = _pull(s, stats[0], stats[1], row, stride, row < sizes[0], beta, 1, FORM[2])
        inside = column < sizes[1]
        pull += _pull(back, stats[0] + across, stats[1] + across, column, stride, inside, beta, 0, FORM[2])
    else:
        pull = _pull_both(s, stats[0], stats[1], row, column, sizes[0], across)
    return pull


@triton.jit
def _pull_kept(reference, stats, row0, column0, row, column, sizes, across, FORM: tl.constexpr):
    """G_ij from the exponentials that the forward has kept, those of row i below its reference in this tile."""
    inside = (row < sizes[0])[:, None]
    corner = stats[3] + tl.cast(row0, tl.int64) * stats[5] + column0
    if FORM[0] == 2:
        inside &= row[:, None] < column[None, :]
    e = tl.load(corner + (row - row0)[:, None] * stats[5] + (column - column0)[None, :], mask=inside, other=0.0)
    e = e.to(tl.float32)
    own, up = _log_sum(stats[0], stats[1], row, row < sizes[0])
    pull = (up * tl.exp2(reference - own))[:, None]
    if FORM[1]:
        other, down = _log_sum(stats[0] + across, stats[1] + across, column, column < sizes[1])
        top = tl.max(reference, 0)
        pull += tl.exp2(reference - top)[:, None] * (tl.exp2(top - other) * down)[None, :]
    return tl.where(e == 0.0, 0.0, e * pull)  # the references of rows without exponentials mean nothing


@triton.jit
def _store_pull(pull, where, rows, columns, results, stats, sizes, block):
    """G r c of a tile, and its column sums, to where the block has them."""
    row_block, column_block, row0, column0 = where
    BM: tl.constexpr = pull.shape[0]
    BN: tl.constexpr = pull.shape[1]
    row, column = row0 + tl.arange(0, BM), column0 + tl.arange(0, BN)
    if stats[6] is not None:
        own = row
        if rows[1] is not None:
            own = tl.load(rows[1] + row, mask=row < sizes[0], other=-1)
        positive = tl.load(stats[6] + row, mask=row < sizes[0], other=0.0)
        pull = tl.where(own[:, None] == column[None, :], positive[:, None], pull)
    at = column_block * BN + tl.arange(0, BN)
    if results[1] is not None:
        pull = tl.where((row < block[2])[:, None], pull, 0.0)  # a block's last tile has rows of the next
        tl.store(results[1] + row_block.to(tl.int64) * block[5] + at, tl.sum(pull, 0))
    if results[0] is not None:
        # read anew: the registers of a whole tile have no room to keep the scales from the logits on
        scale = tl.load(rows[0] + row, mask=row < sizes[0], other=0.0, volatile=True)
        if stats[2] is not None:
            scale *= tl.load(stats[2])
        pull *= scale[:, None]
        if columns[0] is not None:
            pull *= tl.load(columns[0] + column, mask=column < sizes[1], other=0.0, volatile=True)[None, :]
        corner = results[0] + (row0 - block[0]).to(tl.int64) * block[5] + column_block * BN
        out = corner + tl.arange(0, BM)[:, None] * block[5] + tl.arange(0, BN)[None, :]
        tl.store(out, pull.to(results[0].dtype.element_ty), mask=(row < block[2])[:, None])


@triton.jit
def _softmax_stats_bwd_kernel(
    query,  # (M, D), key (N, D), or their products, which G may replace: see logit_tile.py
    key,
    rows,  # row_scale, excluded, row_ids, ceiling: (M,), all but the first or None
    columns,  # column_scale, bias, column_ids: (N,) or None
    results,  # G r c (block rows, pitch) or None; column sums of G (row blocks, pitch) or None
    # stats, its upstream: (directions, states, M); factor of G (1,) or None; what the forward has kept or None: e (M,
    # pitch), its references (column blocks, M), the pitch; G of the positives (M,), which are no negatives, or None
    stats,
    sizes,  # M, N, D
    block,  # first row, first column, end of the rows, row blocks, column blocks, pitch
    beta,
    FORM: tl.constexpr,  # what is left out (see logit_tile.py), symmetric, moments
    TILE: tl.constexpr,
    PART: tl.constexpr,  # AGAIN: all tiles, from logits made again; KEPT: those kept; FLAGGED: the others, made again
    GROUP: tl.constexpr,  # row blocks walked together, so that the caches serve the keys of a group
):
    BM: tl.constexpr = TILE[0]
    BN: tl.constexpr = TILE[1]
    STATES: tl.constexpr = 2 + (2 if FORM[2] else 0) + (2 if beta is not None else 0)
    operands = (query, key)
    program = tl.program_id(0)
    first = program // (GROUP * block[4]) * GROUP
    height = tl.minimum(block[3] - first, GROUP)
    rest = program % (GROUP * block[4])
    row_block, column_block = first + rest % height, rest // height
    row0, column0 = block[0] + row_block * BM, block[1] + column_block * BN
    row, column = row0 + tl.arange(0, BM), column0 + tl.arange(0, BN)
    stride = tl.cast(sizes[0], tl.int64)
    # from a row's statistics to those of a column, which are a row's where rows and columns are the same
    across = (0 if FORM[0] == 2 else STATES) * stride
    if PART == AGAIN:
        pull = _pull_again(operands, row0, column0, rows, columns, sizes, stats, across, beta, FORM, TILE)
        _store_pull(pull, (row_block, column_block, row0, column0), rows, columns, results, stats, sizes, block)
    else:
        reference = tl.load(stats[4] + (column0 // BN) * stride + row, mask=row < sizes[0], other=-float("inf"))
        flagged = tl.max(reference, 0) == float("inf")
        if PART == FLAGGED:
            if flagged:
                pull = _pull_again(operands, row0, column0, rows, columns, sizes, stats, across, beta, FORM, TILE)
                _store_pull(pull, (row_block, column_block, row0, column0), rows, columns, results, stats, sizes, block)
        elif flagged == 0:
            pull = _pull_kept(reference, stats, row0, column0, row, column, sizes, across, FORM)
            _store_pull(pull, (row_block, column_block, row0, column0), rows, columns, results, stats, sizes, block)
