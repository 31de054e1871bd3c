"""The sweeps of ssim.py with the pixel and smoothness losses along: one pass over the image pair each way.

A lane walks down a column, see there. Of every pixel of its stretch of rows it also takes what the other losses have:
they read the pixel and its neighbours again, which the L1 cache still has. Both images lie alike in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.kernels.device_math import added, weighted, zeros
from .pixel import distance, slope
from .smoothness_terms import apart, smoothness_pulled, smoothness_terms, start_of, weight_at
from .ssim_sweep import (
    at_column,
    counted,
    ends,
    finite,
    lane_of,
    map_lane_of,
    map_loss,
    next_filtered,
    next_moments,
    nothing,
    partial_ends,
    shift_of,
    shifted,
    window,
)


@triton.jit
def _plane_of(image, channel, column, size, channels, WIDE: tl.constexpr):
    """Of lanes: the unit's number (as in smoothness_terms.py), the offset of their column's first pixel in it."""
    if len(size) == 5:
        unit, start = image, column * size[4] + channel
    else:
        unit, start = image * channels + channel, column
    if WIDE:
        return unit, start.to(tl.int64)
    else:
        return unit.to(tl.int32), start.to(tl.int32)


@triton.jit
def _spot(column, at, start, size):
    """The pixels of a row, as smoothness_terms.py has them."""
    return at * (size[0] * apart(size)) + start, at * size[0] + column, column, at, 0


@triton.jit
def _columns(weight, image, channel, column):
    """A map of weights, as smoothness_terms.py takes it for the columns of an image."""
    return at_column(weight, image, channel, column), weight[3], weight[4]


@triton.jit
def _shift(x_at, y_at, start, column, size, inside, c2, ASIDE: tl.constexpr):
    """What a plane's images have in common; its pixels begin where column 0 does."""
    first, way = start - column * ASIDE, (size[0] * ASIDE, ASIDE)
    first = tl.where(inside, first, 0)
    return shift_of(x_at + first, y_at + first, way, way, size[1], size[0], inside, c2)


@triton.jit
def _store_sums(out_ptr, of_pixels, sums, of_map, OUTS: tl.constexpr):
    """A program's sums."""
    programs = tl.num_programs(0) * tl.num_programs(1)
    out_ptr += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out_ptr, tl.sum(of_pixels))
    for axis in tl.static_range(OUTS):
        tl.store(out_ptr + (OUTS - axis) * programs, tl.sum(sums[axis]))
    tl.store(out_ptr + (OUTS + 1) * programs, tl.sum(of_map))


