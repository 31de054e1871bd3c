"""A tile of both attention maps: logits, running sums of a divergence, gradients. The formulas: attention_qk.py.

Logits are in units of log 2, as exp2 takes them; differences d = s1 - s2 of them are natural.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
KL, SYM_KL, JS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class View(NamedTuple):
    """Queries (B, H, Q, dim) and keys (B, G, K, dim) of a view, the numbers of a row side by side."""

    q: Any
    k: Any
    scale: Any  # of the logits
    dim: Any
    heads_of_key: Any  # H / G
    q_batch: Any  # strides
    q_head: Any
    q_row: Any
    k_batch: Any
    k_head: Any
    k_row: Any


class Left(NamedTuple):
    """What says which keys a query has. None: it says nothing."""

    mask: Any  # (B, H, Q, K) bool
    mask_batch: Any  # its strides
    mask_head: Any
    mask_row: Any
    mask_key: Any
    spans: Any  # (2, n) int32: of each row of the outer loop the first of the inner one, and the one after its last


class Sizes(NamedTuple):
    heads: Any
    queries: Any
    keys: Any


# Sizes go to the kernels one by one, as Triton can be told then to compile none apart for multiples of 16; as odd
# numbers in a named tuple they would have to be computed, and take registers.
SIZES = ["heads", "queries", "keys"]


class TileConstants(NamedTuple):
    """As a constant of the kernels."""

    queries: int
    keys: int
    dim1: int  # powers of 2, the rest of a row reads 0
    dim2: int
    whole1: bool  # the view's dim is dim1
    whole2: bool
    causal: bool
    partial: bool  # some keys are left out, or they are no multiple of the tile's
    metric: int


class Place(NamedTuple):
    """What a program computes."""

    tile: Any  # of its head
    head: Any
    batch: Any


class Loop(NamedTuple):
    """What a program goes through, and the limits of each of its rows, where there are spans."""

    begin: Any
    end: Any
    first: Any  # (rows,)
    last: Any


@triton.jit
def place_of(tiles, heads):
    """Of this program: the tiles of a head one after the other, the heads of an element of the batch."""
    nth = tl.program_id(0) // tiles
    return Place(tl.program_id(0) % tiles, (nth % heads).to(tl.int64), (nth // heads).to(tl.int64))


@triton.jit
def head_of(view, batch, head):
    """Where a head's queries are, and its keys."""
    q_ptr = view.q + batch * view.q_batch + head * view.q_head
    return q_ptr, view.k + batch * view.k_batch + head // view.heads_of_key * view.k_head


@triton.jit
def keys_of(left, query0, sizes, TILE: tl.constexpr):
    """The keys that a tile of queries has."""
    BM: tl.constexpr = TILE.queries
    query = query0 + tl.arange(0, BM)
    if left.spans is not None:
        return _spanned(left, query, sizes.queries, sizes.keys, TILE.keys)
    elif TILE.causal:
        return Loop(tl.full((), 0, tl.int32), tl.minimum(sizes.keys, query0 + BM), query, query)
    else:
        return Loop(tl.full((), 0, tl.int32), sizes.keys, query, query)


