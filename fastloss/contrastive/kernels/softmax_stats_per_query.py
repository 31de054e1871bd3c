"""Triton kernels for per-sample negatives [M, K, D]: statistics of their logits, and their gradient.

A program reads a tile of negatives of one row at a time, whole ones, and keeps running sums; `splits` programs share a
row. The forward's kernels are those of per_query_forward.py.

    s_k = r c_k <q, n_k>                         c_k = 1 / |n_k| (0 for zero vectors), or 1 without NORMALIZE
    part of the logits      max s, and for each power e of (1; 1 + beta, beta):  sum exp(e (s_k - max))
    part of the vectors     sum exp(e (s_k - max)) c_k n_k, the moments' sum c_k n_k  (KEEP)
    merged, in order        log-sum-exps (with hardness below max), max, sum, count;  the vectors over their total
    backward                d n_k = G_k c_k (r q - s_k c_k n_k),  G_k = sum_e g_e e exp(e d_k - lse_e) + g_sum
                            d_k = s_k for e = 1, else s_k - max

Bytes per element of size s: forward s, and the queries' gradient needs no more; the negatives' gradient 2 s, or s where
nothing is normalised, since it then needs no negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import AotCase, on_device, warp_size
from ...core.kernels.memory_order import needs_int64
from ..ops.softmax_stats_per_query import Grads, Inputs, Needs, Saved
from .per_query_forward import below_one, each_fwd_kernel, each_merge_kernel

TILE = 16384  # bytes of negatives that a program of the backward has at a time
# The forward's programs: sixteen warps are resident on a multiprocessor, and 2048 fill 132 of those just once.
FORWARD = {"enable_fp_fusion": True}
PROGRAMS = 2048  # of a warp
HELD = 32  # elements of the negatives in a thread at a time where one sum of vectors is kept; half where more are
MOST_ROWS, MOST_TILES = 64, 4
MOST_PIECES = 8  # in which a row of a tile lies, as each is code of its own
AHEAD = 1  # whether tiles are read while those before are worked on
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
PARTS, MERGED = 16, 128  # splits, and columns of their vectors, that a merging program reads at a time
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _each_query_kernel(
    grad_ptr,  # (statistics, rows) float32
    pulls_ptr,  # (POWERS + MOMENTS, rows, width) float32
    query_ptr,  # (rows, width)
    scale_ptr,  # (rows,) float32
    query_grad_ptr,  # (rows, width)
    scale_grad_ptr,  # (rows,) float32
    rows,
    width,
    hardness,
    MOMENTS: tl.constexpr,
    POWERS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    at = row * width + columns
    vectors = tl.zeros((WIDTH,), tl.float32)
    for a in tl.static_range(POWERS + MOMENTS):
        place = 0 if a == 0 else 2 if a == POWERS else 1 + 2 * MOMENTS + a
        slope = tl.load(grad_ptr + place * rows + row)
        there = inside & (tl.zeros((WIDTH,), tl.float32) + slope != 0.0)  # a row that is left out may be NaN
        pull = slope * tl.load(pulls_ptr + a * rows * width + at, mask=there, other=0.0)
        vectors += pull
        if POWERS == 3:
            if a == 1:
                harder = pull
            if a == 2:  # the two cancel before they are times the hardness
                vectors += hardness * (harder + pull) - pull
    query = tl.load(query_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale_grad_ptr + row, tl.sum(query * vectors))
    grad = tl.load(scale_ptr + row) * vectors
    tl.store(query_grad_ptr + at, grad.to(query_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hard_slope(grad_ptr, stats_ptr, over):
    return tl.load(grad_ptr) * below_one(over - tl.load(stats_ptr))


@triton.jit
def _each_negatives_kernel(
    grad_ptr,  # (statistics, rows) float32
    stats_ptr,  # (statistics, rows) float32
    query_ptr,  # (rows, width)
    negatives_ptr,  # (rows, count, width), strides s_row, s_count, 1
    scale_ptr,  # (rows,) float32
    logits_ptr,  # (rows, count) float32
    inverse_ptr,  # (rows, count) float32
    negatives_grad_ptr,  # (rows, count, width)
    rows,
    count,
    width,
    s_row,
    s_count,
    tiles,
    hardness,
    NORMALIZE: tl.constexpr,
    MOMENTS: tl.constexpr,
    POWERS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    k = (program % tiles).to(tl.int32) * ROWS + tl.arange(0, ROWS)
    there = k < count
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    mask = there[:, None] & inside
    zero = tl.zeros((ROWS,), tl.float32)
    used = zero + tl.load(grad_ptr + row) != 0.0
    if MOMENTS:
        used |= zero + tl.load(grad_ptr + 2 * rows + row) != 0.0
    for a in tl.static_range(1, POWERS):
        used |= zero + tl.load(grad_ptr + (1 + 2 * MOMENTS + a) * rows + row) != 0.0
    some = there & used  # a row that is left out may be NaN
    scores = tl.load(logits_ptr + row * count + k, mask=some, other=float("-inf"))
    inverse = tl.load(inverse_ptr + row * count + k, mask=some, other=0.0)
    out = scores == float("-inf")
    scores = tl.where(out, 0.0, scores)
    slope = tl.zeros((ROWS,), tl.float32)
    if MOMENTS:
        slope += tl.load(grad_ptr + 2 * rows + row)
    slope += tl.load(grad_ptr + row) * below_one(scores - tl.load(stats_ptr + row))
    if POWERS == 3:
        below = scores - tl.load(stats_ptr + rows + row)
        at: tl.constexpr = 2 + 2 * MOMENTS
        harder = _hard_slope(grad_ptr + at * rows + row, stats_ptr + at * rows + row, (1.0 + hardness) * below)
        at_less: tl.constexpr = 3 + 2 * MOMENTS
        less = _hard_slope(grad_ptr + at_less * rows + row, stats_ptr + at_less * rows + row, hardness * below)
        slope += harder + hardness * (harder + less)
    slope = tl.where(out, 0.0, slope * inverse)
    query = tl.load(query_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    grad = (slope * tl.load(scale_ptr + row))[:, None] * query
    if NORMALIZE:
        offsets = k.to(tl.int64) * s_count if WIDE else k * s_count
        at = negatives_ptr + row * s_row + offsets[:, None] + columns
        tile = tl.load(at, mask=mask & used[:, None], other=0.0).to(tl.float32)
        grad -= (slope * scores * inverse)[:, None] * tile
    offsets = k.to(tl.int64) * width if WIDE else k * width
    to = negatives_grad_ptr + row * count * width + offsets[:, None] + columns
    tl.store(to, grad.to(negatives_grad_ptr.dtype.element_ty), mask=mask)


def _tile(negatives: Tensor) -> tuple[int, int]:
    """(negatives in a tile, its width). Odd widths load single elements, and so hold more addresses in registers."""
    width = negatives.shape[2]
    wide = triton.next_power_of_2(width)
    elements = TILE // 4 if width % 8 else TILE // negatives.element_size()
    return max(1, min(32, elements // wide)), wide


def forward_tile(width: int, size: int, aligned: bool, sums: int) -> tuple[int, int, int, int, int]:
    """(rows, tiles, pieces, columns of a piece, warps) of a step of the forward: where it can be, a program is one warp
    with whole negatives, which waits for no other.

    `size`: bytes of an element; `aligned`: the negatives can be read in 128 bits; `sums`: of vectors, kept.
    """
    held = HELD if sums < 2 else HELD // 2
    warp, vector = warp_size(), 16 // size if aligned else 1
    warps = 1 if width <= warp * held and aligned else 4 if width <= 4 * warp * held else 8
    lanes, span = warp * warps, min(triton.next_power_of_2(width), warp * vector)
    while triton.cdiv(width, span) > MOST_PIECES or (
        triton.cdiv(width, span) * span > warp * held and span < lanes * held
    ):
        span *= 2
    pieces = triton.cdiv(width, span)
    rows = max(1, min(MOST_ROWS, lanes * vector // span))
    each = triton.next_power_of_2(max(1, rows * pieces * span // lanes))
    return rows, max(1, min(MOST_TILES, held // each)), pieces, span, warps


def _rows_contiguous(negatives: Tensor) -> Tensor:
    return negatives if negatives.stride(2) == 1 or negatives.shape[2] == 1 else negatives.contiguous()


def softmax_stats_per_query_fwd(x: Inputs) -> Saved:
    rows, count, width = x.negatives.shape
    moments, powers, keep = int(x.kind == "moments"), 3 if x.hardness else 1, x.keep
    query, negatives, row_scale = x.query.contiguous(), _rows_contiguous(x.negatives), x.row_scale.contiguous()
    sums = powers + moments if keep else 0
    aligned = negatives.stride(1) % 16 == 0 and negatives.stride(0) % 16 == 0
    height, tiles, pieces, span, warps = forward_tile(width, negatives.element_size(), aligned, sums)
    splits = max(1, min(triton.cdiv(PROGRAMS // warps, max(rows, 1)), triton.cdiv(count, 2 * tiles * height)))
    parts = row_scale.new_empty(rows, splits, 6)
    pulls = row_scale.new_empty(rows if keep else 0, splits, powers + moments, width)
    stats = row_scale.new_empty(1 + 2 * moments + powers, rows)
    merged = row_scale.new_empty(powers + moments if keep else 0, rows, width)
    logits, inverse = (row_scale.new_empty(rows if keep > 1 else 0, count) for _ in range(2))
    if rows == 0:
        return Saved(stats, merged, logits, inverse)
    with on_device(query):
        each_fwd_kernel[(rows * splits,)](
            query, negatives, row_scale, None if x.ceiling is None else x.ceiling.contiguous(), parts, pulls,
            logits if keep > 1 else None, inverse if keep > 1 else None, count, width, negatives.stride(0),
            negatives.stride(1), splits, x.hardness, x.normalize, moments, powers, keep > 0, needs_int64(negatives),
            height, tiles, pieces, span, width == pieces * span, AHEAD, num_warps=warps, **FORWARD,
        )  # fmt: skip
        each_merge_kernel[(rows, triton.cdiv(width, MERGED) if keep else 1)](
            parts, pulls, stats, merged, rows, width, splits, x.hardness, moments, powers, keep > 0,
            triton.next_power_of_2(splits), PARTS, MERGED, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return Saved(stats, merged, logits, inverse)


def softmax_stats_per_query_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    rows, count, width = x.negatives.shape
    moments, powers = int(x.kind == "moments"), 3 if x.hardness else 1
    grad, query, row_scale = grad.contiguous(), x.query.contiguous(), x.row_scale.contiguous()
    negatives = _rows_contiguous(x.negatives)
    height, wide = _tile(negatives)
    to_query, to_scale = torch.empty_like(query), torch.empty_like(row_scale)
    to_negatives = negatives.new_empty(rows if needs.negatives else 0, count, width)
    if rows and (needs.query or needs.row_scale):
        with on_device(query):
            _each_query_kernel[(rows,)](
                grad, saved.pulls, query, row_scale, to_query, to_scale, rows, width, x.hardness, moments, powers, wide,
                **OPTIONS,
            )  # fmt: skip
    if to_negatives.numel():
        tiles = triton.cdiv(count, height)
        with on_device(query):
            _each_negatives_kernel[(rows * tiles,)](
                grad, saved.stats, query, negatives, row_scale, saved.logits, saved.inverse, to_negatives, rows, count,
                width, negatives.stride(0), negatives.stride(1), tiles, x.hardness, x.normalize, moments, powers,
                needs_int64(negatives, to_negatives), height, wide, **OPTIONS,
            )  # fmt: skip
    return Grads(to_query[: rows * needs.query], to_negatives, to_scale[: rows * needs.row_scale])


def aot_cases() -> Iterator[AotCase]:
    """Every dtype, with all statistics and with the least, widths from odd to the widest, offsets past 32 bits."""
    sizes = {
        "": (64, 1024, 512), "768": (8, 1024, 768), "odd": (5, 33, 65), "wide": (3, 16, 8192), "int64": (3, 2**22, 768)
    }  # fmt: skip
    for dtype, (size, (rows, count, width)), (kind, hardness) in itertools.product(
        HALF_AND_SINGLE, sizes.items(), (("", 0.0), ("moments", 0.5))
    ):
        if kind and size not in ("", "odd"):
            continue
        query = torch.empty(rows, width, dtype=dtype, device="meta")
        negatives = torch.empty(rows, count, width, dtype=dtype, device="meta")
        scale = torch.empty(rows, device="meta")
        label = f"{kind} {str(dtype).removeprefix('torch.')} {size}".strip()
        ceiling = scale if kind else None
        streams = not kind and size != "odd"
        for keep in (0, 2) if not kind else (2,):
            x = Inputs(query, negatives, scale, ceiling, True, kind, hardness, keep)
            vector = ("each_fwd_kernel",) if streams and not keep else ()
            yield AotCase(f"forward {keep} {label}", softmax_stats_per_query_fwd, (x,), vector)
        sums = (3 if hardness else 1) + (kind == "moments")
        shapes = ((6, rows), (sums, rows, width), (rows, count), (rows, count))
        saved = Saved(*[scale.new_empty(shape) for shape in shapes])
        for normalize in (True, False) if size == "" and not kind else (True,):
            x = Inputs(query, negatives, scale, ceiling, normalize, kind, hardness, 2)
            bwd = (saved.stats, x, saved, Needs(True, True, True))
            yield AotCase(
                f"backward {normalize} {label}", softmax_stats_per_query_bwd, bwd,
                ("_each_negatives_kernel",) if streams else (),
            )  # fmt: skip
