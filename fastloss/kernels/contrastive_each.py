"""Triton kernels for per-sample negatives [M, K, D]: statistics of their logits, and their gradient.

A program reads TILE negatives of one row at a time, whole ones, and keeps running sums; `splits` programs share a row.

    s_k = r c_k <q, n_k>                         c_k = 1 / |n_k| (0 for zero vectors), or 1 without NORMALIZE
    part of the logits      max s, and for each power e of (1; 1 + beta, beta):  sum exp(e (s_k - max))
    part of the vectors     sum exp(e (s_k - max)) c_k n_k, the moments' sum c_k n_k  (KEEP)
    merged, in order        log-sum-exps, max, sum and count;  the vectors over their total
    backward                d n_k = G_k c_k (r q - s_k c_k n_k),  G_k = sum_e g_e e exp(e s_k - lse_e) + g_sum

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

from .common import REDUCE_PROGRAMS, AotCase, needs_int64, on_device

TILE = 16384  # bytes of negatives in a program at a time
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
MERGED = 128  # columns of the vectors that a merging program adds up
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _more(total, vectors, power, scores, before, most, weighted, KEEP: tl.constexpr):
    """One power's running sums with the scores of another tile."""
    factor = tl.exp(power * (before - most))
    share = tl.where(scores == float("-inf"), 0.0, tl.exp(power * (scores - most)))
    total = total * factor + tl.sum(share)
    if KEEP:
        vectors = vectors * factor + tl.sum(share[:, None] * weighted, 0)
    return total, vectors


@triton.jit
def _scores(tile, query, scale, ceiling_ptr, there, NORMALIZE: tl.constexpr):
    """A tile's logits, -inf where they are left out; which are in; the inverse lengths."""
    product = tl.sum(tile * query, 1)
    inverse = tl.full((tile.shape[0],), 1.0, tl.float32)
    if NORMALIZE:
        square = tl.sum(tile * tile, 1)
        inverse = tl.where(square <= 1e-24, 0.0, 1.0 / tl.sqrt_rn(square))
    scores = scale * (inverse * product)
    if ceiling_ptr is not None:
        there = there & ((scores > tl.load(ceiling_ptr)) == 0)  # NaN stays in
    return tl.where(there, scores, float("-inf")), there, inverse


