"""The forward of softmax_stats_per_query.py: running sums over the negatives of a row (per_query_merge.py merges them).

What would need all the threads of a program at every step waits for its end, so that between two tiles there is no
barrier: a tile lies in pieces narrow enough that one warp holds whole negatives, every row of a tile has a maximum and
sums of its own, and the weighted sum of negatives is one number per element of a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import odd_number
from .online_softmax import State

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950216293335)  # as float32, what is missing being
LOG2E_REST = tl.constexpr(1.925963033500011e-08)
LOWEST = tl.constexpr(-3.4e38)  # where there is no maximum yet
PARTIALS = tl.constexpr(6)  # numbers that a program leaves: max, sum, number, and the sum of exponentials of each power


class PerQueryInputs(NamedTuple):
    query: Tensor  # [M, D]
    negatives: Tensor  # [M, K, D], strides `row_stride`, `negative_stride`, 1
    mask: Tensor | None  # [M, K] bool: which of them count, and are read
    row_scale: Tensor  # [M] float32
    logit_limit: Tensor | None  # [M] float32


class PerQuerySizes(NamedTuple):
    rows: int  # M, as an odd_number
    negatives: int  # K
    dim: int  # D
    row_stride: int  # of the negatives, like the next
    negative_stride: int
    splits: int  # programs that share a row, as an odd_number


def per_query_sizes(negatives: Tensor, splits: int) -> PerQuerySizes:
    rows, count, dim = negatives.shape
    return PerQuerySizes(
        odd_number(rows), count, dim, negatives.stride(0), negatives.stride(1), odd_number(splits)
    )  # fmt: skip


class Partials(NamedTuple):
    """What each program leaves of its part of a row, for the merging."""

    sums: Tensor  # [M, splits, PARTIALS] float32
    weighted_keys: Tensor  # [M, splits, powers + moments, D] float32, if they are made


class SavedLogits(NamedTuple):
    """What the backward needs for the negatives' gradient, or all None."""

    logits: Tensor | None  # [M, K] float32
    inverse_norms: Tensor | None  # [M, K] float32


class WeightedKeys(NamedTuple):
    """Sums of c_k n_k, c = 1 / |n| or 1, weighted as named; each as many vectors as a negative has pieces."""

    of_exp: Any
    of_exp_1p_beta: Any
    of_exp_beta: Any
    of_ones: Any


class PerQueryForm(NamedTuple):
    """What the kernels are compiled for."""

    normalize: bool
    moments: int  # 1: sum and number of the logits, and the sum of the negatives
    powers: int  # of the exponentials: 1 is e^s; 3 with hardness beta: also e^((1 + beta) s) and e^(beta s)
    weighted_keys: bool  # made: each power's sum of negatives, weighted by the exponentials


class PerQueryTile(NamedTuple):
    """The negatives that a program of the forward reads at a time."""

    rows: int  # negatives in a tile
    tiles: int
    pieces: int  # in which each negative lies
    span: int  # columns of a piece
    whole: bool  # the last piece is full
    ahead: bool  # they are read while those before are worked on
    int64: bool  # for their offsets in memory


@triton.jit
def below_one(x):
    """e^x for x <= 0. A device has 2^x, so that the rounding of x log2(e) is a factor of its own."""
    x = tl.where(x < -200.0, -200.0, x)  # NaN stays
    power = x * LOG2E
    rest = tl.fma(x, LOG2E, -power) + x * LOG2E_REST
    whole = tl.exp2(power)
    return tl.fma(whole, rest * LN2, whole)


@triton.jit
def _add_scores(
    sum_exp, vectors, power, scores, old_max, new_max, inverse_norms, tiles, WEIGHTED_KEYS: tl.constexpr
):  # fmt: skip
    """One power's running sums with the scores of more tiles."""
    factor = below_one(power * (old_max - new_max))
    sum_exp *= factor
    weights = ()
    for u in tl.static_range(len(tiles)):
        weight = below_one(power * (scores[u] - new_max))  # 0 for -inf, as no maximum is that
        sum_exp += weight
        weights = weights + (weight * inverse_norms[u],)  # type: ignore[assignment]
    if WEIGHTED_KEYS:
        vectors = _add_vectors(vectors, factor[:, None], weights, tiles)
    return sum_exp, vectors


