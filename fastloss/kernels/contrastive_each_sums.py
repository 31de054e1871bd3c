"""The forward of kernels/contrastive_each.py: running sums over the negatives of a row, and their merging.

What would need all the threads of a program at every step waits for its end, so that between two tiles there is no
barrier: a tile lies in pieces narrow enough that one warp holds whole negatives, every row of a tile has a maximum and
totals of its own, and the vectors' sums are one number per element of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950216293335)  # as float32, what is missing being
LOG2E_REST = tl.constexpr(1.925963033500011e-08)


@triton.jit
def _exp(x):
    """e^x for x <= 0. A device has 2^x, so that the rounding of x log2(e) is a factor of its own."""
    x = tl.where(x < -200.0, -200.0, x)  # NaN stays
    power = x * LOG2E
    rest = tl.fma(x, LOG2E, -power) + x * LOG2E_REST
    whole = tl.exp2(power)
    return tl.fma(whole, rest * LN2, whole)


@triton.jit
def _more(total, vectors, power, scores, before, most, inverse, tile, KEEP: tl.constexpr):
    """One power's running sums with the scores of another tile."""
    factor = _exp(power * (before - most))
    share = tl.where(scores == float("-inf"), 0.0, _exp(power * (scores - most)))
    total = total * factor + share
    if KEEP:
        vectors = _pulled(vectors, factor[:, None], (share * inverse)[:, None], tile)
    return total, vectors


@triton.jit
def _pulled(vectors, factor, share, tile):
    new = ()
    for p in tl.static_range(len(tile)):
        new = new + (vectors[p] * factor + share * tile[p].to(tl.float32),)  # type: ignore[assignment]
    return new


@triton.jit
def _read(at, columns, there, width, PIECES: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr):
    """Rows in pieces of SPAN columns, as they are stored; WHOLE: the last piece is full."""
    tile = ()
    for p in tl.static_range(PIECES):
        mask = there if WHOLE else there & (columns + p * SPAN < width)
        tile = tile + (tl.load(at + p * SPAN, mask=mask, other=0.0),)  # type: ignore[assignment]
    return tile


@triton.jit
def _dot(a, b):
    """Products of rows. Fused by hand: where a compiler does, each lane rounds another of the two products that a
    butterfly adds up, and the lanes that share a logit no longer agree on it."""
    product = tl.fma(a[0].to(tl.float32), b[0].to(tl.float32), 0.0)
    for p in tl.static_range(1, len(a)):
        product = tl.fma(a[p].to(tl.float32), b[p].to(tl.float32), product)
    return tl.sum(product, 1)


@triton.jit
def _scores(tile, query, scale, ceiling, there, NORMALIZE: tl.constexpr):
    """A tile's logits, -inf where they are left out; which are in; the inverse lengths."""
    product = _dot(tile, query)
    inverse = tl.full(product.shape, 1.0, tl.float32)
    if NORMALIZE:
        square = _dot(tile, tile)
        inverse = tl.where(square <= 1e-24, 0.0, tl.div_rn(1.0, tl.sqrt_rn(square)))
    scores = scale * (inverse * product)
    if ceiling is not None:
        there = there & ((scores > ceiling) == 0)  # NaN stays in
    return tl.where(there, scores, float("-inf")), there, inverse


@triton.jit
def _empty(ROWS: tl.constexpr, PIECES: tl.constexpr, SPAN: tl.constexpr):
    sums = ()
    for _ in tl.static_range(PIECES):
        sums = sums + (tl.zeros((ROWS, SPAN), tl.float32),)  # type: ignore[assignment]
    return sums


@triton.jit
def _store_vectors(to, vectors, factor, width, SPAN: tl.constexpr):
    """A program's vectors: those of a tile's rows, each times its factor, added up."""
    columns = tl.arange(0, SPAN)
    for p in tl.static_range(len(vectors)):
        total = tl.sum(vectors[p] * factor[:, None], 0)
        tl.store(to + p * SPAN + columns, total, mask=p * SPAN + columns < width)


