"""Embeddings as the losses take them: their dtype, their norms, the scales of their products."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import is_interpreting
from ..core.traced import filled

TINY_NORM = 1e-12  # a vector no longer than this counts as zero: cosine 0 with everything, gradient 0


def inverse_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / |x| of each row, 0 without gradient for zero vectors, NaN where the square of |x| is beyond the dtype."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    inverse = 1 / F.threshold(norm, TINY_NORM, math.inf)  # NaN stays NaN
    return torch.add(inverse, norm, alpha=0.0)  # 0 times infinity is NaN


def _inner(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (a.to(dtype) * b.to(dtype)).sum(-1)


def upcast_on_cpu(x: Tensor) -> Tensor:
    """Half precision on the CPU as float32, so that all parts of its gradient are added up before one rounding."""
    on_cpu = x.device.type == "cpu" and not is_interpreting()
    return x.float() if on_cpu and x.dtype in (torch.bfloat16, torch.float16) else x


def self_operands(x: Tensor, dtype: torch.dtype, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """For rows that are compared with one another (NT-Xent, SupCon): the op's operand, and scales of its rows or None.

    float32 is normalised here. Half precision on a device keeps its dtype, the fastest to multiply; the op scales it by
    their inverse norms.
    """
    x = upcast_on_cpu(x)
    if normalize and x.dtype in (torch.bfloat16, torch.float16):
        return x, inverse_norm(x, dtype)
    return embed(x, dtype if normalize else x.dtype, normalize), None


def are_bfloat16(one: Tensor, two: Tensor) -> bool:
    """Whether both are bfloat16 on the CPU: products may be made in it, though `upcast_on_cpu` makes float32."""
    return one.device.type == "cpu" and one.dtype == two.dtype == torch.bfloat16


def scale_of_rows(inverse_norms: Tensor | None, scale: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of each row's products: the scale, times the inverse norms of normalised rows."""
    if inverse_norms is not None:
        return inverse_norms * scale
    if isinstance(scale, Tensor):
        return scale.expand(like.shape[0])
    return filled((like.shape[0],), scale, dtype, like.device)


def embed(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """`x` in `dtype`, rows at unit length if asked; zero vectors stay zero and get no gradient."""
    x = x.to(dtype)
    if not normalize:
        return x
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= TINY_NORM, math.inf)
