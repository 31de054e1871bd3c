"""SSIM by definition: the sums that the kernels make, in torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import full_precision, result_dtype

# Images are shifted only where every sample's square is this many times C2, about twice the data range. Below, nothing
# cancels, and where both images are equal the loss and its gradient are exactly 0.
SHIFT_FROM = 4096.0
# Below this sigma the middle of the window rounds to 1 in float32 (2 exp(-1 / (2 sigma^2)) < 2^-25): it is one pixel.
ONE_PIXEL = {torch.float32: (52 * math.log(2)) ** -0.5, torch.float64: (110 * math.log(2)) ** -0.5}


class Axis(NamedTuple):
    """A window along one axis."""

    window: int  # pixels, odd
    sigma: float  # in pixels
    same: bool  # padded to the image's size


class Inputs(NamedTuple):
    """Of the op of SSIM's sums."""

    image: Tensor  # [N, C, H, W]
    image_pred: Tensor  # [N, C, H, W]
    weight: Tensor | None  # of the map, [N, C, H, W] or without the border that "valid" windows leave out
    window: int  # side in pixels, odd
    sigma: float  # in pixels
    same: bool  # padded to the image's size
    c1: float
    c2: float
    low: float  # the value that images begin at
    structure_only: bool  # without the luminance term
    keep: int = 0  # what the backward is to find, see ssim.py


def one_pixel(axes: Sequence[Axis], dtype: torch.dtype = torch.float32) -> bool:
    """Whether nothing but its middle counts in the window: its variances are 0, exactly."""
    return all(axis.window == 1 or axis.sigma < ONE_PIXEL[dtype] for axis in axes)