@triton.jit
def each_fwd_kernel(
    query_ptr,  # (rows, width)
    negatives_ptr,  # (rows, count, width), strides s_row, s_count, 1
    scale_ptr,  # (rows,) float32
    ceiling_ptr,  # (rows,) float32, or None
    parts_ptr,  # (rows, splits, 6) float32: max, sum, count, totals of the powers
    pulls_ptr,  # (rows, splits, POWERS + MOMENTS, width) float32, with KEEP
    logits_ptr,  # (rows, count) float32, or None
    inverse_ptr,  # (rows, count) float32, or None
    count,
    width,
    s_row,
    s_count,
    splits,
    hardness,
    NORMALIZE: tl.constexpr,
    MOMENTS: tl.constexpr,
    POWERS: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    SPAN: tl.constexpr,
    WHOLE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    columns = tl.arange(0, SPAN)[None, :]
    query = _read(query_ptr + row * width + columns, columns, columns < width, width, PIECES, SPAN, False)
    scale = tl.load(scale_ptr + row)
    ceiling = None if ceiling_ptr is None else tl.load(ceiling_ptr + row)
    negatives_ptr += row * s_row
    zero = tl.zeros((ROWS,), tl.float32)
    most, number, logit_sum, total, harder, easier = zero - 3.4e38, zero, zero, zero, zero, zero
    none = _empty(ROWS, PIECES, SPAN)
    vectors, hard_vectors, easy_vectors, plain_vectors = none, none, none, none
    first = (program % splits).to(tl.int32) * ROWS
    rows = first + tl.arange(0, ROWS)
    offsets = rows.to(tl.int64) * s_count if WIDE else rows * s_count
    at = negatives_ptr + offsets[:, None] + columns
    stride = tl.cast(splits * ROWS, tl.int64) * s_count
    if AHEAD:
        following = _read(at, columns, (rows < count)[:, None], width, PIECES, SPAN, WHOLE)
    for start in range(first, count, splits * ROWS):
        rows = start + tl.arange(0, ROWS)
        if AHEAD:  # the next tile is on its way while this one is worked on
            tile = following
            at += stride
            following = _read(at, columns, (rows < count - splits * ROWS)[:, None], width, PIECES, SPAN, WHOLE)
        else:
            tile = _read(at, columns, (rows < count)[:, None], width, PIECES, SPAN, WHOLE)
            at += stride
        scores, allowed, inverse = _scores(tile, query, scale, ceiling, rows < count, NORMALIZE)
        if logits_ptr is not None:
            entry = row * count + rows
            tl.store(logits_ptr + entry, scores, mask=rows < count)
            tl.store(inverse_ptr + entry, inverse, mask=rows < count)
        before = most
        most = tl.maximum(most, scores)
        if MOMENTS:
            number += tl.where(allowed, 1.0, 0.0)
            logit_sum += tl.where(allowed, scores, 0.0)
        total, vectors = _more(total, vectors, 1.0, scores, before, most, inverse, tile, KEEP)
        if POWERS == 3:
            harder, hard_vectors = _more(
                harder, hard_vectors, 1.0 + hardness, scores, before, most, inverse, tile, KEEP
            )
            easier, easy_vectors = _more(easier, easy_vectors, hardness, scores, before, most, inverse, tile, KEEP)
        if MOMENTS and KEEP:
            plain_vectors = _pulled(plain_vectors, 1.0, tl.where(allowed, inverse, 0.0)[:, None], tile)
    top = tl.max(most)
    parts_ptr += program * 6
    tl.store(parts_ptr, top)
    tl.store(parts_ptr + 1, tl.sum(logit_sum))
    tl.store(parts_ptr + 2, tl.sum(number))
    factor = _exp(most - top)
    tl.store(parts_ptr + 3, tl.sum(factor * total))
    to = pulls_ptr + program * (POWERS + MOMENTS) * width if KEEP else pulls_ptr
    if KEEP:
        _store_vectors(to, vectors, factor, width, SPAN)
    if POWERS == 3:
        factor = _exp((1.0 + hardness) * (most - top))
        tl.store(parts_ptr + 4, tl.sum(factor * harder))
        if KEEP:
            _store_vectors(to + width, hard_vectors, factor, width, SPAN)
        factor = _exp(hardness * (most - top))
        tl.store(parts_ptr + 5, tl.sum(factor * easier))
        if KEEP:
            _store_vectors(to + 2 * width, easy_vectors, factor, width, SPAN)
    if MOMENTS and KEEP:
        _store_vectors(to + POWERS * width, plain_vectors, zero + 1.0, width, SPAN)


@triton.jit
def each_merge_kernel(
    parts_ptr,  # (rows, splits, 6) float32, as the forward left them
    pulls_ptr,  # (rows, splits, POWERS + MOMENTS, width) float32, with KEEP
    stats_ptr,  # (statistics, rows) float32
    merged_ptr,  # (POWERS + MOMENTS, rows, width) float32, with KEEP
    rows,
    width,
    splits,
    hardness,
    MOMENTS: tl.constexpr,
    POWERS: tl.constexpr,
    KEEP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    exists = split < splits
    parts_ptr += row * splits * 6
    tops = tl.load(parts_ptr + split * 6, mask=exists, other=-3.4e38)
    most = tl.max(tops)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    pulls_ptr += row * splits * (POWERS + MOMENTS) * width
    if tl.program_id(1) == 0:
        tl.store(stats_ptr + rows + row, tl.where(most == -3.4e38, float("-inf"), most))
        if MOMENTS:
            logit_sum = tl.sum(tl.load(parts_ptr + split * 6 + 1, mask=exists, other=0.0))
            tl.store(stats_ptr + 2 * rows + row, logit_sum)
            number = tl.sum(tl.load(parts_ptr + split * 6 + 2, mask=exists, other=0.0))
            tl.store(stats_ptr + 3 * rows + row, number)
    for a in tl.static_range(POWERS + MOMENTS):
        power = 1.0 if a == 0 else 1.0 + hardness if a == 1 else hardness
        total = 1.0
        if a < POWERS:
            totals = tl.load(parts_ptr + split * 6 + 3 + a, mask=exists, other=0.0)
            total = tl.sum(_exp(power * (tops - most)) * totals)
            if tl.program_id(1) == 0:
                lse = tl.where(most == float("inf"), most, power * most + tl.log(total))
                place = 0 if a == 0 else 1 + 2 * MOMENTS + a
                tl.store(stats_ptr + place * rows + row, lse)
        if KEEP:
            vectors = tl.zeros((BLOCK,), tl.float32)
            for p in range(splits):
                factor = 1.0
                if a < POWERS:
                    factor = _exp(power * (tl.load(parts_ptr + p * 6) - most))
                at = pulls_ptr + (p * (POWERS + MOMENTS) + a) * width + columns
                vectors += factor * tl.load(at, mask=inside, other=0.0)
            vectors = tl.where(total == 0.0, 0.0, vectors / total)
            tl.store(merged_ptr + (a * rows + row) * width + columns, vectors, mask=inside)
