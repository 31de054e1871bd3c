"""What the smoothness kernels are given, by name, and how sizes go to them.

An image is contiguous or channels_last. A plane is what the kernels walk over at a time: a channel of a contiguous
image; of a channels_last one all the channels of an image, side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import odd_number
from ..smoothness import Inputs

MAX_CHANNELS_LAST = 31  # a program adds up each channel by itself; more are copied to be contiguous


class Size(NamedTuple):
    """Of a plane, in pixels."""

    width: int
    height: int
    depth: int  # 1 of images, which have no third dimension
    planes: int  # of each image: its channels; 1 if channels_last
    pixel_stride: int | None  # elements from a pixel to the next, the channels; None if contiguous: 1
    fours: int | None = None  # as `Image.odd` makes it; 1: the width is a multiple of 4, 16 bytes of the image
    eights: int | None = None  # likewise, of 8


class Guide(NamedTuple):
    """An image in order, contiguous or channels_last; of no guide all fields are None. (Triton 3.6 cannot ask whether a
    named tuple with None in it is None.)"""

    ptr: Any = None  # (images, channels, ...)
    channels: int | None = None
    image_stride: int | None = None
    channel_stride: int | None = None
    pixel_stride: int | None = None
    fours: int | None = None  # as in Size, of the strides of images and channels
    eights: int | None = None


class Weight(NamedTuple):
    """A weight of each element of an image, of any strides, hence of any broadcast.

    Where `image_stride` is None, `ptr` are pointers to the first pixels of columns, and the strides of rows and columns
    are all that there is. Of no weight all fields are None.
    """

    ptr: Any = None  # (images, channels, ...)
    image_stride: int | None = None
    channel_stride: int | None = None
    z_stride: int | None = None
    y_stride: int | None = None
    x_stride: int | None = None
    fours: int | None = None  # as in Size, of all strides but x_stride
    eights: int | None = None


class Image(NamedTuple):
    """What the smoothness is computed of."""

    ptr: Any  # (images, planes, pixels, pixel_stride)
    guide: Guide
    weight: Weight
    size: Size

    def odd(self, wide: bool = True) -> Image:
        """As a kernel takes it: what changes with the size of an image goes as odd numbers, so that another size
        compiles nothing; and whether they are whole vectors of 16 bytes, for `wide` accesses."""
        unit = 16 // self.ptr.element_size()
        size = _odd(self.size, ("width",), unit) if wide else self.size._replace(width=odd_number(self.size.width))
        guide = self.guide
        if guide.ptr is not None:
            guide = _odd(guide, ("image_stride", "channel_stride"), unit)
        size = size._replace(height=odd_number(size.height))
        return Image(self.ptr, guide, odd_weight(self.weight, unit), size)


def _odd(fields: Any, names: tuple[str, ...], unit: int) -> Any:
    """The named tuple with odd numbers in these fields, and whether all are multiples of `unit`, 4 or 8 elements."""
    numbers = [getattr(fields, name) for name in names]
    whole = 1 if all(n % unit == 0 for n in numbers) else None
    marks = {"fours": whole if unit == 4 else None, "eights": whole if unit == 8 else None}
    return fields._replace(**dict(zip(names, map(odd_number, numbers), strict=True)), **marks)


def odd_weight(weight: Any, unit: int) -> Any:
    """A weight as a kernel takes it; what is none, or Strided of ssim_lanes.py, comes back."""
    if not isinstance(weight, Weight) or weight.ptr is None:
        return weight
    return _odd(weight, ("image_stride", "channel_stride", "z_stride", "y_stride"), unit)


def in_order(image: Tensor) -> Tensor:
    """`image` itself where it is contiguous or channels_last, else a contiguous copy."""
    last = torch.channels_last if image.ndim == 4 else torch.channels_last_3d
    if not image.is_contiguous() and image.shape[1] <= MAX_CHANNELS_LAST and image.is_contiguous(memory_format=last):
        return image
    return image.contiguous()


def weight_args(weight: Tensor | None) -> Weight:
    if weight is None:
        return Weight()
    *by_image, rows, columns = weight.stride()
    return Weight(weight, *by_image, *[0] * (weight.ndim == 4), rows, columns)  # type: ignore[call-arg]


def size_of(image: Tensor) -> Size:
    """Of an image in order."""
    channels, (*depth, height, width) = image.shape[1], image.shape[2:]
    planes, stride = (channels, None) if image.is_contiguous() else (1, channels)
    return Size(width, height, depth[0] if depth else 1, planes, stride)


def guide_args(guide: Tensor | None) -> Guide:
    if guide is None:
        return Guide()
    guide = in_order(guide)
    return Guide(guide, guide.shape[1], guide.stride(0), guide.stride(1), guide.stride(-1))


def image_args(image: Tensor, x: Inputs) -> Image:
    """The kernels' argument; `image` is the prediction in order."""
    return Image(image, guide_args(x.guide), weight_args(x.weight), size_of(image))


@triton.jit
def multiple_in(odd, of):
    """The number in an odd one, a field of `of`; of whole vectors the compiler is told."""
    number = number_in(odd)
    if of.fours is not None:
        number = number // 4 * 4
    if of.eights is not None:
        number = number // 8 * 8
    return number


@triton.jit
def width_of(size):
    return multiple_in(size.width, size)


@triton.jit
def height_of(size):
    return number_in(size.height)
