"""Lanes of a sweep, as ssim_sweep.py walks them: one column of a plane or two adjacent ones, `Window.columns`.

Two are read and written as one number of twice the bits, which lie aligned, so that a window of 12 columns is six loads
and serves both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import odd_number


class Strided(NamedTuple):
    """A tensor of any strides."""

    ptr: Any  # (images, channels, height, width)
    image_stride: int | None
    channel_stride: int | None
    row_stride: int | None
    column_stride: int | None

    def odd(self) -> Strided:
        """As a kernel takes it: strides that change with the size of an image go as odd numbers, so that another size
        compiles nothing. A lane reads one number at a time, so that it does not matter what they are multiples of."""
        names = ("image_stride", "channel_stride", "row_stride")
        return self._replace(**{name: odd_number(getattr(self, name)) for name in names})


@triton.jit
def strided_in(odd):
    """What :meth:`Strided.odd` was made of."""
    image_stride, channel_stride = number_in(odd.image_stride), number_in(odd.channel_stride)
    return Strided(odd.ptr, image_stride, channel_stride, number_in(odd.row_stride), odd.column_stride)


class Plane(NamedTuple):
    """A plane of an image."""

    ptr: Any  # (height, width), to the first pixel; in each lane its own
    row_stride: int
    column_stride: int


class Window(NamedTuple):
    """How a sweep reads windows, as a constant of the kernel."""

    radius: int  # a window has 2 radius + 1 rows and columns
    margin: int  # rows and columns of an image before those of the map: 0, or the radius
    columns: int  # of a lane
    pixel_stride: int  # elements from a column to the next: 1, or the channels


@triton.jit
def lane_of(channels, width, lanes, WINDOW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(first element of a lane, image, channel, column).

    `lanes` and `width` are in elements. In a lane past the end the column is one that no image has.
    """
    STRIDE: tl.constexpr = WINDOW.pixel_stride
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    lane = (program * BLOCK + tl.arange(0, BLOCK)) * WINDOW.columns
    if STRIDE > 1:
        channel, column, image = lane % STRIDE, lane // STRIDE % width, lane // STRIDE // width
    else:
        column, channel, image = lane % width, lane // width % channels, lane // width // channels
    return lane, image.to(tl.int64), channel, tl.where(lane < lanes, column, 1 << 30).to(tl.int32)


@triton.jit
def map_lane_of(lane, width, WINDOW: tl.constexpr):
    """The element of the same column in the map, which has `margin` columns less on either side."""
    STRIDE: tl.constexpr = WINDOW.pixel_stride
    return lane - (lane // (width * STRIDE) * 2 + 1) * WINDOW.margin * STRIDE


@triton.jit
def at_column(tensor, image, channel, column):
    """Where a lane's column begins in a `Strided` tensor."""
    ptr = tensor.ptr + image * tensor.image_stride + channel.to(tl.int64) * tensor.channel_stride
    return ptr + column.to(tl.int64) * tensor.column_stride


@triton.jit
def load_lane(ptr, inside, COLUMNS: tl.constexpr, low=None):
    """The elements of a lane as float32, `low` outside, or zeros."""
    values = _load_lane(ptr, inside, COLUMNS)
    if low is None:
        return values
    elif COLUMNS == 1:
        (value,) = values
        return (tl.where(inside, value, low),)
    else:
        left, right = values
        return tl.where(inside, left, low), tl.where(inside, right, low)


@triton.jit
def _load_lane(ptr, inside, COLUMNS: tl.constexpr):
    kind: tl.constexpr = ptr.dtype.element_ty
    if COLUMNS == 1:
        return (tl.load(ptr, mask=inside, other=0.0).to(tl.float32),)
    elif kind.primitive_bitwidth == 32:
        bits = tl.load(ptr.to(tl.pointer_type(tl.int64), bitcast=True), mask=inside, other=0)
        left, right = bits.to(tl.int32), (bits >> 32).to(tl.int32)
        return left.to(tl.float32, bitcast=True), right.to(tl.float32, bitcast=True)
    else:
        bits = tl.load(ptr.to(tl.pointer_type(tl.int32), bitcast=True), mask=inside, other=0)
        left, right = bits.to(tl.int16).to(kind, bitcast=True), (bits >> 16).to(tl.int16).to(kind, bitcast=True)
        return left.to(tl.float32), right.to(tl.float32)


@triton.jit
def store_lane(ptr, values, inside, COLUMNS: tl.constexpr):
    kind: tl.constexpr = ptr.dtype.element_ty
    if COLUMNS == 1:
        (value,) = values
        tl.store(ptr, value.to(kind), mask=inside)
    elif kind.primitive_bitwidth == 32:
        left, right = values
        left, right = left.to(tl.int32, bitcast=True).to(tl.int64), right.to(tl.int32, bitcast=True).to(tl.int64)
        bits = (left & 0xFFFFFFFF) | (right << 32)
        tl.store(ptr.to(tl.pointer_type(tl.int64), bitcast=True), bits, mask=inside)
    else:
        left, right = values
        left, right = left.to(kind).to(tl.int16, bitcast=True), right.to(kind).to(tl.int16, bitcast=True)
        bits = (left.to(tl.int32) & 0xFFFF) | (right.to(tl.int32) << 16)
        tl.store(ptr.to(tl.pointer_type(tl.int32), bitcast=True), bits, mask=inside)