@triton.jit
def _each_fwd_kernel(
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
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    split = (program % splits).to(tl.int32)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    query = tl.load(query_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row)
    negatives_ptr += row * s_row
    most = -3.4e38
    number = 0.0
    logit_sum = 0.0
    total = 0.0
    harder = 0.0
    easier = 0.0
    vectors = tl.zeros((WIDTH,), tl.float32)
    hard_vectors = tl.zeros((WIDTH,), tl.float32)
    easy_vectors = tl.zeros((WIDTH,), tl.float32)
    plain_vectors = tl.zeros((WIDTH,), tl.float32)
    for start in range(split * ROWS, count, splits * ROWS):
        rows = start + tl.arange(0, ROWS)
        offsets = rows.to(tl.int64) * s_count if WIDE else rows * s_count
        mask = (rows < count)[:, None] & inside
        tile = tl.load(negatives_ptr + offsets[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
        ceiling = None if ceiling_ptr is None else ceiling_ptr + row
        scores, allowed, inverse = _scores(tile, query, scale, ceiling, rows < count, NORMALIZE)
        if logits_ptr is not None:
            entry = row * count + rows
            tl.store(logits_ptr + entry, scores, mask=rows < count)
            tl.store(inverse_ptr + entry, inverse, mask=rows < count)
        before = most
        most = tl.maximum(most, tl.max(scores))
        if MOMENTS:
            number += tl.sum(tl.where(allowed, 1.0, 0.0))
            logit_sum += tl.sum(tl.where(allowed, scores, 0.0))
        weighted = tile * inverse[:, None]
        total, vectors = _more(total, vectors, 1.0, scores, before, most, weighted, KEEP)
        if POWERS == 3:
            harder, hard_vectors = _more(harder, hard_vectors, 1.0 + hardness, scores, before, most, weighted, KEEP)
            easier, easy_vectors = _more(easier, easy_vectors, hardness, scores, before, most, weighted, KEEP)
        if MOMENTS and KEEP:
            plain_vectors += tl.sum(tl.where(allowed[:, None], weighted, 0.0), 0)
    parts_ptr += program * 6
    tl.store(parts_ptr, most)
    tl.store(parts_ptr + 1, logit_sum)
    tl.store(parts_ptr + 2, number)
    tl.store(parts_ptr + 3, total)
    if POWERS == 3:
        tl.store(parts_ptr + 4, harder)
        tl.store(parts_ptr + 5, easier)
    if KEEP:
        to = pulls_ptr + program * (POWERS + MOMENTS) * width + columns
        tl.store(to, vectors, mask=inside)
        if POWERS == 3:
            tl.store(to + width, hard_vectors, mask=inside)
            tl.store(to + 2 * width, easy_vectors, mask=inside)
        if MOMENTS:
            tl.store(to + POWERS * width, plain_vectors, mask=inside)


@triton.jit
def _each_merge_kernel(
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
            total = tl.sum(tl.exp(power * (tops - most)) * totals)
            if tl.program_id(1) == 0:
                lse = tl.where(most == float("inf"), most, power * most + tl.log(total))
                place = 0 if a == 0 else 1 + 2 * MOMENTS + a
                tl.store(stats_ptr + place * rows + row, lse)
        if KEEP:
            vectors = tl.zeros((BLOCK,), tl.float32)
            for p in range(splits):
                factor = 1.0
                if a < POWERS:
                    factor = tl.exp(power * (tl.load(parts_ptr + p * 6) - most))
                at = pulls_ptr + (p * (POWERS + MOMENTS) + a) * width + columns
                vectors += factor * tl.load(at, mask=inside, other=0.0)
            vectors = tl.where(total == 0.0, 0.0, vectors / total)
            tl.store(merged_ptr + (a * rows + row) * width + columns, vectors, mask=inside)


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
        power = 1.0 + hardness if (a == 1 and a < POWERS) else hardness if (a == 2 and a < POWERS) else 1.0
        slope = tl.load(grad_ptr + place * rows + row) * power
        vectors += slope * tl.load(pulls_ptr + a * rows * width + at, mask=inside, other=0.0)
    query = tl.load(query_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale_grad_ptr + row, tl.sum(query * vectors))
    grad = tl.load(scale_ptr + row) * vectors
    tl.store(query_grad_ptr + at, grad.to(query_grad_ptr.dtype.element_ty), mask=inside)


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
    scores = tl.load(logits_ptr + row * count + k, mask=there, other=float("-inf"))
    inverse = tl.load(inverse_ptr + row * count + k, mask=there, other=0.0)
    out = scores == float("-inf")
    scores = tl.where(out, 0.0, scores)
    slope = tl.zeros((ROWS,), tl.float32)
    if MOMENTS:
        slope += tl.load(grad_ptr + 2 * rows + row)
    for a in tl.static_range(POWERS):
        place = 0 if a == 0 else 1 + 2 * MOMENTS + a
        power = 1.0 if a == 0 else 1.0 + hardness if a == 1 else hardness
        mass = tl.load(grad_ptr + place * rows + row) * power
        slope += mass * tl.exp(power * scores - tl.load(stats_ptr + place * rows + row))
    slope = tl.where(out, 0.0, slope * inverse)
    query = tl.load(query_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    grad = (slope * tl.load(scale_ptr + row))[:, None] * query
    if NORMALIZE:
        offsets = k.to(tl.int64) * s_count if WIDE else k * s_count
        at = negatives_ptr + row * s_row + offsets[:, None] + columns
        tile = tl.load(at, mask=mask, other=0.0).to(tl.float32)
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


def _rows_contiguous(negatives: Tensor) -> Tensor:
    return negatives if negatives.stride(2) == 1 or negatives.shape[2] == 1 else negatives.contiguous()


def contrastive_each_fwd(
    query: Tensor,
    negatives: Tensor,
    row_scale: Tensor,
    ceiling: Tensor | None,
    normalize: bool,
    kind: str,
    hardness: float,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, count, width = negatives.shape
    moments, powers = int(kind == "moments"), 3 if hardness else 1
    query, negatives, row_scale = query.contiguous(), _rows_contiguous(negatives), row_scale.contiguous()
    height, wide = _tile(negatives)
    splits = max(1, min(triton.cdiv(REDUCE_PROGRAMS, max(rows, 1)), triton.cdiv(count, 4 * height)))
    parts = row_scale.new_empty(rows, splits, 6)
    pulls = row_scale.new_empty(rows if keep else 0, splits, powers + moments, width)
    stats = row_scale.new_empty(1 + 2 * moments + powers, rows)
    merged = row_scale.new_empty(powers + moments if keep else 0, rows, width)
    logits, inverse = (row_scale.new_empty(rows if keep > 1 else 0, count) for _ in range(2))
    if rows == 0:
        return stats, merged, logits, inverse
    with on_device(query):
        _each_fwd_kernel[(rows * splits,)](
            query, negatives, row_scale, None if ceiling is None else ceiling.contiguous(), parts, pulls,
            logits if keep > 1 else None, inverse if keep > 1 else None, count, width, negatives.stride(0),
            negatives.stride(1), splits, hardness, normalize, moments, powers, keep > 0, needs_int64(negatives),
            height, wide, **OPTIONS,
        )  # fmt: skip
        _each_merge_kernel[(rows, triton.cdiv(width, MERGED) if keep else 1)](
            parts, pulls, stats, merged, rows, width, splits, hardness, moments, powers, keep > 0,
            triton.next_power_of_2(splits), MERGED, num_warps=4,
        )  # fmt: skip
    return stats, merged, logits, inverse


def contrastive_each_bwd(
    grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    row_scale: Tensor,
    ceiling: Tensor | None,
    normalize: bool,
    kind: str,
    hardness: float,
    keep: int,
    stats: Tensor,
    pulls: Tensor,
    logits: Tensor,
    inverse: Tensor,
    needs_query: bool,
    needs_negatives: bool,
    needs_row_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, count, width = negatives.shape
    moments, powers = int(kind == "moments"), 3 if hardness else 1
    grad, query, row_scale = grad.contiguous(), query.contiguous(), row_scale.contiguous()
    negatives = _rows_contiguous(negatives)
    height, wide = _tile(negatives)
    to_query, to_scale = torch.empty_like(query), torch.empty_like(row_scale)
    to_negatives = negatives.new_empty(rows if needs_negatives else 0, count, width)
    if rows and (needs_query or needs_row_scale):
        with on_device(query):
            _each_query_kernel[(rows,)](
                grad, pulls, query, row_scale, to_query, to_scale, rows, width, hardness, moments, powers, wide,
                **OPTIONS,
            )  # fmt: skip
    if to_negatives.numel():
        tiles = triton.cdiv(count, height)
        with on_device(query):
            _each_negatives_kernel[(rows * tiles,)](
                grad, stats, query, negatives, row_scale, logits, inverse, to_negatives, rows, count, width,
                negatives.stride(0), negatives.stride(1), tiles, hardness, normalize, moments, powers,
                needs_int64(negatives, to_negatives), height, wide, **OPTIONS,
            )  # fmt: skip
    return to_query[: rows * needs_query], to_negatives, to_scale[: rows * needs_row_scale]


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
            args = (query, negatives, scale, ceiling, True, kind, hardness, keep)
            vector = ("_each_fwd_kernel",) if streams and not keep else ()
            yield AotCase(f"forward {keep} {label}", contrastive_each_fwd, args, vector)
        sums = (3 if hardness else 1) + (kind == "moments")
        kept = [scale.new_empty(shape) for shape in ((6, rows), (sums, rows, width), (rows, count), (rows, count))]
        for normalize in (True, False) if size == "" and not kind else (True,):
            bwd = (kept[0], query, negatives, scale, ceiling, normalize, kind, hardness, 2, *kept, True, True, True)
            yield AotCase(
                f"backward {normalize} {label}", contrastive_each_bwd, bwd,
                ("_each_negatives_kernel",) if streams else (),
            )  # fmt: skip
