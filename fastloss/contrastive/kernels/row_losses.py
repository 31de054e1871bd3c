"""Triton kernel of the plain softmax losses of rows, from their statistics and positives."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import _softplus
from ...core.kernels.launch import STREAM_OPTIONS

LOSS_BLOCK = 256


@triton.jit
def _plain_loss_kernel(
    stats_ptr,  # (directions, 2, M): log-sum-exps and maxima
    positive_ptr,  # (M,)
    share_ptr,  # (M,) or None
    grad_ptr,  # upstream (M,) or, without EACH, (1,); None: 1
    loss_ptr,  # (M,) or None: share_i loss_i
    pull_ptr,  # (2 directions + 1, M) or None: gradients of stats, then those of the positives
    rows,
    factor,  # of the gradients
    POSITIVE: tl.constexpr,  # include_positive
    DIRECTIONS: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < rows
    positive = tl.load(positive_ptr + index, mask=inside, other=0.0)
    weight = tl.zeros((BLOCK,), tl.float32) + 1.0 / DIRECTIONS
    if share_ptr is not None:
        weight *= tl.load(share_ptr + index, mask=inside, other=0.0)
    up = weight * factor
    if grad_ptr is not None:
        up *= tl.load(grad_ptr + index, mask=inside, other=0.0) if EACH else tl.load(grad_ptr)
    total, pulled = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for direction in tl.static_range(DIRECTIONS):
        negatives = tl.load(stats_ptr + 2 * direction * rows + index, mask=inside, other=0.0)
        some = (negatives != float("-inf")) & (weight != 0.0)  # what is left out may be NaN
        x = tl.where(some, negatives, 0.0) - positive
        loss, slope = x, tl.zeros((BLOCK,), tl.float32) + 1.0
        if POSITIVE:
            loss, slope = _softplus(x)
        slope = tl.where(x == float("inf"), float("nan"), slope)  # of an infinite loss: no loss scaler may step on it
        total += tl.where(some, loss, 0.0)
        pull = tl.where(some, slope * up, 0.0)
        pulled += pull
        if pull_ptr is not None:
            tl.store(pull_ptr + 2 * direction * rows + index, pull, inside)
    if loss_ptr is not None:
        tl.store(loss_ptr + index, total * weight, inside)
    if pull_ptr is not None:
        tl.store(pull_ptr + 2 * DIRECTIONS * rows + index, -pulled, inside)


def plain_losses(
    stats: Tensor, positive: Tensor, share: Tensor | None, reduction: str, include_positive: bool,
    loss: Tensor | None, pulls: Tensor | None, grad: Tensor | None = None, directions: int = 1,
    factor: float | None = None,
) -> None:  # fmt: skip
    """Losses of rows from their log-sum-exps and positives; `pulls` take the gradients of both, for the upstream `grad`
    (None: 1) of the loss, of which each row has the part `factor` (None: by `reduction`)."""
    rows = positive.shape[0]
    if factor is None:
        factor = 1.0 / rows if reduction == "mean" else 1.0
    _plain_loss_kernel[(triton.cdiv(rows, LOSS_BLOCK),)](
        stats, positive, share, grad, loss, pulls, rows, factor, include_positive, directions, reduction == "none",
        LOSS_BLOCK, **STREAM_OPTIONS,
    )  # fmt: skip
