"""Triton kernel of the scales of rows and columns of logits, from the norms of the embeddings, and of positives."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import STREAM_OPTIONS
from .arguments import Sizes, sizes_in

PREPARE_ROWS, PREPARE_DIM = 8, 256  # embeddings of a program, numbers of each at a time


class Prepared(NamedTuple):
    """What is known of each row and column before any logit."""

    row_scale: Tensor  # [M]: scale fixed_scale c(query), c(x) = 1 / |x| (0 for zero vectors), not normalised 1
    column_scale: Tensor | None  # [N]: c(key); None: not normalised
    positive: Tensor | None  # [M]: the positives' logits
    negative_scale: Tensor | None = None  # [K]: c(negative), where negatives are given


@triton.jit
def inverse_norm(square):
    """1 / |x|, 0 for zero vectors, NaN where the square is beyond float32."""
    norm = tl.where(square == float("inf"), float("nan"), tl.sqrt_rn(square))
    small = norm <= 1e-12  # TINY_NORM; False for NaN
    return tl.where(small, 0.0, tl.div_rn(1.0, tl.where(small, 1.0, norm)))


@triton.jit
def _prepare_rows(
    query_ptr, key_ptr, scale_ptr, targets_ptr, out, program, sizes, fixed_scale, ROWS: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """What stands in Prepared of the queries and keys of a program."""
    index = program * ROWS + tl.arange(0, ROWS)
    row, column = index < sizes.rows, index < sizes.columns
    target, has_target = index, column
    if targets_ptr is not None:
        target, has_target = tl.load(targets_ptr + index, mask=row, other=0), row
    zero = tl.zeros((ROWS,), tl.float32)
    dot, queries, targets, keys = zero, zero, zero, zero
    for start in range(0, sizes.dim, DIM):
        inner = start + tl.arange(0, DIM)
        inside = (inner < sizes.dim)[None, :]
        offset = index.to(tl.int64)[:, None] * sizes.dim + inner[None, :]
        q = tl.load(query_ptr + offset, mask=row[:, None] & inside, other=0.0).to(tl.float32)
        target_offset = target.to(tl.int64)[:, None] * sizes.dim + inner[None, :]
        t = tl.load(key_ptr + target_offset, mask=has_target[:, None] & inside, other=0.0).to(tl.float32)
        dot += tl.sum(q * t, 1)
        queries += tl.sum(q * q, 1)
        targets += tl.sum(t * t, 1)
        if targets_ptr is not None and out.column_scale is not None:
            k = tl.load(key_ptr + offset, mask=column[:, None] & inside, other=0.0).to(tl.float32)
            keys += tl.sum(k * k, 1)
    scale = zero + fixed_scale
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr)
    if out.column_scale is not None:
        scale *= inverse_norm(queries)
        dot *= inverse_norm(targets)
        tl.store(out.column_scale + index, inverse_norm(targets if targets_ptr is None else keys), column)
    tl.store(out.row_scale + index, scale, row)
    if out.positive is not None:
        tl.store(out.positive + index, scale * dot, row)


@triton.jit
def _prepare_negatives(negatives_ptr, out, program, count, dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    """The inverse norms of a program's negatives."""
    index = program * ROWS + tl.arange(0, ROWS)
    there = index < count
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, dim, DIM):
        inner = start + tl.arange(0, DIM)
        offset = index.to(tl.int64)[:, None] * dim + inner[None, :]
        x = tl.load(negatives_ptr + offset, mask=there[:, None] & (inner < dim)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(x * x, 1)
    tl.store(out.negative_scale + index, inverse_norm(squares), there)


@triton.jit(do_not_specialize=["count"])
def _prepare_kernel(
    query_ptr,  # (M, D)
    key_ptr,  # (N, D)
    negatives_ptr,  # (K, D) or None: their norms too
    scale_ptr,  # (1,) or None
    targets_ptr,  # (M,) or None: the diagonal
    out,  # Prepared
    sizes,  # Sizes
    count,  # K
    fixed_scale,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    sizes, program = sizes_in(sizes), tl.program_id(0)
    if negatives_ptr is None:
        _prepare_rows(query_ptr, key_ptr, scale_ptr, targets_ptr, out, program, sizes, fixed_scale, ROWS, DIM)
    else:
        first = tl.cdiv(tl.maximum(sizes.rows, sizes.columns), ROWS)  # program of the negatives
        if program < first:
            _prepare_rows(query_ptr, key_ptr, scale_ptr, targets_ptr, out, program, sizes, fixed_scale, ROWS, DIM)
        else:
            _prepare_negatives(negatives_ptr, out, program - first, count, sizes.dim, ROWS, DIM)


def prepare(
    query: Tensor, key: Tensor, scale: Tensor | None, fixed_scale: float, targets: Tensor | None, out: Prepared,
    negatives: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill `out`; `negatives` are given where `out` has a place for their norms."""
    m, n, count = query.shape[0], key.shape[0], 0 if negatives is None else negatives.shape[0]
    _prepare_kernel[(triton.cdiv(max(m, n), PREPARE_ROWS) + triton.cdiv(count, PREPARE_ROWS),)](
        query, key, negatives, scale, targets, out, Sizes(m, n, query.shape[1]).odd(), count, fixed_scale, PREPARE_ROWS,
        PREPARE_DIM, **STREAM_OPTIONS,
    )  # fmt: skip