@triton.jit
def _add_vectors(vectors, factor, weights, tiles):
    new = ()
    for p in tl.static_range(len(vectors)):
        vector = vectors[p] * factor
        for u in tl.static_range(len(tiles)):
            vector += weights[u][:, None] * tiles[u][p].to(tl.float32)
        new = new + (vector,)  # type: ignore[assignment]
    return new


@triton.jit
def _read(ptr, columns, there, dim, PIECES: tl.constexpr, SPAN: tl.constexpr, WHOLE: tl.constexpr):
    """Rows in pieces of SPAN columns, as they are stored; WHOLE: the last piece is full."""
    pieces = ()
    for p in tl.static_range(PIECES):
        mask = there if WHOLE else there & (columns + p * SPAN < dim)
        pieces = pieces + (tl.load(ptr + p * SPAN, mask=mask, other=0.0),)  # type: ignore[assignment]
    return pieces


@triton.jit
def _counting(mask_ptr, start, left, first: tl.constexpr, ROWS: tl.constexpr):
    """Which of a tile's negatives count: the `first` of them in a step that begins at `start`, with `left` to come."""
    rows = first + tl.arange(0, ROWS)
    there = rows < left
    if mask_ptr is not None:
        there = there & (tl.load(mask_ptr + start + rows, mask=there, other=0) != 0)
    return there


