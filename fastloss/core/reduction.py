"""Reductions of a loss, weighted or not, the dtype it is computed in, and what an empty batch means."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from .checks import check_choice

REDUCTIONS = ("none", "mean", "sum")


def reduce(values: Tensor, reduction: str) -> Tensor:
    """`values` as they are, their mean or their sum. A mean over nothing raises instead of giving NaN."""
    check_reduction(reduction)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    check_not_empty(values.numel())
    return values.mean()


def check_reduction(reduction: str, choices: tuple[str, ...] = REDUCTIONS) -> None:
    check_choice("reduction", reduction, choices)


def check_not_empty(count: int) -> None:
    if count == 0:
        raise ValueError("reduction: the mean of an empty batch is undefined; skip the batch or use reduction='sum'")


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype every loss accumulates in and returns: float64 if any input is float64, else float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def full_precision(like: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off, so that products keep the dtype they are computed in; the meta device has no autocast."""
    return contextlib.nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def row_shares(weights: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """The factor of each row in the reduced loss: its weight and, for a mean, that over the sum of all (all 0: 0)."""
    weights = weights.to(torch.promote_types(weights.dtype, dtype))
    if reduction == "mean":
        largest = torch.linalg.vector_norm(weights, math.inf)  # first: the sum of large weights would be infinite
        weights = weights / largest.clamp_min(torch.finfo(weights.dtype).tiny)
        total = weights.sum()
        weights = weights / total.masked_fill(total == 0, 1.0)
    return weights.to(dtype)


def reduce_rows(values: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """Weighted rows, their sum, or their weighted mean (0 when all weights are 0)."""
    check_reduction(reduction)
    if weights is None:
        return reduce(values, reduction)
    if reduction == "mean":
        check_not_empty(values.numel())
    weighted = (values * row_shares(weights, reduction, values.dtype)).masked_fill(weights == 0, 0.0)
    return weighted if reduction == "none" else weighted.sum()
