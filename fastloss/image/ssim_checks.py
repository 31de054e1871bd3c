"""The options of the SSIM losses: what they may be, and what they mean to the kernels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import transformed
from ..core.checks import (
    check_choice,
    check_integer,
    check_number,
    check_numbers,
    check_same_shape,
    check_tensor,
    is_sequence,
)
from .ssim_reference import Axis

PADDINGS = ("same", "valid")
REDUCTIONS = ("none", "mean", "sum", "map")
LARGEST = 65535  # of windows
# The constants, and the square of the range, must lie so far within the range of the type that SSIM is computed in.
BOUNDS = {torch.float32: (2.0**-120, 2.0**120), torch.float64: (2.0**-960, 2.0**960)}


# What to pass instead of other libraries' options.
SSIM_HINTS = dict.fromkeys(("window_size", "win_size", "kernel_size"), "window=...") | {
    "win_sigma": "sigma=...",
    "max_val": "data_range=...",
    "size_average": "reduction='mean' or 'none'",
}


class SsimNumbers(NamedTuple):
    """The window, whether the padding is "same", the two stabilising constants, and the value that images begin at."""

    window: int
    sigma: float
    same: bool
    c1: float
    c2: float
    low: float


class Constants(NamedTuple):
    """The two stabilising constants, and the value that images begin at."""

    c1: float
    c2: float
    low: float


def check_pair(image: Tensor, image_pred: Tensor) -> None:
    check_tensor("image", image, (4, 5))
    check_tensor("image_pred", image_pred, (4, 5))
    check_same_shape("image", image, "image_pred", image_pred)


def check_ssim_options(
    window: int, sigma: float, data_range: float | Sequence[float], padding: str, k1: float, k2: float,
    dtype: torch.dtype = torch.float32,
) -> SsimNumbers:  # fmt: skip
    """Those of a loss that has one window for all axes. `dtype`: that of the result."""
    window, sigma = _check_window("window", window), _check_sigma("sigma", sigma)
    constants = check_constants(data_range, k1, k2, dtype)
    check_choice("padding", padding, PADDINGS)
    return SsimNumbers(window, sigma, padding == "same", *constants)


def check_axes(window: int | Sequence[int], sigma: float | Sequence[float], same: bool, image: Tensor) -> list[Axis]:
    """The window along each axis of the images: options are one number for all of them, or one for each."""
    windows = _check_each("window", window, _check_window, image.ndim - 2)
    sigmas = _check_each("sigma", sigma, _check_sigma, image.ndim - 2)
    return [Axis(*one, same=same) for one in zip(windows, sigmas, strict=True)]


def _check_each(name: str, value: Any, check: Callable[[str, Any], Any], count: int) -> list[Any]:
    if not is_sequence(value):
        return [check(name, value)] * count
    each = list(value)
    if len(each) != count:
        raise ValueError(f"{name}: expected a number or {count}, one along each axis of the images, got {len(each)}")
    return [check(f"{name}[{i}]", one) for i, one in enumerate(each)]


def _check_window(name: str, window: Any) -> Any:
    window = check_integer(name, window, 1, LARGEST, wanted="an odd integer")
    if window % 2 == 0:
        raise ValueError(f"{name}: expected an odd integer >= 1, got {window}")
    return window


def _check_sigma(name: str, sigma: Any) -> Any:
    return check_number(name, sigma, 0, open_low=True, float32=False)


def check_constants(data_range: float | Sequence[float], k1: float, k2: float, dtype: torch.dtype) -> Constants:
    k1, k2 = (check_number(n, k, 0, open_low=True, float32=False) for n, k in (("k1", k1), ("k2", k2)))
    low, span = _low_and_span(data_range)
    least, most = BOUNDS[dtype]
    squares = []
    for name, k in (("k1", k1), ("k2", k2)):
        square = (k * span) * (k * span)  # not ** 2, which raises where it overflows
        if not least <= square <= most:
            raise ValueError(
                f"{name}, data_range: expected ({name} * range) ** 2 from {least:.0e} to {most:.0e}, so that {dtype} "
                f"holds it, got {square:g} of {name}={k!r}, data_range={data_range!r}"
            )
        squares.append(square)
    if not span * span <= most:
        raise ValueError(f"data_range: expected a range of at most {math.sqrt(most):.0e}, got {data_range!r}")
    c1, c2 = squares
    return Constants(c1, c2, low)


def _low_and_span(data_range: Any) -> tuple[float, float]:
    """Where the range begins, and how long it is."""
    if not (is_sequence(data_range) or (isinstance(data_range, Tensor) and data_range.ndim == 1)):
        try:
            return 0.0, check_number("data_range", data_range, 0, open_low=True, float32=False)
        except TypeError as error:
            raise TypeError(str(error).replace("a number", "a number > 0 or a pair (low, high)", 1)) from None
    pair = check_numbers("data_range", data_range)
    if len(pair) != 2:
        raise ValueError(f"data_range: expected a number > 0 or a pair (low, high), got {len(pair)} entries, {pair}")
    low, high = pair
    if not low < high:
        raise ValueError(f"data_range: expected low < high, got ({low:g}, {high:g})")
    return low, high - low


def _by(sides: Sequence[int]) -> str:
    return " x ".join(str(side) for side in sides)


def check_window_fits(image: Tensor, axes: Sequence[Axis], sides: Sequence[int] | None = None, levels: int = 1) -> None:
    """Of "valid" windows: whether one fits. `sides`: those of the last of several levels."""
    sides = image.shape[2:] if sides is None else sides
    if any(side < axis.window for side, axis in zip(sides, axes, strict=True)):
        where = "" if levels == 1 else f", which is {_by(sides)} at level {levels}"
        raise ValueError(
            f"window: expected at most the image's sides with padding='valid', got {_shown(axes)} for images of "
            f"{_by(image.shape[2:])} pixels{where}; use padding='same' or a smaller window"
        )


def _shown(axes: Sequence[Axis]) -> int | tuple[int, ...]:
    windows = tuple(axis.window for axis in axes)
    return windows[0] if len(set(windows)) == 1 else windows


def reflected(image: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Images with a border reflected around them: what whole windows see there is SSIM with reflect padding."""
    borders = [axis.window // 2 for axis in axes]
    if any(side <= border for side, border in zip(image.shape[2:], borders, strict=True)):
        raise ValueError(
            f"window: expected at most twice the image's sides less 1 with padding='reflect', got {_shown(axes)} for "
            f"images of {_by(image.shape[2:])} pixels; use padding='same' or a smaller window"
        )
    if not any(borders) or image.numel() == 0:
        return image
    return F.pad(image, [border for border in reversed(borders) for _ in range(2)], mode="reflect")


class NegativeImages:
    """Looks, in the first call on the CPU, whether the target has values below 0 though its range begins there.

    Once, for that is a pass over the image; and not on a device, whose answer the host would have to wait for.
    """

    looked = False

    @classmethod
    def warn_once(cls, image: Tensor, data_range: Any) -> None:
        if torch.compiler.is_compiling() or cls.looked or not isinstance(data_range, (int, float)):
            return
        plain = type(image) in (Tensor, torch.nn.Parameter) and image.device.type == "cpu" and image.numel() > 0
        if not plain or transformed():
            return
        cls.looked = True
        least = image.detach().min().item()
        if least < -data_range / 16:  # less may be the overshoot of an interpolation
            warnings.warn(
                f"data_range={data_range!r} is that of images from 0 on, and image has values down to {least:.3g}: "
                "there SSIM may take an image and its negative for alike. Pass where the range begins and ends, "
                "e.g. data_range=(-1, 1)",
                stacklevel=3,
            )
