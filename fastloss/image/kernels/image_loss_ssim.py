"""The sweeps of ssim.py with the pixel and smoothness losses along: one pass over the image pair each way.

A lane walks down a column, see there. Of every pixel of its stretch of rows it also takes what the other losses have:
they read the pixel and its neighbours again, which the L1 cache still has. Both images lie alike in memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...core.kernels.device_math import added, number_in, weighted, zeros
from ...core.kernels.launch import odd_number
from .pixel import distance, slope
from .smoothness_arguments import Image, Weight, height_of, width_of
from .smoothness_terms import Pixels, pixel_stride, smoothness_grad, smoothness_terms, start_of, weight_at
from .ssim_lanes import Plane, at_column, lane_of, map_lane_of, strided_in
from .ssim_sweep import (
    Moments,
    Partials,
    Shift,
    counted,
    ends,
    finite,
    map_loss,
    next_filtered,
    next_moments,
    nothing,
    partial_ends,
    shift_of,
    shifted,
    window,
)


class Target(NamedTuple):
    """What the pixel loss takes beside the prediction."""

    ptr: Any  # the target, (images, planes, pixels, pixel_stride), in memory as the prediction
    weight: Any  # Weight of smoothness_arguments.py, or in sweeps Strided of ssim_lanes.py
    parameter: float


class Parts(NamedTuple):
    """Which losses are on, as a constant of the kernel."""

    pixel: str  # empty: off
    smoothness: str  # empty: off
    order: int
    axes: int
    smoothness_sums: int  # one along each axis, or one if isotropic


class Grid(NamedTuple):
    """What the programs of a sweep go over."""

    channels: int
    lanes: int  # elements of a row of all planes
    map_lanes: int  # and of the map
    rows: int  # of the images, that a program takes

    def odd(self) -> Grid:
        """As a kernel takes it: see Strided of ssim_lanes.py."""
        return Grid(self.channels, *map(odd_number, self[1:]))


@triton.jit
def grid_in(odd):
    return Grid(odd.channels, number_in(odd.lanes), number_in(odd.map_lanes), number_in(odd.rows))


@triton.jit
def pixel_losses(d, target, plane, pixels, size, inside, KIND: tl.constexpr):
    """The pixel loss of elements whose difference is d; 0 where `inside` is not set."""
    loss = distance(d, target.parameter, KIND)
    if target.weight.ptr is not None:
        loss = weighted(loss, weight_at(target.weight, plane, pixels, size, inside, 0, 0))
    return tl.where(inside, loss, 0.0)


@triton.jit
def _plane_of(image, channel, column, size, channels, WIDE: tl.constexpr):
    """Of lanes: the plane's number (as in smoothness_terms.py), the offset of their column's first pixel in it."""
    if size.pixel_stride is None:
        plane, start = image * channels + channel, column
    else:
        plane, start = image, column * size.pixel_stride + channel
    if WIDE:
        return plane, start.to(tl.int64)
    else:
        return plane.to(tl.int32), start.to(tl.int32)


@triton.jit
def _pixels_of_row(column, row, start, size):
    """The pixels of a row, as smoothness_terms.py has them; the channel is known from the plane or from `start`."""
    return Pixels(row * (width_of(size) * pixel_stride(size)) + start, row * width_of(size) + column, column, row, 0, 0)


@triton.jit
def _shift(x_ptr, y_ptr, start, column, size, inside, c2, WINDOW: tl.constexpr):
    """The shift of a plane, whose pixels begin where column 0 does."""
    STRIDE: tl.constexpr = WINDOW.pixel_stride
    first = tl.where(inside, start - column * STRIDE, 0)
    x = Plane(x_ptr + first, width_of(size) * STRIDE, STRIDE)
    y = Plane(y_ptr + first, width_of(size) * STRIDE, STRIDE)
    return shift_of(x, y, height_of(size), width_of(size), inside, c2)


@triton.jit
def _store_sums(out_ptr, pixel_sum, smoothness_sums, ssim_sum, PARTS: tl.constexpr):
    """A program's sums."""
    OUTS: tl.constexpr = PARTS.smoothness_sums
    programs = tl.num_programs(0) * tl.num_programs(1)
    out_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out_ptr, tl.sum(pixel_sum))
    for axis in tl.static_range(OUTS):
        tl.store(out_ptr + (OUTS - axis) * programs, tl.sum(smoothness_sums[axis]))
    tl.store(out_ptr + (OUTS + 1) * programs, tl.sum(ssim_sum))


