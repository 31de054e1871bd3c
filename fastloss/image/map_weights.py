"""Maps of weights over the pixels of an image: their sums, and means by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weight_sum(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of a map of weights, bool ones included; what is broadcast along a dimension is added up once."""
    once = weight
    for dim, (size, stride) in enumerate(zip(weight.shape, weight.stride(), strict=True)):
        once = once.narrow(dim, 0, 1) if stride == 0 and size > 1 else once
    total = once.sum(dtype=dtype)
    times = math.prod(weight.shape) // max(math.prod(once.shape), 1)
    return total * times if times > 1 else total


def over_weights(total: Tensor, weights: Tensor) -> Tensor:
    """A weighted sum by the sum of its weights: 0 if that is 0, NaN, never a wrong number, if it is infinite."""
    return total / torch.where(weights == 0, 1.0, weights).nan_to_num(math.nan, math.nan, math.nan)
