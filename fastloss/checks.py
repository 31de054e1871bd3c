"""Argument checks shared by the losses: each error names the argument, what came and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: Any, ndim: int | tuple[int, ...] | None = None) -> None:
    """A floating-point tensor, of rank `ndim` where one is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected a float16, bfloat16, float32 or float64 tensor, got {value.dtype}; "
            f"convert it first, e.g. {name}.float() (and divide uint8 images by 255)"
        )
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if ranks is not None and value.ndim not in ranks:
        wanted = " or ".join(f"{r}-D" for r in ranks)
        raise ValueError(f"{name}: expected a {wanted} tensor, got shape {tuple(value.shape)}")


def check_same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name_b}: expected the shape of {name_a}, {tuple(a.shape)}, got {tuple(b.shape)}")
    check_same_device(name_a, a, name_b, b)


def check_same_device(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{name_b}: expected it on the device of {name_a}, {a.device}, got {b.device}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> None:
    """A finite number in [low, high], or (low, high] with `open_low`. NaN never passes."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    inside = low < value <= high if open_low else low <= value <= high
    if not (inside and -math.inf < value < math.inf):  # not isfinite(), which torch.compile(dynamic=True) cannot trace
        bounds = f"{'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
        wanted = "a finite number" + (f" {bounds}" if low > -math.inf else "")
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def check_weight(name: str, weight: Any, name_of: str, of: Tensor) -> None:
    """A map of weights, or a mask (bool), without a gradient that broadcasts to the tensor `of`."""
    if not (isinstance(weight, Tensor) and weight.dtype == torch.bool):
        check_tensor(name, weight)
    check_same_device(name_of, of, name, weight)
    if weight.requires_grad:
        raise ValueError(f"{name}: no gradient is provided for it; pass {name}.detach()")
    try:
        fits = torch.broadcast_shapes(weight.shape, of.shape) == of.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {name_of}, {tuple(of.shape)}, got {tuple(weight.shape)}"
        )


def check_same_length(name_a: str, a: Sequence, name_b: str, b: Sequence) -> None:
    if len(a) != len(b):
        raise ValueError(f"{name_b}: expected as many entries as {name_a}, {len(a)}, got {len(b)}")
