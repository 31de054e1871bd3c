"""The backward of attention consistency from queries and keys in Triton: a kernel for the gradients of the queries, one
for those of the keys. Formulas: ../attention_qk.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..attention_qk import STATISTICS
from .attention_qk_tile import (
    LOG2E,
    SIZES,
    Place,
    Sizes,
    gradients,
    head_of,
    inside,
    keys_of,
    place_of,
    product,
    queries_of,
    rows_of,
)

COUNT = tl.constexpr(STATISTICS)
DS_SCALE = tl.constexpr(256.0)  # of the logits' gradients in float16, whose smallest numbers they would not reach


class Upstream(NamedTuple):
    grad: Any  # (rows,) or one, float32
    step: Any  # from a row's to the next: 1 or 0
    counted: Any  # one float32 by which it is divided, or None


class Out(NamedTuple):
    """Dense gradients of the two views, (B, H, Q, dim) or (B, G, K, dim). None: not needed."""

    one: Any
    two: Any


@triton.jit
def _weight(upstream, row, there):
    weight = tl.load(upstream.grad + row * upstream.step, mask=there, other=0.0)
    if upstream.counted is not None:
        weight = weight / tl.maximum(tl.load(upstream.counted), 1.0)
    return weight


@triton.jit
def _statistics(statistics_ptr, row, there):
    """What attention_qk_tile.gradients takes of rows; those that there are not do not count: gradients of 0."""
    at = statistics_ptr + row * COUNT
    return (
        tl.load(at, mask=there, other=float("inf")),
        tl.load(at + 1, mask=there, other=1.0),
        tl.load(at + 2, mask=there, other=float("inf")),
        tl.load(at + 3, mask=there, other=1.0),
        tl.load(at + 4, mask=there, other=0.0),
        tl.load(at + 5, mask=there, other=0.0),
    )


@triton.jit
def _tile_gradients(a, b, rows, scale1, scale2, METRIC: tl.constexpr):
    """From the products of a tile."""
    a = a * scale1
    b = b * scale2
    return gradients(a * LOG2E, b * LOG2E, a - b, rows, METRIC)


@triton.jit
def _add_product(acc, ds, x):
    """acc + ds x"""
    if x.dtype == tl.float16:
        ds = ds * DS_SCALE
    return tl.dot(ds.to(x.dtype), x, acc, input_precision="ieee")


@triton.jit
def _store(out_ptr, acc, weight, row, inside_rows, dim, DIM: tl.constexpr):
    """Rows of a gradient, times a weight of each row."""
    inner = tl.arange(0, DIM)
    element: tl.constexpr = out_ptr.dtype.element_ty
    if element == tl.float16:
        acc = acc * (1.0 / DS_SCALE)
    at = out_ptr + row[:, None] * dim + inner[None, :]
    tl.store(at, (acc * weight).to(element), mask=inside_rows[:, None] & (inner < dim)[None, :])


@triton.jit(do_not_specialize=SIZES)
def _attention_qk_queries_kernel(
    one,  # View
    two,
    left,  # Left, its spans those of queries
    statistics_ptr,  # (rows, STATISTICS) float32
    upstream,  # Upstream
    out,  # Out
    heads,
    queries,
    keys,
    TILE: tl.constexpr,  # TileConstants
):
    BM: tl.constexpr = TILE.queries
    BN: tl.constexpr = TILE.keys
    DIM1: tl.constexpr = TILE.dim1  # in a shape triton 3.6 does not take TILE.dim1
    DIM2: tl.constexpr = TILE.dim2
    sizes = Sizes(heads, queries, keys)
    tiles = tl.cdiv(sizes.queries, BM)
    place = place_of(tiles, sizes.heads)
    query0 = (tiles - 1 - place.tile) * BM  # of causal rows the longest first
    q1_ptr, k1_ptr = head_of(one, place.batch, place.head)
    q2_ptr, k2_ptr = head_of(two, place.batch, place.head)
    q1 = rows_of(q1_ptr, query0, sizes.queries, one.q_row, one.dim, BM, DIM1, TILE.whole1)
    q2 = rows_of(q2_ptr, query0, sizes.queries, two.q_row, two.dim, BM, DIM2, TILE.whole2)
    query = query0 + tl.arange(0, BM)
    there = query < sizes.queries
    row = (place.batch * sizes.heads + place.head) * sizes.queries + query
    rows = _statistics(statistics_ptr, row[:, None], there[:, None])
    loop = keys_of(left, query0, sizes, TILE)
    dq1 = tl.zeros((BM, DIM1), tl.float32)
    dq2 = tl.zeros((BM, DIM2), tl.float32)
    for key0 in range(loop.begin, loop.end, BN):
        k1 = rows_of(k1_ptr, key0, sizes.keys, one.k_row, one.dim, BN, DIM1, TILE.whole1)
        k2 = rows_of(k2_ptr, key0, sizes.keys, two.k_row, two.dim, BN, DIM2, TILE.whole2)
        ds1, ds2 = _tile_gradients(product(q1, k1), product(q2, k2), rows, one.scale, two.scale, TILE.metric)
        if TILE.partial:
            key = (key0 + tl.arange(0, BN))[None, :]
            valid = inside(query[:, None], key, key, place, left, loop, sizes, TILE)
            ds1 = tl.where(valid, ds1, 0.0)
            ds2 = tl.where(valid, ds2, 0.0)
        if out.one is not None:
            dq1 = _add_product(dq1, ds1, k1)
        if out.two is not None:
            dq2 = _add_product(dq2, ds2, k2)
    weight = _weight(upstream, row, there)[:, None]
    if out.one is not None:
        _store(out.one, dq1, weight * one.scale, row, there, one.dim, DIM1)
    if out.two is not None:
        _store(out.two, dq2, weight * two.scale, row, there, two.dim, DIM2)


@triton.jit(do_not_specialize=[*SIZES, "key_heads"])
def _attention_qk_keys_kernel(
    one,  # View
    two,
    left,  # Left, its spans those of keys
    statistics_ptr,  # (rows, STATISTICS) float32
    upstream,  # Upstream
    out,  # Out
    heads,
    queries,
    keys,
    key_heads,  # of the views whose gradients are made here
    EACH: tl.constexpr,  # whether upstream has a gradient for each row
    TILE: tl.constexpr,  # TileConstants
):
    BM: tl.constexpr = TILE.queries
    BN: tl.constexpr = TILE.keys
    DIM1: tl.constexpr = TILE.dim1  # in a shape triton 3.6 does not take TILE.dim1
    DIM2: tl.constexpr = TILE.dim2
    sizes = Sizes(heads, queries, keys)
    of_key = place_of(tl.cdiv(sizes.keys, BN), key_heads)
    key0 = of_key.tile * BN
    key = key0 + tl.arange(0, BN)
    there = key < sizes.keys
    loop = queries_of(left, key0, sizes, TILE)
    dk1 = tl.zeros((BN, DIM1), tl.float32)
    dk2 = tl.zeros((BN, DIM2), tl.float32)
    heads_of_key = sizes.heads // key_heads
    for nth in range(0, heads_of_key):
        place = Place(of_key.tile, of_key.head * heads_of_key + nth, of_key.batch)
        q1_ptr, k1_ptr = head_of(one, place.batch, place.head)
        q2_ptr, k2_ptr = head_of(two, place.batch, place.head)
        k1 = rows_of(k1_ptr, key0, sizes.keys, one.k_row, one.dim, BN, DIM1, TILE.whole1)
        k2 = rows_of(k2_ptr, key0, sizes.keys, two.k_row, two.dim, BN, DIM2, TILE.whole2)
        for query0 in range(loop.begin, loop.end, BM):
            q1 = rows_of(q1_ptr, query0, sizes.queries, one.q_row, one.dim, BM, DIM1, TILE.whole1)
            q2 = rows_of(q2_ptr, query0, sizes.queries, two.q_row, two.dim, BM, DIM2, TILE.whole2)
            query = (query0 + tl.arange(0, BM))[None, :]
            row = (place.batch * sizes.heads + place.head) * sizes.queries + query
            rows = _statistics(statistics_ptr, row, query < sizes.queries)
            ds1, ds2 = _tile_gradients(product(k1, q1), product(k2, q2), rows, one.scale, two.scale, TILE.metric)
            if TILE.partial:
                valid = inside(query, key[:, None], query, place, left, loop, sizes, TILE)
                ds1 = tl.where(valid, ds1, 0.0)
                ds2 = tl.where(valid, ds2, 0.0)
            if EACH:
                weight = _weight(upstream, row, query < sizes.queries)
                ds1 = ds1 * weight
                ds2 = ds2 * weight
            if out.one is not None:
                dk1 = _add_product(dk1, ds1, q1)
            if out.two is not None:
                dk2 = _add_product(dk2, ds2, q2)
    weight = 1.0 if EACH else tl.sum(_weight(upstream, tl.arange(0, 1), tl.arange(0, 1) == 0))
    row = (of_key.batch * key_heads + of_key.head) * sizes.keys + key
    if out.one is not None:
        _store(out.one, dk1, weight * one.scale, row, there, one.dim, DIM1)
    if out.two is not None:
        _store(out.two, dk2, weight * two.scale, row, there, two.dim, DIM2)
