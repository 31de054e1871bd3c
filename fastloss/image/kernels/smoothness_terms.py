"""What a difference of neighbouring pixels adds to the smoothness loss, and its gradient: for kernels that walk over an
image in any way. The formulas stand in smoothness.py, the named tuples in smoothness_arguments.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...core.kernels.device_math import sign, weighted
from .smoothness_arguments import height_of, multiple_in, width_of


class Pixels(NamedTuple):
    """Elements of a plane."""

    offset: Any  # of the elements, from the plane's first
    index: Any  # of their pixels, from the plane's first
    x: Any
    y: Any
    z: Any
    channel: Any


@triton.jit
def pixel_stride(size):
    """Elements from a pixel to the next."""
    if size.pixel_stride is None:
        return 1
    else:
        return size.pixel_stride


@triton.jit
def start_of(plane, size):
    """Where a plane begins; factor by factor, for the elements of a plane alone may not fit 32 bits."""
    return plane * width_of(size) * height_of(size) * size.depth * pixel_stride(size)


@triton.jit
def tile_of(plane, row, column, size, AXES: tl.constexpr, WIDE: tl.constexpr):
    """The elements in rows and columns of a plane (a column: a channel of a pixel, if channels_last), as `Pixels`, and
    whether they are there.

    Only rows and columns are divided, never each element; what depends on one of them is made once for all the others.
    """
    row, column = row[:, None], column[None, :]
    inside = (row < height_of(size) * size.depth) & (column < width_of(size) * pixel_stride(size))
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    x, y, z = column // pixel_stride(size), row, 0
    if AXES == 3:
        y, z = row % height_of(size), row // height_of(size)
    if size.pixel_stride is None:
        channel = plane % size.planes
    else:
        channel = column % size.pixel_stride
    offset = row * (width_of(size) * pixel_stride(size)) + column
    return Pixels(offset, row * width_of(size) + x, x, y, z, channel), inside


@triton.jit
def _pixels_to_next(size, AXIS: tl.constexpr):
    """How many pixels a step along an axis is (0: x, 1: y, 2: z)."""
    if AXIS == 0:
        return 1
    elif AXIS == 1:
        return width_of(size)
    else:
        return width_of(size) * height_of(size)


@triton.jit
def _coordinate(pixels, AXIS: tl.constexpr):
    if AXIS == 0:
        return pixels.x
    elif AXIS == 1:
        return pixels.y
    else:
        return pixels.z


@triton.jit
def _length(size, AXIS: tl.constexpr):
    if AXIS == 0:
        return width_of(size)
    elif AXIS == 1:
        return height_of(size)
    else:
        return size.depth


@triton.jit
def _stride(weight, AXIS: tl.constexpr):
    if AXIS == 0:
        return weight.x_stride
    elif AXIS == 1:
        return multiple_in(weight.y_stride, weight)
    else:
        return multiple_in(weight.z_stride, weight)


@triton.jit
def _has(pixels, size, AXIS: tl.constexpr, SHIFT: tl.constexpr, ORDER: tl.constexpr):
    """Whether the pixel SHIFT steps along an axis is there and has a difference along it."""
    coordinate = _coordinate(pixels, AXIS) + SHIFT
    return (coordinate >= ORDER - 1) & (coordinate + 1 < _length(size, AXIS))


@triton.jit
def _edge(guide, image, pixel, step, mask, ORDER: tl.constexpr):
    """exp(-mean_c |dI|) of the guide's differences from `pixel` to the one `step` pixels on (ORDER 2: from as far
    before it)."""
    total = tl.zeros(pixel.shape, tl.float32)
    start = pixel - step if ORDER == 2 else pixel
    for c in range(guide.channels):
        ptr = guide.ptr + image * multiple_in(guide.image_stride, guide)
        ptr += c * multiple_in(guide.channel_stride, guide)
        end = tl.load(ptr + (pixel + step) * guide.pixel_stride, mask=mask, other=0.0).to(tl.float32)
        total += tl.abs(end - tl.load(ptr + start * guide.pixel_stride, mask=mask, other=0.0).to(tl.float32))
    return tl.exp(total / -guide.channels)


@triton.jit
def _edge_factor(
    image, plane, pixels, mask, AXIS: tl.constexpr, ALONG: tl.constexpr, SHIFT: tl.constexpr, ORDER: tl.constexpr
):
    """The factor e of the difference along ALONG of the pixel SHIFT steps along AXIS; 0 where `mask` is not set."""
    pixel, step = pixels.index + SHIFT * _pixels_to_next(image.size, AXIS), _pixels_to_next(image.size, ALONG)
    e = _edge(image.guide, plane // image.size.planes, pixel, step, mask, ORDER)
    return tl.where(mask, e, 0.0)


@triton.jit
def edges_of(image, plane, pixels, inside, ORDER: tl.constexpr, AXES: tl.constexpr, BACKWARD: tl.constexpr):
    """The factors of the differences that belong to pixels, along x, y and z; for the BACKWARD, of all the differences
    that a pixel is in: from -1 to ORDER - 1 steps along x, then along y and z. The channels of an image have them in
    common."""
    found = ()
    for axis in tl.static_range(AXES):
        for k in tl.static_range(ORDER + 1 if BACKWARD else 1):
            has = inside & _has(pixels, image.size, axis, k - 1 if BACKWARD else 0, ORDER)
            e = _edge_factor(image, plane, pixels, has, axis, axis, k - 1 if BACKWARD else 0, ORDER)
            found = found + (e,)  # type: ignore[assignment]
    return found


@triton.jit
def _read(ptr, shift, mask, other):
    return tl.load(ptr + shift, mask=mask, other=other).to(tl.float32)


@triton.jit
def _difference(
    image, plane, pixels, inside, mask,
    AXIS: tl.constexpr, ALONG: tl.constexpr, SHIFT: tl.constexpr, ORDER: tl.constexpr, FILL: tl.constexpr = False,
    edge=None,
):  # fmt: skip
    """Differences along ALONG of the pixels SHIFT steps along AXIS, and their factors e; 0 where `mask` is not set.

    `edge`: those factors, where the caller has them.

    FILL, which needs AXIS == ALONG: a neighbour that is not there is taken to be equal, which saves a selection for
    each difference; but NaN instead of 0 beside an infinity.
    """
    stride = pixel_stride(image.size)
    shifted, step = SHIFT * _pixels_to_next(image.size, AXIS), _pixels_to_next(image.size, ALONG)
    ptr = image.ptr + start_of(plane, image.size) + pixels.offset
    # the elements themselves are read under one mask, hence once for all the differences, and in whole vectors
    value = tl.load(ptr, mask=inside, other=0.0)
    other = value if FILL else 0.0
    value = value.to(tl.float32)
    here = value if SHIFT == 0 else _read(ptr, shifted * stride, mask, other)
    if SHIFT == -1 and AXIS == ALONG:
        d = value - here
    else:
        d = _read(ptr, (shifted + step) * stride, mask, other) - here
    if ORDER == 2:
        if SHIFT == 1 and AXIS == ALONG:
            d -= here - value
        else:
            d -= here - _read(ptr, (shifted - step) * stride, mask, other)
    if not FILL:
        d = tl.where(mask, d, 0.0)
    if edge is not None:
        return d, edge
    elif image.guide.ptr is None:
        return d, 1.0
    else:
        return d, _edge_factor(image, plane, pixels, mask, AXIS, ALONG, SHIFT, ORDER)


@triton.jit
def weight_at(weight, plane, pixels, size, mask, AXIS: tl.constexpr, SHIFT: tl.constexpr):
    """Weights of the pixels SHIFT steps along an axis, as float32."""
    if weight.image_stride is None:
        ptr = weight.ptr + pixels.y * _stride(weight, 1)
    else:
        ptr = weight.ptr + plane // size.planes * multiple_in(weight.image_stride, weight)
        ptr += pixels.channel * multiple_in(weight.channel_stride, weight) + pixels.z * _stride(weight, 2)
        ptr += pixels.y * _stride(weight, 1) + pixels.x * weight.x_stride
    return tl.load(ptr + SHIFT * _stride(weight, AXIS), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _grad_difference(
    image, plane, pixels, inside,
    AXIS: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr, edges=None,
):  # fmt: skip
    """The gradient of the sum by the difference along an axis that belongs to the pixel SHIFT steps along it; 0 if
    there is none."""
    mask = inside & _has(pixels, image.size, AXIS, SHIFT, ORDER)
    w = 1.0
    if image.weight.ptr is not None:
        w = weight_at(image.weight, plane, pixels, image.size, mask, AXIS, SHIFT)
    fill: tl.constexpr = KIND == "l1"  # the sign of NaN is 0
    edge = None if edges is None else edges[AXIS * (ORDER + 1) + SHIFT + 1]
    d, e = _difference(image, plane, pixels, inside, mask, AXIS, AXIS, SHIFT, ORDER, fill, edge)
    if KIND == "isotropic":
        squares = d * e * d * e
        for other in tl.static_range(AXES):
            if other != AXIS:
                has = mask & _has(pixels, image.size, other, 0, ORDER)
                f, h = _difference(image, plane, pixels, inside, has, AXIS, other, SHIFT, ORDER)
                squares += f * h * f * h
        root = tl.where(squares < 1.1754944e-38, 0.0, tl.rsqrt(squares))  # rsqrt takes subnormals for 0
        grad = e * e * d * root
    elif KIND == "l1":
        grad = e * sign(d)
    else:
        grad = e * 2.0 * d
    return grad if image.weight.ptr is None else weighted(grad, w)


@triton.jit
def smoothness_terms(
    image, plane, pixels, inside, KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr, edges=None
):
    """What elements add to the sums: along x, y and z, or one number if isotropic; 0 where `inside` is not set.

    `edges`: of edges_of, or None; not for isotropic.
    """
    w = 1.0
    if image.weight.ptr is not None:
        w = weight_at(image.weight, plane, pixels, image.size, inside, 0, 0)
    terms = ()
    squares = tl.zeros(pixels.offset.shape, tl.float32)
    for axis in tl.static_range(AXES):
        has = inside & _has(pixels, image.size, axis, 0, ORDER)
        edge = None if edges is None else edges[axis]
        d, e = _difference(image, plane, pixels, inside, has, axis, axis, 0, ORDER, False, edge)
        if KIND == "isotropic":
            squares += d * e * d * e
        else:
            term = (tl.abs(d) if KIND == "l1" else d * d) * e
            terms = terms + (term if image.weight.ptr is None else weighted(term, w),)  # type: ignore[assignment]
    if KIND == "isotropic":
        term = tl.sqrt(squares)
        terms = (term if image.weight.ptr is None else weighted(term, w),)  # type: ignore[assignment]
    return terms


@triton.jit
def smoothness_grad(
    image, plane, pixels, inside, AXIS: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr,
    edges=None,
):  # fmt: skip
    """The gradient of elements along an axis, per gradient of its sum. `edges`: of edges_of, BACKWARD, or None."""
    before = _grad_difference(image, plane, pixels, inside, AXIS, -1, KIND, ORDER, AXES, edges)
    here = _grad_difference(image, plane, pixels, inside, AXIS, 0, KIND, ORDER, AXES, edges)
    grad = before - here
    if ORDER == 2:
        grad -= here - _grad_difference(image, plane, pixels, inside, AXIS, 1, KIND, ORDER, AXES, edges)
    return grad
