"""What the smoothness kernels are given, by name, and how sizes go to them.

An image is contiguous or channels_last. A plane is what the kernels walk over at a time: a channel of a contiguous
image; of a channels_last one all the channels of an image, side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import odd_number


class Size(NamedTuple):
    """Of a plane, in pixels."""

    width: int
    height: int
    depth: int  # 1 of images, which have no third dimension
    planes: int  # of each image: its channels; 1 if channels_last
    pixel_stride: int | None  # elements from a pixel to the next, the channels; None if contiguous: 1
    whole: int | None = None  # of numbers as `odd` makes them; 1: the width is a multiple of 16 bytes of the image


class Guide(NamedTuple):
    """An image in order, contiguous or channels_last; of no guide all fields are None. (Triton 3.6 cannot ask whether a
    named tuple with None in it is None.)"""

    ptr: Any = None  # (images, channels, ...)
    channels: int | None = None
    image_stride: int | None = None
    channel_stride: int | None = None
    pixel_stride: int | None = None
    whole: int | None = None  # 1: the strides of images and channels are multiples of 16 bytes of the image


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
    whole: int | None = None  # 1: all strides but x_stride are multiples of 16 bytes of the image


class Image(NamedTuple):
    """What the smoothness is computed of."""

    ptr: Any  # (images, planes, pixels, pixel_stride)
    guide: Guide
    weight: Weight
    size: Size

    def odd(self, wide: bool = True) -> Image:
        """As a kernel takes it, where :func:`image_in` reads it: what changes with the size of an image goes as odd
        numbers, so that another size compiles nothing; and whether they are whole vectors, for `wide` accesses."""
        unit, size = 16 // self.ptr.element_size(), self.size
        return Image(
            self.ptr,
            self.guide if self.guide.ptr is None else odd_guide(self.guide, unit),
            odd_weight(self.weight, unit),
            size._replace(width=odd_number(size.width), height=odd_number(size.height), depth=odd_number(size.depth),
                          whole=_whole((size.width,), unit) if wide else None),
        )  # fmt: skip


def _whole(numbers: Iterable[int], unit: int) -> int | None:
    return None if any(n % unit for n in numbers) else 1


def _odd(fields: Any, names: tuple[str, ...], unit: int) -> Any:
    """The named tuple with odd numbers in these fields, and whether all are multiples of `unit`."""
    numbers = [getattr(fields, name) for name in names]
    return fields._replace(**dict(zip(names, map(odd_number, numbers), strict=True)), whole=_whole(numbers, unit))


def odd_guide(guide: Guide, unit: int) -> Guide:
    """As a kernel takes it, which guide_in reads; `unit`: elements of 16 bytes."""
    return _odd(guide, ("image_stride", "channel_stride"), unit)


def odd_weight(weight: Any, unit: int) -> Any:
    """The same, which weight_in reads; what is none, or Strided of ssim_lanes.py, comes back."""
    if not isinstance(weight, Weight) or weight.ptr is None:
        return weight
    return _odd(weight, ("image_stride", "channel_stride", "z_stride", "y_stride"), unit)


@triton.jit
def _number(odd, whole, UNIT: tl.constexpr):
    """A number in an odd one; of whole vectors the compiler knows that it is."""
    number = number_in(odd)
    if whole is not None:
        number = number // UNIT * UNIT
    return number


@triton.jit
def size_in(odd, UNIT: tl.constexpr):
    width = _number(odd.width, odd.whole, UNIT)
    return Size(width, number_in(odd.height), number_in(odd.depth), odd.planes, odd.pixel_stride, odd.whole)


@triton.jit
def guide_in(odd, UNIT: tl.constexpr):
    if odd.ptr is None:
        return odd
    else:
        image_stride = _number(odd.image_stride, odd.whole, UNIT)
        channel_stride = _number(odd.channel_stride, odd.whole, UNIT)
        return Guide(odd.ptr, odd.channels, image_stride, channel_stride, odd.pixel_stride, odd.whole)


@triton.jit
def weight_in(odd, UNIT: tl.constexpr):
    if odd.ptr is None:
        return odd
    else:
        image_stride = _number(odd.image_stride, odd.whole, UNIT)
        channel_stride = _number(odd.channel_stride, odd.whole, UNIT)
        z_stride, y_stride = _number(odd.z_stride, odd.whole, UNIT), _number(odd.y_stride, odd.whole, UNIT)
        return Weight(odd.ptr, image_stride, channel_stride, z_stride, y_stride, odd.x_stride, odd.whole)


@triton.jit
def image_in(odd):
    UNIT: tl.constexpr = 128 // odd.ptr.dtype.element_ty.primitive_bitwidth
    return Image(odd.ptr, guide_in(odd.guide, UNIT), weight_in(odd.weight, UNIT), size_in(odd.size, UNIT))