@triton.jit
def _map_row(moments, rest, weight, w_ptr, partial_ptr, map_row, map_stride, in_map, constants, FORM: tl.constexpr):
    """SSIM's part of a row of the map, weighted, whose partials are stored."""
    w, taken = (1.0,), moments
    if weight is not None:
        row_ptr = w_ptr + tl.cast(map_row, tl.int64) * number_in(weight.row_stride)
        w = (tl.load(row_ptr, mask=in_map, other=0.0).to(tl.float32),)
        taken = counted(moments, w)
    return tl.where(in_map, map_loss(taken, rest, w, partial_ptr, map_stride, in_map, constants, FORM), 0.0)


@triton.jit
def image_ssim_fwd_kernel(
    target,  # Target, whose weight is Strided
    pred,  # smoothness_arguments.Image, whose weight is Strided
    map_weight,  # Strided: (images, channels, height - 2 margin, width - 2 margin); or None
    out_ptr,  # (sums, programs) float32: pixel, smoothness along z, y and x (or one number), SSIM
    partials_ptr,  # (maps, height - 2 margin, lanes of the map) float32, see ssim.py
    grid,  # Grid
    constants,  # Constants, see ssim_sweep.py
    FORM: tl.constexpr,  # see ssim_sweep.py
    PARTS: tl.constexpr,  # Parts
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WINDOW: tl.constexpr = FORM.window
    RADIUS: tl.constexpr = WINDOW.radius
    MARGIN: tl.constexpr = WINDOW.margin
    STRIDE: tl.constexpr = WINDOW.pixel_stride
    OUTS: tl.constexpr = PARTS.smoothness_sums
    PIXEL: tl.constexpr = PARTS.pixel
    SMOOTHNESS: tl.constexpr = PARTS.smoothness
    size, grid = pred.size, grid_in(grid)
    width, height = width_of(size), height_of(size)
    lane, image, channel, column = lane_of(grid.channels, width, grid.lanes, WINDOW, WIDE, BLOCK)
    plane, start = _plane_of(image, channel, column, size, grid.channels, WIDE)
    x_ptr, y_ptr = target.ptr + start_of(plane, size), pred.ptr + start_of(plane, size)
    if target.weight.ptr is not None:
        w = target.weight  # whose strides stay odd, as in a Weight
        ptr = at_column(strided_in(w), image, channel, column)
        target = Target(
            target.ptr, Weight(ptr, None, None, None, w.row_stride, w.column_stride, None, None), target.parameter
        )
    if pred.weight.ptr is not None:
        w = pred.weight
        ptr = at_column(strided_in(w), image, channel, column)
        pred = Image(
            pred.ptr, pred.guide, Weight(ptr, None, None, None, w.row_stride, w.column_stride, None, None), size
        )
    inside = column < width
    shift = _shift(x_ptr, y_ptr, start, column, size, inside, constants.c2, WINDOW)
    rest = shift
    if constants.low is not None:
        rest = Shift(shift.a - 2.0 * constants.low, shift.d)
    in_map = (column - MARGIN).to(tl.uint32) < tl.cast(width - 2 * MARGIN, tl.uint32)
    map_lane = map_lane_of(lane, width, WINDOW)
    map_stride = tl.cast(height - 2 * MARGIN, tl.int64) * grid.map_lanes
    w_ptr = None if map_weight is None else at_column(strided_in(map_weight), image, channel, column - MARGIN)
    none = nothing(WINDOW, BLOCK)
    moving = Moments(none, none, none, none)
    pixel_sum, ssim_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    sums = zeros(OUTS, BLOCK)
    first = tl.program_id(1) * grid.rows
    last = tl.minimum(first + grid.rows, height)
    row_start = (tl.cast(first - RADIUS, tl.int64) if WIDE else first - RADIUS) * width * STRIDE + start
    x_row, y_row = x_ptr + row_start, y_ptr + row_start
    bound = tl.where(first >= RADIUS, width, 0).to(tl.uint32)
    x_ends = ends(x_row, column, bound, STRIDE, WINDOW, constants.low)
    y_ends = ends(y_row, column, bound, STRIDE, WINDOW, constants.low)
    for row in range(first - RADIUS, last + RADIUS):
        x_outer, y_outer, within = x_ends, y_ends, bound
        bound = tl.where((row >= -1) & (row + 1 < height), width, 0).to(tl.uint32)
        x_ends = ends(x_row + width * STRIDE, column, bound, STRIDE, WINDOW, constants.low)
        y_ends = ends(y_row + width * STRIDE, column, bound, STRIDE, WINDOW, constants.low)
        x_window = window(x_row, column, within, x_outer, STRIDE, WINDOW, constants.low)
        y_window = window(y_row, column, within, y_outer, STRIDE, WINDOW, constants.low)
        moments, moving = next_moments(moving, x_window, y_window, shift, constants.taps, WINDOW)
        x_row += width * STRIDE
        y_row += width * STRIDE
        done = row - RADIUS  # the row whose windows this one completes
        if done >= first:
            pixels = _pixels_of_row(column, tl.cast(done, tl.int64) if WIDE else done, start, size)
            if PIXEL != "":
                x = tl.load(x_ptr + pixels.offset, mask=inside, other=0.0).to(tl.float32)
                y = tl.load(y_ptr + pixels.offset, mask=inside, other=0.0).to(tl.float32)
                pixel_sum += pixel_losses(y - x, target, plane, pixels, size, inside, PIXEL)
            if SMOOTHNESS != "":
                terms = smoothness_terms(pred, plane, pixels, inside, SMOOTHNESS, PARTS.order, PARTS.axes)
                sums = added(sums, terms)
            if (done >= MARGIN) & (done < height - MARGIN):
                partial_ptr = partials_ptr + tl.cast(done - MARGIN, tl.int64) * grid.map_lanes + map_lane
                ssim_sum += _map_row(
                    moments, rest, map_weight, w_ptr, partial_ptr, done - MARGIN, map_stride, in_map, constants, FORM
                )
    _store_sums(out_ptr, pixel_sum, sums, ssim_sum, PARTS)


@triton.jit
def _ssim_grads(x, y, shift, filtered, FORM: tl.constexpr):
    """SSIM's gradients of the target and of the prediction, from the filtered partials of a lane's one column."""
    for j in tl.static_range(1):
        a, d = shifted((x,), (y,), shift)
        if FORM.weighted:  # NaN that no weight sees has partials of 0; where one does, they are NaN
            a, d = finite(a), finite(d)
        by_a, by_d = 2.0 * a[j] * filtered.aa[j], 2.0 * d[j] * filtered.dd[j]
        x_grad, y_grad = filtered.x[j] + by_a + by_d, filtered.y[j] + by_a - by_d
    return x_grad, y_grad


@triton.jit
def image_ssim_bwd_kernel(
    grad_ptr,  # (sums,) float32
    target,  # as in the forward
    pred,  # as in the forward
    x_grad_ptr,  # (images, planes, pixels, pixel_stride) or None
    y_grad_ptr,  # the same
    partials_ptr,  # (maps, height - 2 margin, lanes of the map) float32, see ssim.py
    grid,  # Grid
    constants,  # Constants, see ssim_sweep.py
    FORM: tl.constexpr,  # see ssim_sweep.py
    PARTS: tl.constexpr,  # Parts
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WINDOW: tl.constexpr = FORM.window
    RADIUS: tl.constexpr = WINDOW.radius
    MARGIN: tl.constexpr = WINDOW.margin
    OUTS: tl.constexpr = PARTS.smoothness_sums
    AXES: tl.constexpr = PARTS.axes
    PIXEL: tl.constexpr = PARTS.pixel
    SMOOTHNESS: tl.constexpr = PARTS.smoothness
    size, grid = pred.size, grid_in(grid)
    width, height = width_of(size), height_of(size)
    lane, image, channel, column = lane_of(grid.channels, width, grid.lanes, WINDOW, WIDE, BLOCK)
    plane, start = _plane_of(image, channel, column, size, grid.channels, WIDE)
    x_ptr, y_ptr = target.ptr + start_of(plane, size), pred.ptr + start_of(plane, size)
    if target.weight.ptr is not None:
        w = target.weight  # whose strides stay odd, as in a Weight
        ptr = at_column(strided_in(w), image, channel, column)
        target = Target(
            target.ptr, Weight(ptr, None, None, None, w.row_stride, w.column_stride, None, None), target.parameter
        )
    if pred.weight.ptr is not None:
        w = pred.weight
        ptr = at_column(strided_in(w), image, channel, column)
        pred = Image(
            pred.ptr, pred.guide, Weight(ptr, None, None, None, w.row_stride, w.column_stride, None, None), size
        )
    inside = column < width
    shift = _shift(x_ptr, y_ptr, start, column, size, inside, constants.c2, WINDOW)
    map_stride = tl.cast(height - 2 * MARGIN, tl.int64) * grid.map_lanes
    none = nothing(WINDOW, BLOCK)
    moving = Partials(none, none, none, none)
    ssim_grad = tl.load(grad_ptr + OUTS + 1)
    first = tl.program_id(1) * grid.rows
    last = tl.minimum(first + grid.rows, height)
    map_column = column - MARGIN
    map_offset = tl.cast(first - RADIUS - MARGIN, tl.int64) * grid.map_lanes + map_lane_of(lane, width, WINDOW)
    map_ptr = partials_ptr + map_offset
    bound = tl.where(first - RADIUS >= MARGIN, width - 2 * MARGIN, 0).to(tl.uint32)
    following = partial_ends(map_ptr, map_stride, map_column, bound, FORM)
    for row in range(first - RADIUS, last + RADIUS):
        outer, within = following, bound
        bound = tl.where((row + 1 >= MARGIN) & (row + 1 < height - MARGIN), width - 2 * MARGIN, 0).to(tl.uint32)
        following = partial_ends(map_ptr + grid.map_lanes, map_stride, map_column, bound, FORM)
        filtered, moving = next_filtered(moving, map_ptr, map_stride, map_column, within, outer, constants.taps, FORM)
        map_ptr += grid.map_lanes
        done = row - RADIUS  # the row that this row of the map completes
        if done >= first:
            pixels = _pixels_of_row(column, tl.cast(done, tl.int64) if WIDE else done, start, size)
            x = tl.load(x_ptr + pixels.offset, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + pixels.offset, mask=inside, other=0.0).to(tl.float32)
            x_ssim, y_ssim = _ssim_grads(x, y, shift, filtered, FORM)
            grad = tl.zeros((BLOCK,), tl.float32)
            if PIXEL != "":
                grad = tl.load(grad_ptr) * slope(y - x, target.parameter, PIXEL)
                if target.weight.ptr is not None:
                    grad = weighted(grad, weight_at(target.weight, plane, pixels, size, inside, 0, 0))
            if x_grad_ptr is not None:
                total = ssim_grad * x_ssim - grad
                to_ptr = x_grad_ptr + start_of(plane, size) + pixels.offset
                tl.store(to_ptr, total.to(x_grad_ptr.dtype.element_ty), mask=inside)
            if y_grad_ptr is not None:
                total = ssim_grad * y_ssim + grad
                if SMOOTHNESS != "":
                    for axis in tl.static_range(AXES):
                        up = tl.load(grad_ptr + (1 if OUTS == 1 else AXES - axis))
                        total += up * smoothness_grad(pred, plane, pixels, inside, axis, SMOOTHNESS, PARTS.order, AXES)
                to_ptr = y_grad_ptr + start_of(plane, size) + pixels.offset
                tl.store(to_ptr, total.to(y_grad_ptr.dtype.element_ty), mask=inside)
