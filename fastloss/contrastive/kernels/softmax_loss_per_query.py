"""Triton kernels of the plain loss with negatives [M, K, D] of each row's own (see ops/softmax_loss_per_query.py).

The negatives are read once by the kernels of softmax_stats_per_query, the losses and the slopes g_i = d out / d n_i
come from those of softmax_loss; one more kernel reads a row's t, query and key and makes what is one vector per row:

    u       = g (t - c(key) key)
    d query = r (u - c(query)^2 <query, u> query)                 the last terms of both with NORMALIZE alone
    d key   = -g r c(key) (query - c(key)^2 <query, key> key)
    dot     = r <query, u>                                        the gradient of the scale times it, by rows

Bytes: the negatives once, at s each; their gradient costs 2 s more (s where nothing is normalised), as there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import AotCase, on_device
from ..ops import softmax_stats_per_query as stats_op
from ..ops.softmax_loss_per_query import Grads, Inputs, Needs, Saved
from ..save_plan import KEY, NEGATIVES, QUERY, SCALE
from .embedding_gradients import scaled
from .norms import _inverse_length, prepare
from .row_losses import plain_losses
from .softmax_stats_per_query import HALF_AND_SINGLE, softmax_stats_per_query_bwd, softmax_stats_per_query_fwd


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


def softmax_loss_per_query_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    query, key, (rows, width) = x.query.contiguous(), x.key.contiguous(), x.query.shape
    share = None if x.share is None else x.share.contiguous()
    single = query.new_empty(0, dtype=torch.float32)
    state, loss = single.new_empty((4, rows)), single.new_empty(rows)
    made = [single.new_empty((rows if x.needs & need else 0, width)) for need in (QUERY, KEY)]
    made.append(single.new_empty(rows if x.needs & SCALE else 0))
    positive, row_scale = state[2], state[3]
    with on_device(query):
        if rows:
            of_keys = single.new_empty(rows) if x.normalize else None
            prepare(query, key, x.scale, x.factor, None, (row_scale, of_keys, positive))
        keep = 2 if x.needs & NEGATIVES else int(x.needs != 0)
        found = softmax_stats_per_query_fwd(
            stats_op.Inputs(query, x.negatives, row_scale, None, x.normalize, "", 0.0, keep)
        )
        state[:2] = found.stats
        if rows:
            slopes = single.new_empty((3, rows)) if x.needs & (QUERY | KEY | SCALE) else None
            plain_losses(found.stats, positive, share, x.reduction, x.include_positive, loss, slopes)
            if slopes is not None:
                wide = triton.next_power_of_2(width)
                _own_rows_kernel[(rows,)](
                    slopes, found.pulls, query, key, row_scale, *(grad if grad.shape[0] else None for grad in made),
                    width, x.normalize, wide, enable_fp_fusion=True, num_warps=max(1, min(16, wide // 512)),
                )  # fmt: skip
        out = loss if x.reduction == "none" else getattr(loss, x.reduction)()
    state = state[:, : rows if x.needs & NEGATIVES else 0].contiguous()
    return out, Saved(state, found.logits, found.inverse, *made)


def softmax_loss_per_query_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    none = grad.new_empty(0)
    with on_device(x.query):
        by_row = grad[:, None] if x.reduction == "none" else grad
        return Grads(
            query=scaled(saved.query_grad, by_row, x.query, needs.query),
            key=scaled(saved.key_grad, by_row, x.key, needs.key),
            negatives=_of_negatives(grad, x, saved) if needs.negatives else x.negatives.new_empty(0),
            scale=none if not needs.scale or x.scale is None
            else ((saved.scale_grad * grad).sum() / x.scale).reshape(x.scale.shape),
        )  # fmt: skip


def _of_negatives(grad: Tensor, x: Inputs, saved: Saved) -> Tensor:
    """The negatives' gradient, from their logits and the slopes of their log-sum-exps."""
    state, rows = saved.state, x.query.shape[0]
    slopes = grad.new_zeros((3, rows))
    if rows:
        share = None if x.share is None else x.share.contiguous()
        plain_losses(state, state[2], share, x.reduction, x.include_positive, None, slopes, grad.contiguous())
    slopes[1].zero_()
    statistics = stats_op.Inputs(x.query, x.negatives, state[3], None, x.normalize, "", 0.0, 2)
    kept = stats_op.Saved(state, grad.new_empty(0), saved.logits, saved.inverse)
    return softmax_stats_per_query_bwd(slopes[:2], statistics, kept, stats_op.Needs(False, True, False)).negatives


def _both_ways(x: Inputs) -> None:
    out, saved = softmax_loss_per_query_fwd(x)
    softmax_loss_per_query_bwd(torch.empty_like(out), x, saved, Needs(True, True, True, True))


def aot_cases() -> Iterator[AotCase]:
    """Every dtype, cosine or not, frozen negatives or not; the kernels of the negatives have their own cases."""
    sizes = ((64, 1024, 512), (8, 33, 77), (4, 16, 8192))
    for dtype, (rows, count, width), normalize in itertools.product(HALF_AND_SINGLE, sizes, (True, False)):
        query, key = (torch.empty(rows, width, dtype=dtype, device="meta") for _ in range(2))
        negatives, scale = query.new_empty(rows, count, width), torch.empty(1, device="meta")
        share = torch.empty(rows, device="meta") if normalize else None
        reduction, label = "sum" if normalize else "none", f"{str(dtype).removeprefix('torch.')} {rows, count, width}"
        frozen = Inputs(query, key, negatives, scale, share, 1.0, True, normalize, reduction, QUERY + KEY + SCALE)
        yield AotCase(
            f"frozen {normalize} {label}", softmax_loss_per_query_fwd, (frozen,),
            ("_own_rows_kernel",) if width % 8 == 0 else (),
        )  # fmt: skip
        x = frozen._replace(needs=QUERY + KEY + SCALE + NEGATIVES)
        yield AotCase(f"both {normalize} {label}", _both_ways, (x,))