@triton.jit
def queries_of(left, key0, sizes, TILE: tl.constexpr):
    """The queries that have a tile of keys."""
    BN: tl.constexpr = TILE.keys
    key = key0 + tl.arange(0, BN)
    if left.spans is not None:
        return _spanned(left, key, sizes.keys, sizes.queries, TILE.queries)
    elif TILE.causal:
        return Loop(key0 // TILE.queries * TILE.queries, sizes.queries, key, key)
    else:
        return Loop(tl.full((), 0, tl.int32), sizes.queries, key, key)


@triton.jit
def _spanned(left, row, count, end, STEP: tl.constexpr):
    there = row < count
    first = tl.load(left.spans + row, mask=there, other=2147483647)
    last = tl.load(left.spans + count + row, mask=there, other=0)
    return Loop(tl.min(first, 0) // STEP * STEP, tl.minimum(end, tl.max(last, 0)), first, last)


@triton.jit
def rows_of(base, first, count, stride, dim, ROWS: tl.constexpr, DIM: tl.constexpr, WHOLE: tl.constexpr):
    """Rows first .. first + ROWS, the last one in the place of those beyond `count`."""
    row = tl.minimum(first + tl.arange(0, ROWS), count - 1).to(tl.int64)
    inner = tl.arange(0, DIM)
    ptrs = base + row[:, None] * stride + inner[None, :]
    if WHOLE:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=inner[None, :] < dim, other=0.0)


@triton.jit
def product(a, b):
    """a b^T in float32; of float32 without tf32, whose ten bits are no digits for a difference of logits."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def inside(query, key, inner, place, left, loop, sizes, TILE: tl.constexpr):
    """Which keys the queries have; `query` and `key` are shaped to broadcast, `inner` is the one that is gone through,
    as are `loop`'s limits."""
    valid = (key < sizes.keys) & (query < sizes.queries)
    if left.spans is not None:
        valid &= (inner >= loop.first[:, None]) & (inner < loop.last[:, None])
    elif TILE.causal:
        valid &= key <= query
    if left.mask is not None:
        at = left.mask + place.batch * left.mask_batch + place.head * left.mask_head
        at += query.to(tl.int64) * left.mask_row + key.to(tl.int64) * left.mask_key
        valid &= tl.load(at, mask=valid, other=0) != 0
    return valid


@triton.jit
def _bregman(x):
    """(x - 1 + e^-x) / x^2 for |x| < 1/2."""
    p = x * 2.4801587e-5 - 1.9841270e-4
    p = p * x + 1.3888889e-3
    p = p * x - 8.3333333e-3
    p = p * x + 0.041666667
    p = p * x - 0.16666667
    return p * x + 0.5


@triton.jit
def excess(x):
    """x - 1 + e^-x, which is never negative, with its digits near 0. Of rows, not of elements."""
    return tl.where(tl.abs(x) < 0.5, x * x * _bregman(x), x - 1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def raised(maximum, tile):
    """(the larger maximum of each row, e^(old - new), what to subtract: 0 of a row without a key)."""
    new = tl.maximum(maximum, tl.max(tile, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(maximum - base), base


@triton.jit
def add_tile(state, a, b, d, METRIC: tl.constexpr):
    """The sums of rows with a tile more: (max1, sum1, max2, sum2, c, u, v, t2).

    c is the mean of d under the first view so far; with x = d - c and w = e^(s1 - max1), u = sum w (x - 1 + e^-x),
    sym_kl: v = sum w x (1 - e^-x), t2 = sum e^(s2 - max2) x. As c moves by h they become e^h u + sum w (e^h - 1 - h)
    and e^h v + h (e^h u + (e^h - 1) sum w): nothing cancels, however near the views are.
    """
    max1, sum1, max2, sum2, c, u, v, t2 = state
    max1, old1, base1 = raised(max1, a)
    max2, old2, base2 = raised(max2, b)
    w = tl.exp2(a - base1[:, None])
    e2 = tl.exp2(b - base2[:, None])
    before = sum1 * old1
    sum1 = before + tl.sum(w, 1)
    sum2 = sum2 * old2 + tl.sum(e2, 1)
    if METRIC != JS:
        x = d - c[:, None]
        moved = tl.sum(w * x, 1)
        h = tl.where(sum1 > 0.0, moved / sum1, moved)  # of NaN NaN
        grown = tl.exp2(h * LOG2E)
        first = before == 0.0
        u = tl.where(first, 0.0, grown * (u * old1))
        if METRIC == SYM_KL:
            v = tl.where(first, 0.0, grown * (v * old1) + h * (u + (grown - 1.0) * before))
            before2 = sum2 - tl.sum(e2, 1)
            t2 = t2 * old2 - h * before2 + tl.sum(e2 * (x - h[:, None]), 1)
        u += tl.where(first, 0.0, before * excess(-h))
        c += h
        x = x - h[:, None]
        far = tl.exp2(base2 - base1 + c * LOG2E)  # w e^-x = e2 * far
        more = tl.where(tl.abs(x) < 0.5, w * (x * x) * _bregman(x), w * (x - 1.0) + e2 * far[:, None])
        u += tl.sum(more, 1)
        if METRIC == SYM_KL:
            v += tl.sum(x * (w * x - more), 1)
    return max1, sum1, max2, sum2, c, u, v, t2


@triton.jit
def divergence(state, METRIC: tl.constexpr):
    """(the divergence of each row, both means) from the sums over all keys."""
    max1, sum1, max2, sum2, c, u, v, t2 = state
    share = u / sum1
    shift = (max1 - max2) * LN2 + tl.log(sum1 / sum2)
    mean2 = t2 / sum2  # of x, not of large numbers, whose rounding would be that of the gradients
    near = share < 0.5  # of NaN or infinite sums the direct formula, which loses digits where views are near only
    inner = tl.where(near, share, 0.0)
    if METRIC == KL:
        # log(1 + share), which tl.log(1 + share) rounds
        direct = c - shift
        z = inner / (2.0 + inner)
        q = z * z
        series = ((q * (1.0 / 9) + 1.0 / 7) * q + 0.2) * q + 1.0 / 3
        return tl.where(near, 2.0 * (z + z * q * series), direct), c, mean2
    else:
        return tl.where(near, 0.5 * (v / sum1) / (1.0 + inner), -0.5 * mean2), c, mean2


@triton.jit
def _log_share(p, total):
    """log(2 p / (p + q)); 0 where p is."""
    return tl.where(p > 0.0, tl.log(2.0 * p / total), tl.where(p == 0.0, 0.0, p))


@triton.jit
def js_terms(p, q):
    """By element: the divergence, and what its means are of."""
    total = p + q
    some = tl.where(total == 0.0, 1.0, total)
    r = (p - q) / some
    u = r * r
    of_p = p * _log_share(p, some)
    of_q = q * _log_share(q, some)
    s = u * (1.0 / 153) + 1.0 / 120
    s = s * u + 1.0 / 91
    s = s * u + 1.0 / 66
    s = s * u + 1.0 / 45
    s = s * u + 1.0 / 28
    s = s * u + 1.0 / 15
    s = s * u + 1.0 / 6
    return tl.where(u < 0.25, 0.25 * total * (u * (s * u + 1.0)), 0.5 * (of_p + of_q)), of_p, of_q


@triton.jit
def gradients(a, b, d, rows, METRIC: tl.constexpr):
    """The gradients of both views' logits but for the rows' weights.

    `rows`, of each row (max1, sum1, max2, sum2, mean1, mean2), are what the op saves: max in units of log 2, inf where
    the row does not count.
    """
    max1, sum1, max2, sum2, mean1, mean2 = rows
    p = tl.exp2(a - max1)
    # in units of p's: a product with 1, which equal views have here, is exact, also fused with a difference
    q = tl.exp2(b - max2) * tl.div_rn(sum1, sum2)
    unit = 1.0 / sum1
    half = 0.5 * unit
    if METRIC == JS:
        total = tl.where(p + q == 0.0, 1.0, p + q)
        return (half * p) * (_log_share(p, total) - mean1), (half * q) * (_log_share(q, total) - mean2)
    elif METRIC == KL:
        return (unit * p) * (d - mean1), unit * (q - p)
    else:
        more = p - q
        x = d - mean1
        return half * (p * x + more), -half * (q * (x - mean2) + more)
