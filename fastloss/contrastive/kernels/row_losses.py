"""Triton kernel of the plain softmax losses of rows, from their statistics and positives."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import _softplus
from ...core.kernels.launch import STREAM_OPTIONS

LOSS_BLOCK = 256


class LossForm(NamedTuple):
    """What the kernel is compiled for."""

    include_positive: bool
    directions: int
    unreduced: bool  # the loss is returned row by row, and so is its upstream gradient


@triton.jit
def loss_and_slope(lse, positive, counts, INCLUDE_POSITIVE: tl.constexpr):
    """Losses of one direction and their derivatives by lse - positive, both 0 where the row does not count."""
    x = tl.where(counts, lse, 0.0) - positive
    loss, slope = x, tl.zeros_like(x) + 1.0
    if INCLUDE_POSITIVE:
        loss, slope = _softplus(x)
    slope = tl.where(x == float("inf"), float("nan"), slope)  # of an infinite loss: no loss scaler may step on it
    return tl.where(counts, loss, 0.0), tl.where(counts, slope, 0.0)


@triton.jit(do_not_specialize=["rows"])
def _row_losses_kernel(
    stats_ptr,  # (directions, 2, M): log-sum-exps and maxima
    positive_ptr,  # (M,)
    row_weight_ptr,  # (M,) or None
    grad_ptr,  # upstream: (M,) if unreduced, else (1,); None: 1
    loss_ptr,  # (M,) or None: row_weight_i loss_i
    stats_grad_ptr,  # (2 directions, M) or None: gradients of stats
    positive_grad_ptr,  # (M,) or None: of the positives
    rows,
    part,  # what each row's loss counts in the result
    FORM: tl.constexpr,  # LossForm
    BLOCK: tl.constexpr,
):
    INCLUDE_POSITIVE: tl.constexpr = FORM.include_positive
    DIRECTIONS: tl.constexpr = FORM.directions
    UNREDUCED: tl.constexpr = FORM.unreduced
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < rows
    positive = tl.load(positive_ptr + index, mask=inside, other=0.0)
    weight = tl.zeros((BLOCK,), tl.float32) + 1.0 / DIRECTIONS
    if row_weight_ptr is not None:
        weight *= tl.load(row_weight_ptr + index, mask=inside, other=0.0)
    grad = weight * part
    if grad_ptr is not None:
        grad *= tl.load(grad_ptr + index, mask=inside, other=0.0) if UNREDUCED else tl.load(grad_ptr)
    loss_sum, grad_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for direction in tl.static_range(DIRECTIONS):
        lse = tl.load(stats_ptr + 2 * direction * rows + index, mask=inside, other=0.0)
        counts = (lse != float("-inf")) & (weight != 0.0)  # what is left out may be NaN
        loss, slope = loss_and_slope(lse, positive, counts, INCLUDE_POSITIVE)
        loss_sum += loss
        grad_lse = tl.where(counts, slope * grad, 0.0)
        grad_sum += grad_lse
        if stats_grad_ptr is not None:
            tl.store(stats_grad_ptr + 2 * direction * rows + index, grad_lse, inside)
    if loss_ptr is not None:
        tl.store(loss_ptr + index, loss_sum * weight, inside)
    if positive_grad_ptr is not None:
        tl.store(positive_grad_ptr + index, -grad_sum, inside)


def row_losses(
    stats: Tensor, positive: Tensor, row_weight: Tensor | None, form: LossForm, part: float,
    loss: Tensor | None, stats_grad: Tensor | None, grad: Tensor | None = None, positive_grad: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill `loss`, of rows from their log-sum-exps and positives, and `stats_grad` and `positive_grad`, the gradients
    of both for the upstream `grad` (None: 1) of the reduced loss, in which each row's loss counts by `part`."""
    rows = positive.shape[0]
    _row_losses_kernel[(triton.cdiv(rows, LOSS_BLOCK),)](
        stats,
        positive,
        row_weight,
        grad,
        loss,
        stats_grad,
        positive_grad,
        rows,
        part,
        form,
        LOSS_BLOCK,
        **STREAM_OPTIONS,
    )