@triton.jit
def image_ssim_fwd_kernel(
    x_ptr,  # (units, count)
    y_ptr,  # (units, count)
    pixel_weight,  # (images, channels, height, width), any strides; or None
    guide,  # None or a tuple, see smoothness_terms.py
    weight,  # of the smoothness: as that of the pixels
    map_weight,  # (images, channels, height - 2 margin, width - 2 margin), any strides; or (None,)
    out_ptr,  # (sums, programs) float32: pixel, smoothness along z, y and x (or one number), SSIM
    partials_ptr,  # (maps, height - 2 margin, lanes of the map) float32, see ssim.py
    taps,  # of the pixels 0 .. RADIUS away
    size,  # of a unit, see smoothness_terms.py
    lanes,  # of the images, of the map
    channels,
    rows,
    p,
    c1,
    c2,
    low,  # the images' value outside, or None: 0
    PIXEL: tl.constexpr, SMOOTHNESS: tl.constexpr, ORDER: tl.constexpr, OUTS: tl.constexpr, MARGIN: tl.constexpr,
    ASIDE: tl.constexpr, RADIUS: tl.constexpr, ONE_PIXEL: tl.constexpr, KEEP: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    width, height = size[0], size[1]
    lane, image, channel, column = lane_of(channels, width, lanes[0], ASIDE, WIDE, 1, BLOCK)
    unit, start = _plane_of(image, channel, column, size, channels, WIDE)
    x_at = x_ptr + start_of(unit, size)
    y_at = y_ptr + start_of(unit, size)
    if pixel_weight is not None:
        pixel_weight = _columns(pixel_weight, image, channel, column)
    if weight is not None:
        weight = _columns(weight, image, channel, column)
    inside = column < width
    shift = _shift(x_at, y_at, start, column, size, inside, c2, ASIDE)
    rest = shift
    if low is not None:
        rest = (shift[0] - 2.0 * low, shift[1])
    in_map = (column - MARGIN).to(tl.uint32) < tl.cast(width - 2 * MARGIN, tl.uint32)
    map_lane = map_lane_of(lane, width, MARGIN, ASIDE)
    step = tl.cast(height - 2 * MARGIN, tl.int64) * lanes[1]
    if map_weight[0] is not None:
        w_at = at_column(map_weight, image, channel, column - MARGIN)
    none = nothing(RADIUS, 1, BLOCK)
    moving = (none, none, none, none)
    of_pixels, of_map = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    sums = zeros(OUTS, BLOCK)
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, height)
    row_start = (tl.cast(first - RADIUS, tl.int64) if WIDE else first - RADIUS) * width * ASIDE + start
    x_row, y_row = x_at + row_start, y_at + row_start
    bound = tl.where(first >= RADIUS, width, 0).to(tl.uint32)
    x_ends = ends(x_row, column, bound, ASIDE, MARGIN, RADIUS, 1, low)
    y_ends = ends(y_row, column, bound, ASIDE, MARGIN, RADIUS, 1, low)
    for row in range(first - RADIUS, last + RADIUS):
        x_outer, y_outer, within = x_ends, y_ends, bound
        bound = tl.where((row >= -1) & (row + 1 < height), width, 0).to(tl.uint32)
        x_ends = ends(x_row + width * ASIDE, column, bound, ASIDE, MARGIN, RADIUS, 1, low)
        y_ends = ends(y_row + width * ASIDE, column, bound, ASIDE, MARGIN, RADIUS, 1, low)
        x_window = window(x_row, column, within, x_outer, ASIDE, MARGIN, RADIUS, 1, low)
        y_window = window(y_row, column, within, y_outer, ASIDE, MARGIN, RADIUS, 1, low)
        moments, moving = next_moments(moving, x_window, y_window, shift, taps, MARGIN, RADIUS, 1)
        x_row += width * ASIDE
        y_row += width * ASIDE
        at = row - RADIUS
        if at >= first:
            spot = _spot(column, tl.cast(at, tl.int64) if WIDE else at, start, size)
            if PIXEL != "":
                x = tl.load(x_at + spot[0], mask=inside, other=0.0).to(tl.float32)
                y = tl.load(y_at + spot[0], mask=inside, other=0.0).to(tl.float32)
                loss = distance(y - x, p, PIXEL)
                if pixel_weight is not None:
                    loss = weighted(loss, weight_at(pixel_weight, unit, spot, size, inside, 0, 0))
                of_pixels += tl.where(inside, loss, 0.0)
            if SMOOTHNESS != "":
                terms = smoothness_terms(y_ptr, guide, weight, unit, spot, size, inside, SMOOTHNESS, ORDER, 2)
                sums = added(sums, terms)
            if (at >= MARGIN) & (at < height - MARGIN):
                w, taken = (1.0,), moments
                if map_weight[0] is not None:
                    there = w_at + tl.cast(at - MARGIN, tl.int64) * map_weight[3]
                    w = (tl.load(there, mask=in_map, other=0.0).to(tl.float32),)
                    taken = counted(moments, w, 1)
                to = partials_ptr + tl.cast(at - MARGIN, tl.int64) * lanes[1] + map_lane
                lost = map_loss(taken, rest, w, to, step, in_map, c1, c2, False, ONE_PIXEL, KEEP, 1)
                of_map += tl.where(in_map, lost, 0.0)
    _store_sums(out_ptr, of_pixels, sums, of_map, OUTS)