def _gaussian(window: int, sigma: float, like: Tensor) -> Tensor:
    """The window's taps, rounded once, made on the device: a copy from the host would wait and break CUDA graphs."""
    exact = torch.float32 if like.device.type == "mps" else torch.float64  # mps has no float64
    x = (torch.arange(window, device=like.device, dtype=exact) - window // 2) / sigma
    g = torch.exp(x * x / -2)
    return (g / g.sum()).to(like.dtype)


def _shift(samples: list[Tensor], c2: float) -> Tensor:
    """Of each plane or volume, the sample nearest to 0: no single pixel can cost the others their digits; or 0."""
    values = torch.stack(samples).detach()
    sizes = values.abs()
    sizes = torch.where(sizes < math.inf, sizes, math.inf)  # NaN too
    least, index = sizes.min(0, keepdim=True)
    used = (least < math.inf) & (least * least > SHIFT_FROM * c2)
    return torch.where(used, values.gather(0, index), 0.0)[0]


def _shifts(x: Tensor, y: Tensor, c2: float) -> tuple[Tensor, Tensor]:
    """What is subtracted from x + y and x - y before they are squared, for each plane or volume: by some pixels."""
    sides = x.shape[2:]
    every = slice(None)
    places = list(itertools.product([every], [every], *((side // 4, 3 * side // 4) for side in sides)))
    xs, ys = ([t[place] for place in places] for t in (x, y))
    of_all = (*x.shape[:2], *(1 for _ in sides))
    return (
        _shift([a + b for a, b in zip(xs, ys, strict=True)], c2).view(of_all),
        _shift([a - b for a, b in zip(xs, ys, strict=True)], c2).view(of_all),
    )


def _outside(size: int, g: Tensor) -> Tensor:
    """How much of a window lies outside the image, for each position along a side."""
    pixels = torch.arange(size, device=g.device)[:, None] + torch.arange(len(g), device=g.device) - len(g) // 2
    return torch.where((pixels < 0) | (pixels >= size), g, 0.0).sum(1)


def _seen(weight: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The pixels that a window of non-zero weight sees."""
    counted = (weight != 0).to(torch.float32)
    pool = F.max_pool2d if len(axes) == 2 else F.max_pool3d
    for i, (window, _, same) in enumerate(axes):
        if window > 1:
            reach = window // 2 if same else window - 1
            counted = F.pad(counted, [0, 0] * (len(axes) - 1 - i) + [reach, reach])
            counted = pool(counted, [window if j == i else 1 for j in range(len(axes))], 1)
    return counted > 0


def _moments(a: Tensor, d: Tensor, rest_a: Tensor, rest_d: Tensor, axes: Sequence[Axis]) -> tuple[Tensor, ...]:
    """G a, G d, G a^2, G d^2; outside the image a is -rest_a, and d is -rest_d."""
    channels = 4 * a.shape[1]  # all four moments as channels: at least 4 groups, which CUDA never gives to TF32
    filtered, out = F.conv2d if len(axes) == 2 else F.conv3d, a.new_zeros(())
    with full_precision(a):  # a half-precision convolution would lose the variances
        moments = torch.cat([a, d, a * a, d * d], 1)
        for i, (window, sigma, same) in enumerate(axes):
            g = _gaussian(window, sigma, a)
            along = [-1 if j == i else 1 for j in range(len(axes))]
            if window > 1 or len(axes) == 2:
                pad = [window // 2 if same and j == i else 0 for j in range(len(axes))]
                taps = g.view(1, 1, *along).expand(channels, 1, *(window if j == -1 else 1 for j in along))
                moments = filtered(moments, taps, padding=pad, groups=channels)
            if same:
                beyond = _outside(a.shape[2 + i], g).view(along)
                out = out + beyond - out * beyond
    mean_a, mean_d, square_a, square_d = moments.chunk(4, 1)
    if not any(axis.same for axis in axes):
        return mean_a, mean_d, square_a, square_d
    return (
        mean_a - rest_a * out,
        mean_d - rest_d * out,
        square_a + rest_a * rest_a * out,
        square_d + rest_d * rest_d * out,
    )


def ssim_map(
    image: Tensor, image_pred: Tensor, weight: Tensor | None, axes: Sequence[Axis], c1: float, c2: float, low: float,
    structure_only: bool,
) -> Tensor:  # fmt: skip
    """One minus SSIM, or minus its contrast-structure term alone, by `weight`: float32 (float64 for float64).

    Four moments do: means and variances of a = x + y and d = x - y, for mx^2 + my^2 = (ma^2 + md^2) / 2 and
    2 mx my = (ma^2 - md^2) / 2, and likewise for the variances. So nothing cancels where the images are close; what
    images far from 0 have in common is subtracted before it is squared, and added to the means again.
    """
    dtype = result_dtype(image, image_pred)
    x, y = image.to(dtype), image_pred.to(dtype)
    shift_a, shift_d = _shifts(x, y, c2)
    if weight is not None:  # NaN where no weight is must not reach a gradient
        seen = _seen(weight, axes)
        x, y = (torch.where(seen, t, 0.0) for t in (x, y))
    a, d = (x - shift_a) + y, (x - y) - shift_d
    rest_a = shift_a - 2 * low
    moments = _moments(a, d, rest_a, shift_d, axes)
    if weight is not None:
        moments = tuple(torch.where(weight == 0, 0.0, m) for m in moments)
    mean_a, mean_d, square_a, square_d = moments
    var_a, var_d = square_a - mean_a * mean_a, square_d - mean_d * mean_d
    mean_a, mean_d = mean_a + rest_a, mean_d + shift_d
    mean_aa, mean_dd = mean_a * mean_a, mean_d * mean_d
    luminance = mean_dd / (0.5 * (mean_aa + mean_dd) + c1)
    structure = var_d * 0 if one_pixel(axes, dtype) else var_d / (0.5 * (var_a + var_d) + c2)
    loss = structure if structure_only else luminance + structure - luminance * structure
    return loss if weight is None else loss * weight.to(loss.dtype)


def ssim_reference(x: Inputs) -> Tensor:
    """The definition: (weighted) sums of 1 - SSIM, or of one minus its contrast-structure term alone, ``[N, C]``."""
    axes = (Axis(x.window, x.sigma, x.same),) * 2
    loss = ssim_map(x.image, x.image_pred, x.weight, axes, x.c1, x.c2, x.low, x.structure_only)
    return loss.flatten(2).sum(2)
