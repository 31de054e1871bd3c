"""Triton kernels of the plain loss with negatives [M, K, D] of each row's own (see ops/softmax_loss_per_query.py).

The negatives are read once by the kernels of contrastive_each, the losses and the slopes g_i = d out / d n_i come from
the plain op's; one more kernel reads a row's t, query and key and makes all that is one vector per row:

    u       = g (t - c(key) key)
    d query = r (u - c(query)^2 <query, u> query)                 the last terms of both with NORMALIZE alone
    d key   = -g r c(key) (query - c(key)^2 <query, key> key)
    dot     = r <query, u>                                        the gradient of the scale times it, by rows

Bytes: the negatives once, at s each; their gradient costs 2 s more (s where nothing is normalised), as there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import AotCase, on_device
from ..save_plan import KEY, NEGATIVES, QUERY, SCALE
from .embedding_gradients import scaled
from .norms import _inverse_length, prepare
from .row_losses import plain_losses
from .softmax_stats_per_query import HALF_AND_SINGLE, contrastive_each_bwd, contrastive_each_fwd


@triton.jit
def _own_rows_kernel(
    slope_ptr,  # (M,): g
    vectors_ptr,  # (M, D) float32: t
    query_ptr,  # (M, D)
    key_ptr,  # (M, D)
    scale_ptr,  # (M,): r
    query_grad_ptr,  # (M, D) float32, or None
    key_grad_ptr,  # (M, D) float32, or None
    dot_ptr,  # (M,), or None
    width,
    NORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    at = row * width + columns
    slope, scale = tl.load(slope_ptr + row), tl.load(scale_ptr + row)
    there = inside & (tl.zeros((WIDTH,), tl.float32) + slope != 0.0)  # what is left out may be NaN
    query = tl.load(query_ptr + at, mask=there, other=0.0).to(tl.float32)
    key = tl.load(key_ptr + at, mask=there, other=0.0).to(tl.float32)
    of_query, of_key = 1.0, 1.0
    if NORMALIZE:
        of_query, of_key = _inverse_length(tl.sum(query * query)), _inverse_length(tl.sum(key * key))
    u = slope * (tl.load(vectors_ptr + at, mask=there, other=0.0) - of_key * key)
    along = tl.sum(query * u)
    if dot_ptr is not None:
        tl.store(dot_ptr + row, scale * along)
    if query_grad_ptr is not None:
        if NORMALIZE:
            u -= of_query * of_query * along * query
        tl.store(query_grad_ptr + at, scale * u, mask=inside)
    if key_grad_ptr is not None:
        v = query
        if NORMALIZE:
            v -= of_key * of_key * tl.sum(query * key) * key
        tl.store(key_grad_ptr + at, -slope * scale * of_key * v, mask=inside)


def contrastive_own_fwd(
    query: Tensor, key: Tensor, negatives: Tensor, scale: Tensor | None, share: Tensor | None, factor: float,
    include_positive: bool, normalize: bool, reduction: str, needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, (rows, width) = query.contiguous(), key.contiguous(), query.shape
    share = None if share is None else share.contiguous()
    single = query.new_empty(0, dtype=torch.float32)
    state, loss = single.new_empty((4, rows)), single.new_empty(rows)
    made = [single.new_empty((rows if needs & need else 0, width)) for need in (QUERY, KEY)]
    made.append(single.new_empty(rows if needs & SCALE else 0))
    positive, row_scale = state[2], state[3]
    with on_device(query):
        if rows:
            of_keys = single.new_empty(rows) if normalize else None
            prepare(query, key, scale, factor, None, (row_scale, of_keys, positive))
        keep = 2 if needs & NEGATIVES else int(needs != 0)
        stats, pulls, logits, inverse = contrastive_each_fwd(
            query, negatives, row_scale, None, normalize, "", 0.0, keep
        )
        state[:2] = stats
        if rows:
            slopes = single.new_empty((3, rows)) if needs & (QUERY | KEY | SCALE) else None
            plain_losses(stats, positive, share, reduction, include_positive, loss, slopes)
            if slopes is not None:
                wide = triton.next_power_of_2(width)
                _own_rows_kernel[(rows,)](
                    slopes, pulls, query, key, row_scale, *(grad if grad.shape[0] else None for grad in made), width,
                    normalize, wide, enable_fp_fusion=True, num_warps=max(1, min(16, wide // 512)),
                )  # fmt: skip
        out = loss if reduction == "none" else getattr(loss, reduction)()
    return out, state[:, : rows if needs & NEGATIVES else 0].contiguous(), logits, inverse, made[0], made[1], made[2]


def contrastive_own_bwd(
    grad: Tensor, query: Tensor, key: Tensor, negatives: Tensor, scale: Tensor | None, share: Tensor | None,
    factor: float, include_positive: bool, normalize: bool, reduction: str, needs: int, state: Tensor, logits: Tensor,
    inverse: Tensor, query_grad: Tensor, key_grad: Tensor, scale_grad: Tensor, needs_query: bool, needs_key: bool,
    needs_negatives: bool, needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    none, of_negatives = grad.new_empty(0), negatives.new_empty(0)
    rows = query.shape[0]
    with on_device(query):
        by_row = grad[:, None] if reduction == "none" else grad
        of_query, of_key = scaled(query_grad, by_row, query, needs_query), scaled(key_grad, by_row, key, needs_key)
        if needs_negatives:
            slopes = grad.new_zeros((3, rows))
            if rows:
                share = None if share is None else share.contiguous()
                plain_losses(state, state[2], share, reduction, include_positive, None, slopes, grad.contiguous())
            slopes[1].zero_()
            of_negatives = contrastive_each_bwd(
                slopes[:2], query, negatives, state[3], None, normalize, "", 0.0, 2, state, none, logits, inverse,
                False, True, False,
            )[1]  # fmt: skip
        if needs_scale and scale is not None:
            return of_query, of_key, of_negatives, ((scale_grad * grad).sum() / scale).reshape(scale.shape)
    return of_query, of_key, of_negatives, none


def _both_ways(*args: Any) -> None:
    out, *made = contrastive_own_fwd(*args)
    contrastive_own_bwd(*(torch.empty_like(out), *args, *made, True, True, True, True))


def aot_cases() -> Iterator[AotCase]:
    """Every dtype, cosine or not, frozen negatives or not; the kernels of the negatives have their own cases."""
    sizes = ((64, 1024, 512), (8, 33, 77), (4, 16, 8192))
    for dtype, (rows, count, width), normalize in itertools.product(HALF_AND_SINGLE, sizes, (True, False)):
        query, key = (torch.empty(rows, width, dtype=dtype, device="meta") for _ in range(2))
        negatives, scale = query.new_empty(rows, count, width), torch.empty(1, device="meta")
        share = torch.empty(rows, device="meta") if normalize else None
        reduction, label = "sum" if normalize else "none", f"{str(dtype).removeprefix('torch.')} {rows, count, width}"
        args = (query, key, negatives, scale, share, 1.0, True, normalize, reduction)
        yield AotCase(
            f"frozen {normalize} {label}", contrastive_own_fwd, (*args, QUERY + KEY + SCALE),
            ("_own_rows_kernel",) if width % 8 == 0 else (),
        )  # fmt: skip
        yield AotCase(f"both {normalize} {label}", _both_ways, (*args, QUERY + KEY + SCALE + NEGATIVES))
