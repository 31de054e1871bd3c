"""The forward of softmax_stats_per_query.py: running sums over the negatives of a row, and their merging.

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
def below_one(x):
    """e^x for x <= 0. A device has 2^x, so that the rounding of x log2(e) is a factor of its own."""
    x = tl.where(x < -200.0, -200.0, x)  # NaN stays
    power = x * LOG2E
    rest = tl.fma(x, LOG2E, -power) + x * LOG2E_REST
    whole = tl.exp2(power)
    return tl.fma(whole, rest * LN2, whole)


@triton.jit
def _more(total, vectors, power, scores, before, most, inverse, tiles, KEEP: tl.constexpr):
    """One power's running sums with the scores of more tiles."""
    factor = below_one(power * (before - most))
    total *= factor
    shares = ()
    for u in tl.static_range(len(tiles)):
        share = below_one(power * (scores[u] - most))  # 0 for -inf, as no maximum is that
        total += share
        shares = shares + (share * inverse[u],)  # type: ignore[assignment]
    if KEEP:
        vectors = _pulled(vectors, factor[:, None], shares, tiles)
    return total, vectors


@triton.jit
def _pulled(vectors, factor, shares, tiles):
    new = ()
    for p in tl.static_range(len(vectors)):
        vector = vectors[p] * factor
        for u in tl.static_range(len(tiles)):
            vector += shares[u][:, None] * tiles[u][p].to(tl.float32)
        new = new + (vector,)  # type: ignore[assignment]
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
def _read_tiles(
    at, stride, columns, left, width, TILES: tl.constexpr, PIECES: tl.constexpr, SPAN: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """TILES tiles, `stride` elements from one to the next; `left`: how many rows there are from the first on."""
    tiles = ()
    rows = tl.arange(0, at.shape[0])
    for u in tl.static_range(TILES):
        there = (rows < left - u * at.shape[0])[:, None]
        tiles = tiles + (_read(at + u * stride, columns, there, width, PIECES, SPAN, WHOLE),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _dot(a, b):
    """Products of rows. Fused by hand: where a compiler does, each lane rounds another of the two products that a
    butterfly adds up, and the lanes that share a logit no longer agree on it."""
    product = tl.fma(a[0].to(tl.float32), b[0].to(tl.float32), 0.0)
    for p in tl.static_range(1, len(a)):
        product = tl.fma(a[p].to(tl.float32), b[p].to(tl.float32), product)
    return tl.sum(product, 1)


@triton.jit
def _inverse_root(x):
    """1 / sqrt(x), the device's approximation and a step of Newton's; 0 up to 1e-24."""
    root = tl.rsqrt(x)
    return tl.where(x <= 1e-24, 0.0, tl.fma(0.5 * root, tl.fma(-x * root, root, 1.0), root))


@triton.jit
def _scores(tiles, query, scale, ceiling, left, NORMALIZE: tl.constexpr):
    """Logits of tiles, -inf where they are left out; which are in; the inverse lengths."""
    scores, allowed, inverses = (), (), ()
    rows = tl.arange(0, tiles[0][0].shape[0])
    for u in tl.static_range(len(tiles)):
        product = _dot(tiles[u], query)
        inverse = tl.full(product.shape, 1.0, tl.float32)
        if NORMALIZE:
            inverse = _inverse_root(_dot(tiles[u], tiles[u]))
        score = scale * (inverse * product)
        there = rows < left - u * rows.shape[0]
        if ceiling is not None:
            there = there & ((score > ceiling) == 0)  # NaN stays in
        scores = scores + (tl.where(there, score, float("-inf")),)  # type: ignore[assignment]
        allowed, inverses = allowed + (there,), inverses + (inverse,)  # type: ignore[assignment]
    return scores, allowed, inverses


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
def _store_sums(part, to, over, total, vectors, width, KEEP: tl.constexpr, SPAN: tl.constexpr):
    """A power's total and vectors, their slots brought to one maximum."""
    factor = below_one(over)
    tl.store(part, tl.sum(factor * total))
    if KEEP:
        _store_vectors(to, vectors, factor, width, SPAN)


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
    NORMALIZE: tl.constexpr, MOMENTS: tl.constexpr, POWERS: tl.constexpr, KEEP: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, PIECES: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
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
    step = splits * (ROWS * TILES)
    first = (program % splits).to(tl.int32) * (ROWS * TILES)
    rows = tl.arange(0, ROWS)
    offsets = (first + rows).to(tl.int64) * s_count if WIDE else (first + rows) * s_count
    at = negatives_ptr + offsets[:, None] + columns
    stride = tl.cast(s_count, tl.int64) * ROWS
    if AHEAD:
        following = _read_tiles(at, stride, columns, count - first, width, TILES, PIECES, SPAN, WHOLE)
    for start in range(first, count, step):
        left = count - start
        if AHEAD:  # the next tiles are on their way while these are worked on
            tiles = following
            at += splits * TILES * stride
            following = _read_tiles(at, stride, columns, left - step, width, TILES, PIECES, SPAN, WHOLE)
        else:
            tiles = _read_tiles(at, stride, columns, left, width, TILES, PIECES, SPAN, WHOLE)
            at += splits * TILES * stride
        scores, allowed, inverse = _scores(tiles, query, scale, ceiling, left, NORMALIZE)
        before = most
        for u in tl.static_range(TILES):
            if logits_ptr is not None:
                entry = start + u * ROWS + rows
                tl.store(logits_ptr + row * count + entry, scores[u], mask=entry < count)
                tl.store(inverse_ptr + row * count + entry, inverse[u], mask=entry < count)
            most = tl.maximum(most, scores[u])
            if MOMENTS:
                number += tl.where(allowed[u], 1.0, 0.0)
                logit_sum += tl.where(allowed[u], scores[u], 0.0)
        total, vectors = _more(total, vectors, 1.0, scores, before, most, inverse, tiles, KEEP)
        if POWERS == 3:
            more = 1.0 + hardness
            harder, hard_vectors = _more(harder, hard_vectors, more, scores, before, most, inverse, tiles, KEEP)
            easier, easy_vectors = _more(easier, easy_vectors, hardness, scores, before, most, inverse, tiles, KEEP)
        if MOMENTS and KEEP:
            for u in tl.static_range(TILES):
                share = tl.where(allowed[u], inverse[u], 0.0)
                plain_vectors = _pulled(plain_vectors, 1.0, (share,), (tiles[u],))
    parts_ptr += program * 6
    top = tl.max(most)
    tl.store(parts_ptr, top)
    tl.store(parts_ptr + 1, tl.sum(logit_sum))
    tl.store(parts_ptr + 2, tl.sum(number))
    to = pulls_ptr + program * (POWERS + MOMENTS) * width if KEEP else pulls_ptr
    _store_sums(parts_ptr + 3, to, most - top, total, vectors, width, KEEP, SPAN)
    if POWERS == 3:
        hard_over, easy_over = (1.0 + hardness) * (most - top), hardness * (most - top)
        _store_sums(parts_ptr + 4, to + width if KEEP else to, hard_over, harder, hard_vectors, width, KEEP, SPAN)
        _store_sums(parts_ptr + 5, to + 2 * width if KEEP else to, easy_over, easier, easy_vectors, width, KEEP, SPAN)
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
    PARTS: tl.constexpr,
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
            total = tl.sum(below_one(power * (tops - most)) * totals)
            if tl.program_id(1) == 0:
                over = most if a == 0 else 0.0
                lse = tl.where(most == float("inf"), most, over + tl.log(total))
                place = 0 if a == 0 else 1 + 2 * MOMENTS + a
                tl.store(stats_ptr + place * rows + row, lse)
        if KEEP:
            vectors = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, splits, PARTS):
                p = start + tl.arange(0, PARTS)
                mask = (p < splits)[:, None] & inside
                at = pulls_ptr + (p * (POWERS + MOMENTS) + a)[:, None] * width + columns
                part = tl.load(at, mask=mask, other=0.0)
                if a < POWERS:
                    top = tl.load(parts_ptr + p * 6, mask=p < splits, other=-3.4e38)
                    part *= below_one(power * (top - most))[:, None]
                vectors += tl.sum(part, 0)
            vectors = tl.where(total == 0.0, 0.0, vectors / total)
            tl.store(merged_ptr + (a * rows + row) * width + columns, vectors, mask=inside)
