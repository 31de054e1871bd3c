"""Gradients of each row's query and key, where the negatives have left their weighted keys t [M, D]:

u       = g (t - c(key) key)                                  g = d out / d log-sum-exp; c(x) = 1 / |x|, else 1
d query = r (u - c(query)^2 <query, u> query)                 the last terms of both with NORMALIZE alone
d key   = -g r c(key) (query - c(key)^2 <query, key> key)
dot     = r <query, u>                                        the gradient of the scale times it, by rows
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .norms import inverse_norm


class PairGradients(NamedTuple):
    """Where they go, float32; None: not needed."""

    query: Tensor | None  # [M, D]
    key: Tensor | None  # [M, D]
    dot: Tensor | None  # [M]


@triton.jit
def _share(dot, square):
    """How much of x is in a vector whose product with x is `dot`."""
    return tl.where(square > 0.0, tl.div_rn(dot, square), 0.0)


@triton.jit
def store_pair_gradients(
    grad_lse,  # g of the row
    weighted_keys,  # (DIM,): t of the row
    row,  # int64
    query_ptr,  # (M, D)
    key_ptr,  # (M, D)
    scale_ptr,  # (M,): r
    out,  # PairGradients
    dim,
    NORMALIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    columns = tl.arange(0, DIM)
    inside = columns < dim
    offset = row * dim + columns
    scale = tl.where(grad_lse != 0.0, tl.load(scale_ptr + row), 0.0)  # what is left out may be NaN
    there = inside & (tl.zeros((DIM,), tl.float32) + grad_lse != 0.0)
    query = tl.load(query_ptr + offset, mask=there, other=0.0).to(tl.float32)
    key = tl.load(key_ptr + offset, mask=there, other=0.0).to(tl.float32)
    key_inverse_norm, key_square = 1.0, 1.0
    if NORMALIZE:
        key_square = tl.sum(key * key)
        key_inverse_norm = inverse_norm(key_square)
    u = tl.where(there, grad_lse * (weighted_keys - key_inverse_norm * key), 0.0)
    along = tl.sum(query * u)
    if out.dot is not None:
        tl.store(out.dot + row, scale * along)
    if out.query is not None:
        if NORMALIZE:
            u -= _share(along, tl.sum(query * query)) * query
        tl.store(out.query + offset, scale * u, mask=inside)
    if out.key is not None:
        v = query
        if NORMALIZE:
            v -= _share(tl.sum(query * key), key_square) * key
        tl.store(out.key + offset, -grad_lse * scale * key_inverse_norm * v, mask=inside)


@triton.jit
def _pair_gradients_kernel(
    grad_lse_ptr,  # (M,): g
    weighted_keys_ptr,  # (M, D) float32: t
    query_ptr,  # (M, D)
    key_ptr,  # (M, D)
    scale_ptr,  # (M,): r
    out,  # PairGradients
    dim,
    NORMALIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    grad_lse, columns = tl.load(grad_lse_ptr + row), tl.arange(0, DIM)
    there = (columns < dim) & (tl.zeros((DIM,), tl.float32) + grad_lse != 0.0)
    weighted_keys = tl.load(weighted_keys_ptr + row * dim + columns, mask=there, other=0.0)
    store_pair_gradients(grad_lse, weighted_keys, row, query_ptr, key_ptr, scale_ptr, out, dim, NORMALIZE, DIM)


def pair_gradients(
    grad_lse: Tensor, weighted_keys: Tensor, query: Tensor, key: Tensor, scale: Tensor, out: PairGradients,
    normalize: bool,
) -> None:  # fmt: skip
    """Fill `out`."""
    rows, dim = query.shape
    padded_dim = triton.next_power_of_2(dim)
    _pair_gradients_kernel[(rows,)](
        grad_lse, weighted_keys, query, key, scale, out, dim, normalize, padded_dim, enable_fp_fusion=True,
        num_warps=max(1, min(16, padded_dim // 512)),
    )  # fmt: skip
