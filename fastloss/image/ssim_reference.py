"""SSIM by definition: the sums that the kernels make, in torch."""

from __future__ import annotations

import math
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


def one_pixel(window: int, sigma: float, dtype: torch.dtype = torch.float32) -> bool:
    """Whether nothing but its middle counts in the window: its variances are 0, exactly."""
    return window == 1 or sigma < ONE_PIXEL[dtype]


def _gaussian(window: int, sigma: float, like: Tensor) -> Tensor:
    """The window's taps, rounded once, made on the device: a copy from the host would wait and break CUDA graphs."""
    exact = torch.float32 if like.device.type == "mps" else torch.float64  # mps has no float64
    x = (torch.arange(window, device=like.device, dtype=exact) - window // 2) / sigma
    g = torch.exp(x * x / -2)
    return (g / g.sum()).to(like.dtype)


def _shift(samples: list[Tensor], c2: float) -> Tensor:
    """Of each plane, the sample nearest to 0, so that no single pixel can cost the others their digits; or 0."""
    values = torch.stack(samples).detach()
    sizes = values.abs()
    sizes = torch.where(sizes < math.inf, sizes, math.inf)  # NaN too
    least, index = sizes.min(0, keepdim=True)
    used = (least < math.inf) & (least * least > SHIFT_FROM * c2)
    return torch.where(used, values.gather(0, index), 0.0)[0, :, :, None, None]


def _shifts(x: Tensor, y: Tensor, c2: float) -> tuple[Tensor, Tensor]:
    """What is subtracted from x + y and x - y before they are squared, for each plane: by four of its pixels."""
    height, width = x.shape[2:]
    at = [(r * height // 4, c * width // 4) for r in (1, 3) for c in (1, 3)]
    xs, ys = ([t[:, :, r, c] for r, c in at] for t in (x, y))
    return (
        _shift([a + b for a, b in zip(xs, ys, strict=True)], c2),
        _shift([a - b for a, b in zip(xs, ys, strict=True)], c2),
    )


def _outside(size: int, g: Tensor) -> Tensor:
    """How much of a window lies outside the image, for each position along a side."""
    pixels = torch.arange(size, device=g.device)[:, None] + torch.arange(len(g), device=g.device) - len(g) // 2
    return torch.where((pixels < 0) | (pixels >= size), g, 0.0).sum(1)


def _seen(weight: Tensor, window: int, same: bool) -> Tensor:
    """The pixels that a window of non-zero weight sees."""
    counted = (weight != 0).to(torch.float32)
    reach = window // 2 if same else window - 1
    counted = F.max_pool2d(F.pad(counted, (0, 0, reach, reach)), (window, 1), 1)
    return F.max_pool2d(F.pad(counted, (reach, reach)), (1, window), 1) > 0


def _moments(a: Tensor, d: Tensor, rest_a: Tensor, rest_d: Tensor, g: Tensor, same: bool) -> tuple[Tensor, ...]:
    """G a, G d, G a^2, G d^2; outside the image a is -rest_a, and d is -rest_d."""
    channels = 4 * a.shape[1]  # all four moments as channels: at least 4 groups, which CUDA never gives to TF32
    pad = len(g) // 2 if same else 0
    with full_precision(a):  # a half-precision convolution would lose the variances
        moments = torch.cat([a, d, a * a, d * d], 1)
        moments = F.conv2d(moments, g.view(1, 1, -1, 1).expand(channels, 1, -1, 1), padding=(pad, 0), groups=channels)
        moments = F.conv2d(moments, g.view(1, 1, 1, -1).expand(channels, 1, 1, -1), padding=(0, pad), groups=channels)
    mean_a, mean_d, square_a, square_d = moments.chunk(4, 1)
    if not same:
        return mean_a, mean_d, square_a, square_d
    rows, columns = _outside(a.shape[2], g)[:, None], _outside(a.shape[3], g)
    out = rows + columns - rows * columns
    return (
        mean_a - rest_a * out,
        mean_d - rest_d * out,
        square_a + rest_a * rest_a * out,
        square_d + rest_d * rest_d * out,
    )


def ssim_distances(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """One minus the luminance and one minus the contrast-structure map, in float32 (float64 for float64).

    Four moments do: means and variances of a = x + y and d = x - y, for mx^2 + my^2 = (ma^2 + md^2) / 2 and
    2 mx my = (ma^2 - md^2) / 2, and likewise for the variances. So nothing cancels where the images are close; what
    images far from 0 have in common is subtracted before it is squared, and added to the means again.
    """
    weight, window, sigma, same = inputs.weight, inputs.window, inputs.sigma, inputs.same
    c1, c2 = inputs.c1, inputs.c2
    dtype = result_dtype(inputs.image, inputs.image_pred)
    x, y = inputs.image.to(dtype), inputs.image_pred.to(dtype)
    shift_a, shift_d = _shifts(x, y, c2)
    if weight is not None:  # NaN where no weight is must not reach a gradient
        seen = _seen(weight, window, same)
        x, y = (torch.where(seen, t, 0.0) for t in (x, y))
    a, d = (x - shift_a) + y, (x - y) - shift_d
    rest_a = shift_a - 2 * inputs.low
    moments = _moments(a, d, rest_a, shift_d, _gaussian(window, sigma, x), same)
    if weight is not None:
        moments = tuple(torch.where(weight == 0, 0.0, m) for m in moments)
    mean_a, mean_d, square_a, square_d = moments
    var_a, var_d = square_a - mean_a * mean_a, square_d - mean_d * mean_d
    mean_a, mean_d = mean_a + rest_a, mean_d + shift_d
    mean_aa, mean_dd = mean_a * mean_a, mean_d * mean_d
    luminance = mean_dd / (0.5 * (mean_aa + mean_dd) + c1)
    if one_pixel(window, sigma, dtype):
        return luminance, var_d * 0
    return luminance, var_d / (0.5 * (var_a + var_d) + c2)


def ssim_reference(inputs: Inputs) -> Tensor:
    """The definition: (weighted) sums of 1 - SSIM, or of one minus its contrast-structure term alone, ``[N, C]``."""
    luminance, structure = ssim_distances(inputs)
    loss = structure if inputs.structure_only else luminance + structure - luminance * structure
    if inputs.weight is not None:
        loss = loss * inputs.weight.to(loss.dtype)
    return loss.flatten(2).sum(2)
