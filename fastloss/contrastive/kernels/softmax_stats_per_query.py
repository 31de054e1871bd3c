"""Triton kernels of negatives [M, K, D] of each query's own: statistics of their logits, and their gradient.

A program reads a tile of negatives of one row at a time, whole ones, and keeps running sums; `splits` programs share a
row. The forward's kernels are those of per_query_forward.py.

    s_k = r c_k <q, n_k>                         c_k = 1 / |n_k| (0 for zero vectors), or 1 without `normalize`
    sums of a program       max s, and for each power e of (1; 1 + beta, beta):  sum exp(e (s_k - max))
    its vectors             sum exp(e (s_k - max)) c_k n_k, with moments sum c_k n_k    (if weighted keys are made)
    merged, in order        log-sum-exps (with hardness below max), max, sum, number;  the vectors over those sums
    backward                d n_k = G_k c_k (r q - s_k c_k n_k),  G_k = sum_e g_e e exp(e d_k - lse_e) + g_sum
                            d_k = s_k for e = 1, else s_k - max

Bytes per element of size s: forward s, and the queries' gradient needs no more; the negatives' gradient 2 s, or s where
nothing is normalised, since it then needs no negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import AotCase, on_device, warp_size
from ...core.kernels.memory_order import needs_int64
from ..ops.softmax_stats_per_query import Grads, Inputs, Needs, Saved
from .per_query_forward import (
    PARTIALS,
    Partials,
    PerQueryForm,
    PerQueryInputs,
    PerQueryTile,
    SavedLogits,
    below_one,
    per_query_fwd_kernel,
    per_query_sizes,
)
from .per_query_merge import per_query_merge_kernel

TILE_BYTES = 16384  # bytes of negatives that a program of the backward has at a time
# The forward's programs: sixteen warps are resident on a multiprocessor, and 2048 fill 132 of those just once.
FORWARD = {"enable_fp_fusion": True}
PROGRAMS = 2048  # of a warp
HELD = 32  # elements of the negatives in a thread at a time where one weighted sum of them is made; half where more are
MAX_ROWS, MAX_TILES = 64, 4
MAX_PIECES = 8  # in which a row of a tile lies, as each is code of its own
AHEAD = True  # whether tiles are read while those before are worked on
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
PARTS, MERGED = 16, 128  # splits, and columns of their vectors, that a merging program reads at a time
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


class NegativesGradInputs(NamedTuple):
    """What the gradient of the negatives is made from."""

    stats_grad: Tensor  # [statistics, M] float32
    stats: Tensor  # [statistics, M] float32
    query: Tensor  # [M, D]
    negatives: Tensor  # [M, K, D], strides `row_stride`, `negative_stride`, 1
    row_scale: Tensor  # [M] float32
    logits: Tensor  # [M, K] float32
    inverse_norms: Tensor  # [M, K] float32


class NegativesTile(NamedTuple):
    """Whole negatives that a program of the backward has at a time."""

    rows: int
    dim: int  # a power of two, at least D
    int64: bool  # for their offsets in memory


@triton.jit(do_not_specialize=["rows"])
def _per_query_grad_kernel(
    stats_grad_ptr,  # (statistics, rows) float32
    weighted_keys_ptr,  # (POWERS + MOMENTS, rows, D) float32
    query_ptr,  # (rows, D)
    scale_ptr,  # (rows,) float32
    query_grad_ptr,  # (rows, D)
    scale_grad_ptr,  # (rows,) float32
    rows,
    dim,
    hardness,
    FORM: tl.constexpr,  # PerQueryForm
    DIM: tl.constexpr,
):
    MOMENTS: tl.constexpr = FORM.moments
    POWERS: tl.constexpr = FORM.powers
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, DIM)
    inside = columns < dim
    offset = row * dim + columns
    vectors = tl.zeros((DIM,), tl.float32)
    for a in tl.static_range(POWERS + MOMENTS):
        line = 0 if a == 0 else 2 if a == POWERS else 1 + 2 * MOMENTS + a
        grad = tl.load(stats_grad_ptr + line * rows + row)
        there = inside & (tl.zeros((DIM,), tl.float32) + grad != 0.0)  # a row that is left out may be NaN
        part = grad * tl.load(weighted_keys_ptr + a * rows * dim + offset, mask=there, other=0.0)
        vectors += part
        if POWERS == 3:
            if a == 1:
                part_1p_beta = part
            if a == 2:  # the two cancel before they are times the hardness
                vectors += hardness * (part_1p_beta + part) - part
    query = tl.load(query_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale_grad_ptr + row, tl.sum(query * vectors))
    query_grad = tl.load(scale_ptr + row) * vectors
    tl.store(query_grad_ptr + offset, query_grad.to(query_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _power_grad(grad_ptr, stats_ptr, d):
    return tl.load(grad_ptr) * below_one(d - tl.load(stats_ptr))


@triton.jit
def _negatives_grad_kernel(
    inputs,  # NegativesGradInputs
    negatives_grad_ptr,  # (rows, negatives, D)
    sizes,  # PerQuerySizes; a row's splits are its tiles
    hardness,
    FORM: tl.constexpr,  # PerQueryForm
    TILE: tl.constexpr,  # NegativesTile
):
    NORMALIZE: tl.constexpr = FORM.normalize
    MOMENTS: tl.constexpr = FORM.moments
    POWERS: tl.constexpr = FORM.powers
    ROWS: tl.constexpr = TILE.rows
    DIM: tl.constexpr = TILE.dim
    INT64: tl.constexpr = TILE.int64
    grad_ptr, rows, dim = inputs.stats_grad, number_in(sizes.rows), sizes.dim
    splits = number_in(sizes.splits)
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    k = (program % splits).to(tl.int32) * ROWS + tl.arange(0, ROWS)
    there = k < sizes.negatives
    columns = tl.arange(0, DIM)
    inside = columns < dim
    mask = there[:, None] & inside
    zero = tl.zeros((ROWS,), tl.float32)
    used = zero + tl.load(grad_ptr + row) != 0.0
    if MOMENTS:
        used |= zero + tl.load(grad_ptr + 2 * rows + row) != 0.0
    for a in tl.static_range(1, POWERS):
        used |= zero + tl.load(grad_ptr + (1 + 2 * MOMENTS + a) * rows + row) != 0.0
    counts = there & used  # a row that is left out may be NaN
    scores = tl.load(inputs.logits + row * sizes.negatives + k, mask=counts, other=float("-inf"))
    inverse_norm = tl.load(inputs.inverse_norms + row * sizes.negatives + k, mask=counts, other=0.0)
    left_out = scores == float("-inf")
    scores = tl.where(left_out, 0.0, scores)
    grad_logits = tl.zeros((ROWS,), tl.float32)
    if MOMENTS:
        grad_logits += tl.load(grad_ptr + 2 * rows + row)
    grad_logits += tl.load(grad_ptr + row) * below_one(scores - tl.load(inputs.stats + row))
    if POWERS == 3:
        d = scores - tl.load(inputs.stats + rows + row)
        line: tl.constexpr = 2 + 2 * MOMENTS
        of_1p = _power_grad(grad_ptr + line * rows + row, inputs.stats + line * rows + row, (1.0 + hardness) * d)
        next_line: tl.constexpr = 3 + 2 * MOMENTS
        of_beta = _power_grad(grad_ptr + next_line * rows + row, inputs.stats + next_line * rows + row, hardness * d)
        grad_logits += of_1p + hardness * (of_1p + of_beta)
    grad_logits = tl.where(left_out, 0.0, grad_logits * inverse_norm)
    query = tl.load(inputs.query + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    grad = (grad_logits * tl.load(inputs.row_scale + row))[:, None] * query
    if NORMALIZE:
        offsets = k.to(tl.int64) * sizes.negative_stride if INT64 else k * sizes.negative_stride
        ptr = inputs.negatives + row * sizes.row_stride + offsets[:, None] + columns
        read = mask & (used & (left_out == 0))[:, None]  # what is outside the op's mask may be NaN
        tile = tl.load(ptr, mask=read, other=0.0).to(tl.float32)
        grad -= (grad_logits * scores * inverse_norm)[:, None] * tile
    offsets = k.to(tl.int64) * dim if INT64 else k * dim
    to = negatives_grad_ptr + row * sizes.negatives * dim + offsets[:, None] + columns
    tl.store(to, grad.to(negatives_grad_ptr.dtype.element_ty), mask=mask)


def _backward_tile(negatives: Tensor) -> tuple[int, int]:
    """(negatives in a tile, numbers of each). Odd D load single elements, and so hold more addresses in registers."""
    dim = negatives.shape[2]
    padded_dim = triton.next_power_of_2(dim)
    elements = TILE_BYTES // 4 if dim % 8 else TILE_BYTES // negatives.element_size()
    return max(1, min(32, elements // padded_dim)), padded_dim


def forward_tile(dim: int, size: int, aligned: bool, sums: int) -> tuple[int, int, int, int, int]:
    """(rows, tiles, pieces, columns of a piece, warps) of a step of the forward: where it can be, a program is one warp
    with whole negatives, which waits for no other.

    `size`: bytes of an element; `aligned`: the negatives can be read in 128 bits; `sums`: weighted sums of negatives.
    """
    held = HELD if sums < 2 else HELD // 2
    warp, vector = warp_size(), 16 // size if aligned else 1
    warps = 1 if dim <= warp * held and aligned else 4 if dim <= 4 * warp * held else 8
    lanes, span = warp * warps, min(triton.next_power_of_2(dim), warp * vector)
    while triton.cdiv(dim, span) > MAX_PIECES or (triton.cdiv(dim, span) * span > warp * held and span < lanes * held):
        span *= 2
    pieces = triton.cdiv(dim, span)
    rows = max(1, min(MAX_ROWS, lanes * vector // span))
    elements = triton.next_power_of_2(max(1, rows * pieces * span // lanes))  # of a tile in a thread
    return rows, max(1, min(MAX_TILES, held // elements)), pieces, span, warps


def _rows_contiguous(negatives: Tensor) -> Tensor:
    return negatives if negatives.stride(2) == 1 or negatives.shape[2] == 1 else negatives.contiguous()


def _form(x: Inputs) -> PerQueryForm:
    return PerQueryForm(x.normalize, int(x.moments), 3 if x.hardness else 1, x.save != "")


def softmax_stats_per_query_fwd(x: Inputs) -> Saved:
    rows, count, dim = x.negatives.shape
    form, new_float32 = _form(x), x.row_scale.new_empty
    query, negatives, row_scale = x.query.contiguous(), _rows_contiguous(x.negatives), x.row_scale.contiguous()
    all_sums = form.powers + form.moments
    aligned = negatives.stride(1) % 16 == 0 and negatives.stride(0) % 16 == 0
    tile_rows, tiles, pieces, span, warps = forward_tile(
        dim, negatives.element_size(), aligned, all_sums if form.weighted_keys else 0
    )
    splits = max(1, min(triton.cdiv(PROGRAMS // warps, max(rows, 1)), triton.cdiv(count, 2 * tiles * tile_rows)))
    partials = Partials(
        sums=new_float32(rows, splits, PARTIALS.value),
        weighted_keys=new_float32(rows if form.weighted_keys else 0, splits, all_sums, dim),
    )
    stats = new_float32(1 + 2 * form.moments + form.powers, rows)
    weighted_keys = new_float32(all_sums if form.weighted_keys else 0, rows, dim)
    saved_rows = rows if x.save == "logits" else 0
    logits, inverse_norms = (new_float32(saved_rows, count) for _ in range(2))
    if rows == 0:
        return Saved(stats, weighted_keys, logits, inverse_norms)
    tile = PerQueryTile(tile_rows, tiles, pieces, span, dim == pieces * span, AHEAD, needs_int64(negatives))
    sizes = per_query_sizes(negatives, splits)
    mask, logit_limit = (None if t is None else t.contiguous() for t in (x.mask, x.logit_limit))
    inputs = PerQueryInputs(query, negatives, mask, row_scale, logit_limit)
    saved = SavedLogits(logits, inverse_norms) if saved_rows else SavedLogits(None, None)
    with on_device(query):
        per_query_fwd_kernel[(rows * splits,)](
            inputs, partials, saved, sizes, x.hardness, form, tile, num_warps=warps, **FORWARD
        )
        per_query_merge_kernel[(rows, triton.cdiv(dim, MERGED) if form.weighted_keys else 1)](
            partials, stats, weighted_keys, sizes, x.hardness, form, triton.next_power_of_2(splits), PARTS, MERGED,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return Saved(stats, weighted_keys, logits, inverse_norms)


def softmax_stats_per_query_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    rows, count, dim = x.negatives.shape
    form = _form(x)
    grad, query, row_scale = grad.contiguous(), x.query.contiguous(), x.row_scale.contiguous()
    negatives = _rows_contiguous(x.negatives)
    tile_rows, padded_dim = _backward_tile(negatives)
    query_grad, scale_grad = torch.empty_like(query), torch.empty_like(row_scale)
    negatives_grad = negatives.new_empty(rows if needs.negatives else 0, count, dim)
    if rows and (needs.query or needs.row_scale):
        with on_device(query):
            _per_query_grad_kernel[(rows,)](
                grad, saved.weighted_keys, query, row_scale, query_grad, scale_grad, rows, dim, x.hardness, form,
                padded_dim, **OPTIONS,
            )  # fmt: skip
    if negatives_grad.numel():
        tiles = triton.cdiv(count, tile_rows)
        inputs = NegativesGradInputs(grad, saved.stats, query, negatives, row_scale, saved.logits, saved.inverse_norms)
        sizes = per_query_sizes(negatives, tiles)
        tile = NegativesTile(tile_rows, padded_dim, needs_int64(negatives, negatives_grad))
        with on_device(query):
            _negatives_grad_kernel[(rows * tiles,)](inputs, negatives_grad, sizes, x.hardness, form, tile, **OPTIONS)
    return Grads(query_grad[: rows * needs.query], negatives_grad, scale_grad[: rows * needs.row_scale])


def aot_cases() -> Iterator[AotCase]:
    """Every dtype, with all statistics and with the least, D from odd to the largest, offsets past 32 bits."""
    sizes = {
        "": (64, 1024, 512), "768": (8, 1024, 768), "odd": (5, 33, 65), "wide": (3, 16, 8192), "int64": (3, 2**22, 768)
    }  # fmt: skip
    for dtype, (size, (rows, count, dim)), (moments, hardness) in itertools.product(
        HALF_AND_SINGLE, sizes.items(), ((False, 0.0), (True, 0.5))
    ):
        if moments and size not in ("", "odd"):
            continue
        query = torch.empty(rows, dim, dtype=dtype, device="meta")
        negatives = torch.empty(rows, count, dim, dtype=dtype, device="meta")
        scale = torch.empty(rows, device="meta")
        label = f"{'moments ' * moments}{str(dtype).removeprefix('torch.')} {size}".strip()
        logit_limit = scale if moments else None
        streams = not moments and size != "odd"
        for save in ("", "logits") if not moments else ("logits",):
            x = Inputs(query, negatives, None, scale, logit_limit, True, moments, hardness, save)
            vector = ("per_query_fwd_kernel",) if streams and not save else ()
            yield AotCase(f"forward {save} {label}", softmax_stats_per_query_fwd, (x,), vector)
            if size in ("", "odd"):
                x = x._replace(mask=torch.empty(rows, count, dtype=torch.bool, device="meta"))
                yield AotCase(f"forward mask {save} {label}", softmax_stats_per_query_fwd, (x,), vector)
        sums = (3 if hardness else 1) + moments
        shapes = ((6, rows), (sums, rows, dim), (rows, count), (rows, count))
        saved = Saved(*[scale.new_empty(shape) for shape in shapes])
        for normalize in (True, False) if size == "" and not moments else (True,):
            x = Inputs(query, negatives, None, scale, logit_limit, normalize, moments, hardness, "logits")
            bwd = (saved.stats, x, saved, Needs(True, True, True))
            yield AotCase(
                f"backward {normalize} {label}", softmax_stats_per_query_bwd, bwd,
                ("_negatives_grad_kernel",) if streams else (),
            )  # fmt: skip