@triton.jit
def _read_tiles(ptr, mask_ptr, start, stride, columns, left, dim, TILE: tl.constexpr):
    """The tiles of a step, `stride` elements from one to the next; `left`: how many negatives there are from the first
    on."""
    ROWS: tl.constexpr = TILE.rows
    TILES: tl.constexpr = TILE.tiles
    PIECES: tl.constexpr = TILE.pieces
    SPAN: tl.constexpr = TILE.span
    WHOLE: tl.constexpr = TILE.whole
    tiles = ()
    for u in tl.static_range(TILES):
        there = _counting(mask_ptr, start, left, u * ROWS, ROWS)[:, None]
        tiles = tiles + (_read(ptr + u * stride, columns, there, dim, PIECES, SPAN, WHOLE),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _dot(a, b):
    """Products of rows. Fused by hand: where a compiler does, each lane rounds another of the two products that a
    butterfly adds up, and the lanes that share a logit no longer agree on it."""
    product = 0.0
    for p in tl.static_range(len(a)):
        product = tl.fma(a[p].to(tl.float32), b[p].to(tl.float32), product)
    return tl.sum(product, 1)


@triton.jit
def _inverse_root(x):
    """1 / sqrt(x), the device's approximation and a step of Newton's; 0 up to 1e-24."""
    root = tl.rsqrt(x)
    return tl.where(x <= 1e-24, 0.0, tl.fma(0.5 * root, tl.fma(-x * root, root, 1.0), root))


@triton.jit
def _scores(tiles, query, scale, logit_limit, mask_ptr, start, left, NORMALIZE: tl.constexpr, ROWS: tl.constexpr):
    """Logits of tiles, -inf where they are left out; which are in; the inverse norms."""
    scores, allowed, inverse_norms = (), (), ()
    for u in tl.static_range(len(tiles)):
        product = _dot(tiles[u], query)
        inverse_norm = tl.full(product.shape, 1.0, tl.float32)
        if NORMALIZE:
            inverse_norm = _inverse_root(_dot(tiles[u], tiles[u]))
        score = scale * (inverse_norm * product)
        there = _counting(mask_ptr, start, left, u * ROWS, ROWS)
        if logit_limit is not None:
            there = there & ((score > logit_limit) == 0)  # NaN stays in
        scores = scores + (tl.where(there, score, float("-inf")),)  # type: ignore[assignment]
        allowed, inverse_norms = allowed + (there,), inverse_norms + (inverse_norm,)  # type: ignore[assignment]
    return scores, allowed, inverse_norms


@triton.jit
def _no_vectors(ROWS: tl.constexpr, PIECES: tl.constexpr, SPAN: tl.constexpr):
    sums = ()
    for _ in tl.static_range(PIECES):
        sums = sums + (tl.zeros((ROWS, SPAN), tl.float32),)  # type: ignore[assignment]
    return sums


@triton.jit
def _store_vectors(ptr, vectors, factor, dim, SPAN: tl.constexpr):
    """A program's vectors: those of a tile's rows, each times its factor, added up."""
    columns = tl.arange(0, SPAN)
    for p in tl.static_range(len(vectors)):
        vector = tl.sum(vectors[p] * factor[:, None], 0)
        tl.store(ptr + p * SPAN + columns, vector, mask=p * SPAN + columns < dim)


@triton.jit
def _store_sums(
    sum_ptr, vector_ptr, above_max, sum_exp, vectors, dim, WEIGHTED_KEYS: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """A power's sum of exponentials and vectors, those of a tile's rows brought to one maximum."""
    factor = below_one(above_max)
    tl.store(sum_ptr, tl.sum(factor * sum_exp))
    if WEIGHTED_KEYS:
        _store_vectors(vector_ptr, vectors, factor, dim, SPAN)


@triton.jit
def _store_partials(partials, program, state, sums, hardness, dim, FORM: tl.constexpr, SPAN: tl.constexpr):
    """What a program has found: `state` and `sums` of each row of a tile, brought to one maximum."""
    MOMENTS: tl.constexpr = FORM.moments
    POWERS: tl.constexpr = FORM.powers
    WEIGHTED_KEYS: tl.constexpr = FORM.weighted_keys
    numbers = partials.sums + program * PARTIALS
    s_max = tl.max(state.max)
    tl.store(numbers, s_max)
    tl.store(numbers + 1, tl.sum(state.logit_sum))
    tl.store(numbers + 2, tl.sum(state.number))
    first = partials.weighted_keys
    if WEIGHTED_KEYS:
        first += program * (POWERS + MOMENTS) * dim
    d = state.max - s_max
    _store_sums(numbers + 3, first, d, state.sum_exp, sums.of_exp, dim, WEIGHTED_KEYS, SPAN)
    if POWERS == 3:
        second, third = first, first
        if WEIGHTED_KEYS:
            second, third = first + dim, first + 2 * dim
        of_1p_beta, of_beta = (1.0 + hardness) * d, hardness * d
        sum_1p_beta, sum_beta = state.sum_exp_1p_beta, state.sum_exp_beta
        _store_sums(numbers + 4, second, of_1p_beta, sum_1p_beta, sums.of_exp_1p_beta, dim, WEIGHTED_KEYS, SPAN)
        _store_sums(numbers + 5, third, of_beta, sum_beta, sums.of_exp_beta, dim, WEIGHTED_KEYS, SPAN)
    if MOMENTS and WEIGHTED_KEYS:
        ones = tl.full(d.shape, 1.0, tl.float32)
        _store_vectors(first + POWERS * dim, sums.of_ones, ones, dim, SPAN)


@triton.jit
def per_query_fwd_kernel(
    inputs,  # PerQueryInputs
    partials,  # Partials
    saved,  # SavedLogits
    sizes,  # PerQuerySizes
    hardness,
    FORM: tl.constexpr,  # PerQueryForm
    TILE: tl.constexpr,  # PerQueryTile
):
    NORMALIZE: tl.constexpr = FORM.normalize
    MOMENTS: tl.constexpr = FORM.moments
    POWERS: tl.constexpr = FORM.powers
    WEIGHTED_KEYS: tl.constexpr = FORM.weighted_keys
    ROWS: tl.constexpr = TILE.rows
    TILES: tl.constexpr = TILE.tiles
    PIECES: tl.constexpr = TILE.pieces
    SPAN: tl.constexpr = TILE.span
    AHEAD: tl.constexpr = TILE.ahead
    INT64: tl.constexpr = TILE.int64
    dim, splits = sizes.dim, number_in(sizes.splits)
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    columns = tl.arange(0, SPAN)[None, :]
    query = _read(inputs.query + row * dim + columns, columns, columns < dim, dim, PIECES, SPAN, False)
    scale = tl.load(inputs.row_scale + row)
    logit_limit = None if inputs.logit_limit is None else tl.load(inputs.logit_limit + row)
    negatives_ptr = inputs.negatives + row * sizes.row_stride
    zero = tl.zeros((ROWS,), tl.float32)
    row_max, number, logit_sum, sum_exp, sum_exp_1p_beta, sum_exp_beta = zero + LOWEST, zero, zero, zero, zero, zero
    none = _no_vectors(ROWS, PIECES, SPAN)
    vectors, vectors_1p_beta, vectors_beta, vectors_of_sum = none, none, none, none
    step = splits * (ROWS * TILES)
    first = (program % splits).to(tl.int32) * (ROWS * TILES)
    rows = tl.arange(0, ROWS)
    offsets = (first + rows).to(tl.int64) * sizes.negative_stride if INT64 else (first + rows) * sizes.negative_stride
    ptr = negatives_ptr + offsets[:, None] + columns
    stride = tl.cast(sizes.negative_stride, tl.int64) * ROWS
    mask_ptr = None if inputs.mask is None else inputs.mask + row * sizes.negatives
    if AHEAD:
        following = _read_tiles(ptr, mask_ptr, first, stride, columns, sizes.negatives - first, dim, TILE)
    for start in range(first, sizes.negatives, step):
        left = sizes.negatives - start
        if AHEAD:  # the next tiles are on their way while these are worked on
            tiles = following
            ptr += splits * TILES * stride
            following = _read_tiles(ptr, mask_ptr, start + step, stride, columns, left - step, dim, TILE)
        else:
            tiles = _read_tiles(ptr, mask_ptr, start, stride, columns, left, dim, TILE)
            ptr += splits * TILES * stride
        scores, allowed, inverse_norms = _scores(
            tiles, query, scale, logit_limit, mask_ptr, start, left, NORMALIZE, ROWS
        )
        old_max = row_max
        for u in tl.static_range(TILES):
            if saved.logits is not None:
                entry = start + u * ROWS + rows
                inside = entry < sizes.negatives
                tl.store(saved.logits + row * sizes.negatives + entry, scores[u], mask=inside)
                tl.store(saved.inverse_norms + row * sizes.negatives + entry, inverse_norms[u], mask=inside)
            row_max = tl.maximum(row_max, scores[u])
            if MOMENTS:
                number += tl.where(allowed[u], 1.0, 0.0)
                logit_sum += tl.where(allowed[u], scores[u], 0.0)
        sum_exp, vectors = _add_scores(
            sum_exp, vectors, 1.0, scores, old_max, row_max, inverse_norms, tiles, WEIGHTED_KEYS
        )
        if POWERS == 3:
            sum_exp_1p_beta, vectors_1p_beta = _add_scores(
                sum_exp_1p_beta, vectors_1p_beta, 1.0 + hardness, scores, old_max, row_max, inverse_norms, tiles,
                WEIGHTED_KEYS,
            )  # fmt: skip
            sum_exp_beta, vectors_beta = _add_scores(
                sum_exp_beta, vectors_beta, hardness, scores, old_max, row_max, inverse_norms, tiles, WEIGHTED_KEYS
            )
        if MOMENTS and WEIGHTED_KEYS:
            for u in tl.static_range(TILES):
                weight = tl.where(allowed[u], inverse_norms[u], 0.0)
                vectors_of_sum = _add_vectors(vectors_of_sum, 1.0, (weight,), (tiles[u],))
    state = State(row_max, sum_exp, logit_sum, number, sum_exp_1p_beta, sum_exp_beta)
    sums = WeightedKeys(vectors, vectors_1p_beta, vectors_beta, vectors_of_sum)
    _store_partials(partials, program, state, sums, hardness, dim, FORM, SPAN)
