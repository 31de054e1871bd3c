"""Triton kernel of the scales of rows and columns of logits, from the lengths of the embeddings, and of positives."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import STREAM_OPTIONS

PREPARE_BLOCK = (8, 256)


@triton.jit
def _inverse_length(square):
    """1 / |x|, 0 for zero vectors, NaN where the square is beyond float32."""
    length = tl.where(square == float("inf"), float("nan"), tl.sqrt_rn(square))
    small = length <= 1e-12  # TINY_NORM; False for NaN
    return tl.where(small, 0.0, tl.div_rn(1.0, tl.where(small, 1.0, length)))


@triton.jit
def _contrastive_prepare_kernel(
    query_ptr,  # (M, D)
    key_ptr,  # (N, D)
    scale_ptr,  # (1,) or None
    targets_ptr,  # (M,) or None: the diagonal
    row_ptr,  # (M,): scale factor c(query), c(x) = 1 / |x| (0 for zero vectors), not normalised 1
    column_ptr,  # (N,): c(key), or None: not normalised
    positive_ptr,  # (M,) or None
    sizes,  # M, N, D
    factor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, column = index < sizes[0], index < sizes[1]
    target, there = index, column
    if targets_ptr is not None:
        target, there = tl.load(targets_ptr + index, mask=row, other=0), row
    zero = tl.zeros((ROWS,), tl.float32)
    dot, queries, targets, keys = zero, zero, zero, zero
    for start in range(0, sizes[2], WIDTH):
        inner = start + tl.arange(0, WIDTH)
        inside = (inner < sizes[2])[None, :]
        at = index.to(tl.int64)[:, None] * sizes[2] + inner[None, :]
        q = tl.load(query_ptr + at, mask=row[:, None] & inside, other=0.0).to(tl.float32)
        of_target = target.to(tl.int64)[:, None] * sizes[2] + inner[None, :]
        t = tl.load(key_ptr + of_target, mask=there[:, None] & inside, other=0.0).to(tl.float32)
        dot += tl.sum(q * t, 1)
        queries += tl.sum(q * q, 1)
        targets += tl.sum(t * t, 1)
        if targets_ptr is not None and column_ptr is not None:
            k = tl.load(key_ptr + at, mask=column[:, None] & inside, other=0.0).to(tl.float32)
            keys += tl.sum(k * k, 1)
    scale = zero + factor
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr)
    if column_ptr is not None:
        scale *= _inverse_length(queries)
        dot *= _inverse_length(targets)
        tl.store(column_ptr + index, _inverse_length(targets if targets_ptr is None else keys), column)
    tl.store(row_ptr + index, scale, row)
    if positive_ptr is not None:
        tl.store(positive_ptr + index, scale * dot, row)


def prepare(
    query: Tensor, key: Tensor, scale: Tensor | None, factor: float, targets: Tensor | None,
    to: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """Fill the scales of rows and columns (None: not normalised), and the positives' logits (or None)."""
    m, n = query.shape[0], key.shape[0]
    _contrastive_prepare_kernel[(triton.cdiv(max(m, n), PREPARE_BLOCK[0]),)](
        query, key, scale, targets, *to, (m, n, query.shape[1]), factor, *PREPARE_BLOCK, **STREAM_OPTIONS
    )
