"""The op of SSIM of volumes, with a window of its own along each axis, and of SSIM maps; an image is one slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core import Op, transformed
from .ssim_reference import Axis, ssim_map

LARGEST_WINDOW = 11  # of the kernels; larger ones go to the reference
STREAMED_FROM = 2**22  # pixels from which PyTorch's operators take the volumes piece by piece; and those of a piece


class Inputs(NamedTuple):
    image: Tensor  # [N, C, D, H, W]
    image_pred: Tensor  # [N, C, D, H, W]
    weight: Tensor | None  # of the map: as large, or without the border that "valid" windows leave out
    z_window: int  # pixels, odd
    y_window: int
    x_window: int
    z_sigma: float  # in pixels
    y_sigma: float
    x_sigma: float
    same: bool  # padded to the image's size
    c1: float
    c2: float
    low: float  # the value that images begin at
    structure_only: bool  # without the luminance term
    as_map: bool  # one minus SSIM at every pixel, in place of its sums
    keep: int = 0  # gradients of the sums that the backward is to find: 1 image, 2 image_pred, 3 both, 0 none

    def axes(self) -> tuple[Axis, Axis, Axis]:
        windows, sigmas = (self.z_window, self.y_window, self.x_window), (self.z_sigma, self.y_sigma, self.x_sigma)
        z, y, x = (Axis(window, sigma, self.same) for window, sigma in zip(windows, sigmas, strict=True))
        return z, y, x

    def map_shape(self) -> tuple[int, ...]:
        sides = zip(self.image.shape[2:], self.axes(), strict=True)
        return *self.image.shape[:2], *(side - (0 if self.same else axis.window - 1) for side, axis in sides)


class Saved(NamedTuple):
    kept: Tensor  # gradients of the sums, [one or two, the image's elements]


class Grads(NamedTuple):
    image: Tensor
    image_pred: Tensor


class Needs(NamedTuple):
    image: bool
    image_pred: bool


def _ssim_volume_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    count = (x.keep & 1) + (x.keep >> 1 & 1)
    out = x.image.new_empty(x.map_shape() if x.as_map else x.image.shape[:2], dtype=torch.float32)
    return out, Saved(x.image.new_empty((count, x.image.numel()) if count else (0,), dtype=torch.float32))


def _ssim_volume_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> Grads:
    none = x.image.new_empty(0)
    return Grads(
        image=torch.empty_like(x.image) if needs.image else none,
        image_pred=torch.empty_like(x.image_pred) if needs.image_pred else none,
    )


def _slab(x: Inputs, first: int, last: int) -> Tensor:
    """Slices first .. last of the map, of images whose depth is padded here."""
    z, y, columns = x.axes()
    radius, depth = z.window // 2, x.image.shape[2]
    begin, end = (first - radius, last + radius) if x.same else (first, last + 2 * radius)

    def padded(image: Tensor) -> Tensor:
        image = image[:, :, max(begin, 0) : min(end, depth)]
        if begin >= 0 and end <= depth:
            return image
        return F.pad(image, [0, 0, 0, 0, max(-begin, 0), max(end - depth, 0)], value=x.low)

    weight = None if x.weight is None else x.weight[:, :, first:last]
    axes = (z._replace(same=False), y, columns)
    return ssim_map(padded(x.image), padded(x.image_pred), weight, axes, x.c1, x.c2, x.low, x.structure_only)


def _summed_slab(x: Inputs, first: int, last: int) -> Tensor:
    return _slab(x, first, last).flatten(2).sum(2)


def _whole(x: Inputs) -> Tensor:
    """The map; of one slice, in which only the middle of the window counts along the depth, as that of an image."""
    if x.image.shape[2] > 1 or x.z_window > 1:
        return ssim_map(x.image, x.image_pred, x.weight, x.axes(), x.c1, x.c2, x.low, x.structure_only)
    weight = None if x.weight is None else x.weight[:, :, 0]
    constants = x.c1, x.c2, x.low, x.structure_only
    return ssim_map(x.image[:, :, 0], x.image_pred[:, :, 0], weight, x.axes()[1:], *constants)[:, :, None]


def ssim_volume_reference(x: Inputs) -> Tensor:
    """The definition: the map ``[N, C, D, H, W]`` of one minus SSIM, or its (weighted) sums ``[N, C]``.

    Large volumes are taken slab by slab, each of which the backward computes again: a slab's maps are in memory, not
    those of the volumes.
    """
    if x.image.numel() <= STREAMED_FROM or torch.compiler.is_compiling() or transformed():
        loss = _whole(x)
        return loss if x.as_map else loss.flatten(2).sum(2)
    of_slab = _slab if x.as_map else _summed_slab
    rows = []
    for n in range(x.image.shape[0]):
        one = x._replace(
            image=x.image[n : n + 1], image_pred=x.image_pred[n : n + 1],
            weight=None if x.weight is None else x.weight[n : n + 1],
        )  # fmt: skip
        depth = x.map_shape()[2]
        size = max(1, STREAMED_FROM // max(1, one.image[:, :, 0].numel()))
        pieces = [
            checkpoint(of_slab, one, first, min(first + size, depth), use_reentrant=False)
            for first in range(0, depth, size)
        ]
        rows.append(torch.cat(pieces, 2) if x.as_map else torch.stack(pieces).sum(0))
    return torch.cat(rows)


def _why_not(x: Inputs) -> str | None:
    window = max(x.z_window, x.y_window, x.x_window)
    if window > LARGEST_WINDOW:
        return f"the kernels take windows of up to {LARGEST_WINDOW} pixels, not {window}"
    dtypes = x.image.dtype, x.image_pred.dtype
    return None if len(set(dtypes)) == 1 else f"the kernels take images of one dtype, not {dtypes[0]} and {dtypes[1]}"


_ssim_volume = Op(
    "ssim_volume",
    fwd=_ssim_volume_fwd,
    bwd=_ssim_volume_bwd,
    reference=ssim_volume_reference,
    grads=Grads._fields,
    outputs=("out", *Saved._fields),
    declines=_why_not,
)


def _as_volume(image: Tensor) -> Tensor:
    return image if image.ndim == 5 else image.unsqueeze(2)


def general_ssim(
    image: Tensor, image_pred: Tensor, weight: Tensor | None, axes: Sequence[Axis], constants: tuple[float, ...],
    structure_only: bool, as_map: bool,
) -> Tensor:  # fmt: skip
    """Sums ``[N, C]`` of one minus SSIM, or its map, of images or volumes, by `constants`, c1, c2 and low."""
    keep = int(image.requires_grad) + 2 * int(image_pred.requires_grad) if torch.is_grad_enabled() else 0
    one = Axis(1, 1.0, axes[0].same)
    z, y, x = (one, *axes)[-3:]
    found = _ssim_volume(
        _as_volume(image), _as_volume(image_pred), None if weight is None else _as_volume(weight),
        z.window, y.window, x.window, z.sigma, y.sigma, x.sigma, one.same, *constants, structure_only, as_map,
        0 if as_map else keep,
    )  # fmt: skip
    return found if image.ndim == 5 or not as_map else found.squeeze(2)