@triton.jit
def image_ssim_bwd_kernel(
    grad_ptr,  # (sums,) float32
    x_ptr,  # (units, count)
    y_ptr,  # (units, count)
    x_grad,  # (pointer,) of the same, or (None,)
    y_grad,  # (pointer,) of the same, or (None,)
    pixel_weight,  # (images, channels, height, width), any strides; or None
    guide,  # None or a tuple, see smoothness_terms.py
    weight,  # of the smoothness: as that of the pixels
    partials_ptr,  # (maps, height - 2 margin, lanes of the map) float32, see ssim.py
    taps,  # of the pixels 0 .. RADIUS away
    size,  # of a unit, see smoothness_terms.py
    lanes,  # of the images, of the map
    channels,
    rows,
    p,
    c2,
    PIXEL: tl.constexpr, SMOOTHNESS: tl.constexpr, ORDER: tl.constexpr, OUTS: tl.constexpr, MARGIN: tl.constexpr,
    ASIDE: tl.constexpr, RADIUS: tl.constexpr, WEIGHTED: tl.constexpr, KEPT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    width, height = size[0], size[1]
    lane, image, channel, column = lane_of(channels, width, lanes[0], ASIDE, WIDE, 1, BLOCK)
    unit, start = _plane_of(image, channel, column, size, channels, WIDE)
    x_at = x_ptr + start_of(unit, size)
    y_at = y_ptr + start_of(unit, size)
    if pixel_weight is not None:
        pixel_weight = _columns(pixel_weight, image, channel, column)
    if weight is not None:
        weight = _columns(weight, image, channel, column)
    inside = column < width
    shift = _shift(x_at, y_at, start, column, size, inside, c2, ASIDE)
    map_lane = map_lane_of(lane, width, MARGIN, ASIDE)
    step = tl.cast(height - 2 * MARGIN, tl.int64) * lanes[1]
    none = nothing(RADIUS, 1, BLOCK)
    moving = (none, none, none, none)
    needs = (x_grad[0], y_grad[0])
    up_map = tl.load(grad_ptr + OUTS + 1)
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, height)
    map_column = column - MARGIN
    here = partials_ptr + tl.cast(first - RADIUS - MARGIN, tl.int64) * lanes[1] + map_lane
    bound = tl.where(first - RADIUS >= MARGIN, width - 2 * MARGIN, 0).to(tl.uint32)
    following = partial_ends(here, step, map_column, bound, needs, KEPT, ASIDE, MARGIN, RADIUS, 1)
    for row in range(first - RADIUS, last + RADIUS):
        outer, within = following, bound
        bound = tl.where((row + 1 >= MARGIN) & (row + 1 < height - MARGIN), width - 2 * MARGIN, 0).to(tl.uint32)
        following = partial_ends(here + lanes[1], step, map_column, bound, needs, KEPT, ASIDE, MARGIN, RADIUS, 1)
        filtered, moving = next_filtered(
            moving, here, step, map_column, within, outer, taps, needs, KEPT, ASIDE, MARGIN, RADIUS, 1
        )
        here += lanes[1]
        at = row - RADIUS
        if at >= first:
            p_aa, p_dd, p_x, p_y = filtered
            spot = _spot(column, tl.cast(at, tl.int64) if WIDE else at, start, size)
            x = tl.load(x_at + spot[0], mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_at + spot[0], mask=inside, other=0.0).to(tl.float32)
            a, d = shifted((x,), (y,), shift)
            if WEIGHTED:  # NaN that no weight sees has partials of 0; where one does, they are NaN
                a, d = finite(a), finite(d)
            by_a, by_d = 2.0 * a[0] * p_aa[0], 2.0 * d[0] * p_dd[0]
            pulled = tl.zeros((BLOCK,), tl.float32)
            if PIXEL != "":
                pulled = tl.load(grad_ptr) * slope(y - x, p, PIXEL)
                if pixel_weight is not None:
                    pulled = weighted(pulled, weight_at(pixel_weight, unit, spot, size, inside, 0, 0))
            if needs[0] is not None:
                total = up_map * (p_x[0] + by_a + by_d) - pulled
                tl.store(needs[0] + start_of(unit, size) + spot[0], total.to(needs[0].dtype.element_ty), mask=inside)
            if needs[1] is not None:
                total = up_map * (p_y[0] + by_a - by_d) + pulled
                if SMOOTHNESS != "":
                    for axis in tl.static_range(2):
                        up = tl.load(grad_ptr + (1 if OUTS == 1 else 2 - axis))
                        total += up * smoothness_pulled(
                            y_ptr, guide, weight, unit, spot, size, inside, axis, SMOOTHNESS, ORDER, 2
                        )
                tl.store(needs[1] + start_of(unit, size) + spot[0], total.to(needs[1].dtype.element_ty), mask=inside)
