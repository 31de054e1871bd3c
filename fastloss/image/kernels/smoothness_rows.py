"""What a row of an image adds to the smoothness loss, and its gradient: for kernels that march down the rows.

A lane of a program has SPAN columns beside each other. A strip is what it holds of a row, a tuple: the values of its
columns, and after them the right neighbour's; in a backward also the left neighbour's, before them. So one strip and
the one below it have all the first differences of the lane's pixels (in a backward, of the left neighbour too), and
the strip below is the next row's own. The formulas stand in smoothness.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...core.kernels.device_math import weighted
from .smoothness_arguments import height_of, multiple_in, width_of
from .smoothness_terms import start_of


class Form(NamedTuple):
    """What a marching kernel is compiled for."""

    kind: str
    channels: int  # that a program goes over together: an image's if it has a guide, else 1
    guides: int  # channels of the guide, 0 without one
    span: int  # columns of a lane, 4 or 8
    lanes: int
    left: bool  # whether strips begin with the left neighbour
    unroll: int  # rows of a turn of the loop
    ahead: bool  # whether a row is read while the one before is computed
    whole: bool  # whether a lane's columns of the image are one vector, all there or none
    whole_guide: bool
    whole_weight: bool


@triton.jit
def _none(FORM: tl.constexpr):
    """A sum of each lane that nothing has been added to."""
    LANES: tl.constexpr = FORM.lanes
    return tl.zeros((LANES,), tl.float32)


@triton.jit
def _four(x, LANES: tl.constexpr):
    """The columns of a [LANES, 4] tensor, each by itself; they stay in their lanes."""
    even, odd = tl.split(tl.reshape(x, (LANES, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _columns_of(x, LANES: tl.constexpr, SPAN: tl.constexpr):
    """The same of a [LANES, SPAN] tensor."""
    if SPAN == 4:
        return _four(x, LANES)
    else:
        even, odd = tl.split(tl.reshape(x, (LANES, 4, 2)))
        a, c, e, g = _four(even, LANES)
        b, d, f, h = _four(odd, LANES)
        return a, b, c, d, e, f, g, h


@triton.jit
def _joined_four(a, b, c, d, LANES: tl.constexpr):
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (LANES, 4))


@triton.jit
def _joined(x, LANES: tl.constexpr, SPAN: tl.constexpr):
    """A [LANES, SPAN] tensor of its columns."""
    if SPAN == 4:
        return _joined_four(x[0], x[1], x[2], x[3], LANES)
    else:
        even = _joined_four(x[0], x[2], x[4], x[6], LANES)
        return tl.reshape(tl.join(even, _joined_four(x[1], x[3], x[5], x[7], LANES)), (LANES, 8))


@triton.jit
def _strip(row_ptr, stride, first, width, WHOLE: tl.constexpr, RIGHT: tl.constexpr, FORM: tl.constexpr):
    """The strip of a row; 0 where there is no column. WHOLE: see Form."""
    SPAN: tl.constexpr = FORM.span
    LANES: tl.constexpr = FORM.lanes
    ptr = row_ptr + first * stride
    strip = ()
    if FORM.left:
        strip = strip + (tl.load(ptr - stride, mask=(first > 0) & (first < width), other=0.0).to(tl.float32),)  # type: ignore[assignment]
    if WHOLE:
        vector_ptr = ptr[:, None] + tl.arange(0, SPAN)[None, :]
        vector = tl.load(vector_ptr, mask=(first < width)[:, None], other=0.0).to(tl.float32)
        strip = strip + _columns_of(vector, LANES, SPAN)
    else:
        for k in tl.static_range(SPAN):
            strip = strip + (tl.load(ptr + k * stride, mask=first + k < width, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    if RIGHT:
        strip = strip + (tl.load(ptr + SPAN * stride, mask=first + SPAN < width, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return strip


@triton.jit
def image_strips(image, unit, y, first, FORM: tl.constexpr):
    """Of row `y`, a strip for each channel of a program's unit: an image, or a plane."""
    size = image.size
    row_ptr = image.ptr + start_of(unit * FORM.channels, size) + y * width_of(size)
    CHANNELS: tl.constexpr = FORM.channels
    strips = ()
    for _ in tl.static_range(CHANNELS):
        strips = strips + (_strip(row_ptr, 1, first, width_of(size), FORM.whole, True, FORM),)  # type: ignore[assignment]
        row_ptr += tl.cast(height_of(size), y.dtype) * width_of(size)
    return strips


@triton.jit
def guide_strips(image, unit, y, first, FORM: tl.constexpr):
    """Of row `y`, a strip for each channel of the guide."""
    guide, width = image.guide, width_of(image.size)
    GUIDES: tl.constexpr = FORM.guides
    strips = ()
    if GUIDES != 0:
        row_ptr = guide.ptr + unit * multiple_in(guide.image_stride, guide) + y * width * guide.pixel_stride
        for _ in tl.static_range(GUIDES):
            strips = strips + (_strip(row_ptr, guide.pixel_stride, first, width, FORM.whole_guide, True, FORM),)  # type: ignore[assignment]
            row_ptr += multiple_in(guide.channel_stride, guide)
    return strips


@triton.jit
def weight_strips(image, unit, y, first, FORM: tl.constexpr):
    """Of row `y`, the weights of the pixels that have their differences from these rows: one strip for each channel,
    or one in all where channels share them. A strip of weights has no right neighbour."""
    weight, width, planes = image.weight, width_of(image.size), image.size.planes
    strips = ()
    if weight.ptr is not None:
        row_ptr = weight.ptr + y * multiple_in(weight.y_stride, weight)
        row_ptr += unit * FORM.channels // planes * multiple_in(weight.image_stride, weight)
        if weight.channel_stride is None:
            strips = (_strip(row_ptr, weight.x_stride, first, width, FORM.whole_weight, False, FORM),)
        else:
            row_ptr += unit * FORM.channels % planes * multiple_in(weight.channel_stride, weight)
            CHANNELS: tl.constexpr = FORM.channels
            for _ in tl.static_range(CHANNELS):
                strips = strips + (_strip(row_ptr, weight.x_stride, first, width, FORM.whole_weight, False, FORM),)  # type: ignore[assignment]
                row_ptr += multiple_in(weight.channel_stride, weight)
    return strips


@triton.jit
def strip_for(strips, channel: tl.constexpr):
    """The channel's strip of weights, or the one of all channels, or none."""
    if len(strips) == 0:
        return ()
    elif len(strips) == 1:
        return strips[0]
    else:
        return strips[channel]


@triton.jit
def row_edges(guides, below, FORM: tl.constexpr):
    """The guide's factors of the pixels' differences along y and along x, of each pixel; of no guide nothing."""
    PIXELS: tl.constexpr = FORM.span + FORM.left
    GUIDES: tl.constexpr = FORM.guides
    along_y, along_x = (), ()
    if GUIDES != 0:
        for j in tl.static_range(PIXELS):
            to_below, to_right = _none(FORM), _none(FORM)
            for c in tl.static_range(GUIDES):
                to_below += tl.abs(below[c][j] - guides[c][j])
                to_right += tl.abs(guides[c][j + 1] - guides[c][j])
            along_y = along_y + (tl.exp2(to_below * (-1.4426950408889634 / GUIDES)),)  # type: ignore[assignment]
            along_x = along_x + (tl.exp2(to_right * (-1.4426950408889634 / GUIDES)),)  # type: ignore[assignment]
    return along_y, along_x


@triton.jit
def _has_right(first, j: tl.constexpr, size, FORM: tl.constexpr):
    """Whether a lane's pixel j has a neighbour to its right. Within whole vectors it has: lanes without columns hold
    zeros, whose differences are 0, and write nothing."""
    LANES: tl.constexpr = FORM.lanes
    if FORM.left and j == 0:
        return first > 0
    elif FORM.whole and j + 1 < FORM.span + FORM.left:
        return tl.full((LANES,), 1, tl.int1)
    else:
        return first + (j + 1 - FORM.left) < width_of(size)


@triton.jit
def _counted(has, weights, j: tl.constexpr):
    """Whether a difference is there and its weight is not 0, which excludes even NaN."""
    if len(weights) == 0:
        return has
    else:
        return has & (weights[j] != 0)


@triton.jit
def _times(x, factors, j: tl.constexpr):
    """`x` times the pixel's factor, where there is one."""
    if len(factors) == 0:
        return x
    else:
        return x * factors[j]


@triton.jit
def row_terms(strip, below, edges, weights, more, first, size, FORM: tl.constexpr):
    """What a lane's pixels add to the sums along y and along x, or to the one sum if isotropic.

    `edges`: of row_edges. `weights`: a strip or nothing. `more`: whether there is a row below.
    """
    SPAN: tl.constexpr = FORM.span
    sum_y, sum_x = _none(FORM), _none(FORM)
    along_y, along_x = edges
    for j in tl.static_range(SPAN):
        d_y, d_x = below[j] - strip[j], strip[j + 1] - strip[j]
        has_right = _has_right(first, j, size, FORM)
        if FORM.kind == "isotropic":
            d_y = tl.where(more, _times(d_y, along_y, j), 0.0)
            d_x = tl.where(has_right, _times(d_x, along_x, j), 0.0)
            term = tl.sqrt(d_y * d_y + d_x * d_x)
            sum_y += term if len(weights) == 0 else weighted(term, weights[j])
        else:
            term_y, term_x = (tl.abs(d_y), tl.abs(d_x)) if FORM.kind == "l1" else (d_y * d_y, d_x * d_x)
            factor_y, factor_x = _times(_times(1.0, along_y, j), weights, j), _times(_times(1.0, along_x, j), weights, j)
            sum_y += tl.where(_counted(more, weights, j), term_y * factor_y, 0.0)
            sum_x += tl.where(_counted(has_right, weights, j), term_x * factor_x, 0.0)
    return (sum_y,) if FORM.kind == "isotropic" else (sum_y, sum_x)


@triton.jit
def row_weights(weights, more, first, size, FORM: tl.constexpr):
    """The weights of a lane's differences along y and along x, or of its pixels if isotropic, added up."""
    SPAN: tl.constexpr = FORM.span
    sum_y, sum_x = _none(FORM), _none(FORM)
    for j in tl.static_range(SPAN):
        sum_y += weights[j]
        sum_x += tl.where(_has_right(first, j, size, FORM), weights[j], 0.0)
    return (sum_y,) if FORM.kind == "isotropic" else (tl.where(more, sum_y, 0.0), sum_x)


@triton.jit
def _signed(factor, d):
    """factor * sign(d), 0 for a d of 0 or NaN: the sign's bit moves into the factor, which is not negative or has a
    sign of its own."""
    least = tl.full((), 1, tl.int32).to(tl.float32, bitcast=True)  # see sign() of core's device_math.py
    bits = factor.to(tl.int32, bitcast=True) ^ (d.to(tl.int32, bitcast=True) & -2147483648)
    return tl.where(tl.abs(d) >= least, bits.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _slope(factor, d, counted, FORM: tl.constexpr):
    """The gradient by a difference."""
    if FORM.kind == "l1":
        return _signed(tl.where(counted, factor, 0.0) + _none(FORM), d)
    else:
        return tl.where(counted, 2.0 * factor * d, 0.0)


@triton.jit
def row_slopes(strip, below, edges, weights, more, upstream, first, size, FORM: tl.constexpr):
    """The gradients by the differences along y and along x of a lane's pixels and of the left neighbour, two tuples.

    `upstream`: the gradients of the sums along y and x, the same one twice if isotropic. The others as in row_terms.
    """
    along_y, along_x = edges
    up_y, up_x = upstream
    PIXELS: tl.constexpr = FORM.span + 1
    slopes_y, slopes_x = (), ()
    for j in tl.static_range(PIXELS):
        d_y, d_x = below[j] - strip[j], strip[j + 1] - strip[j]
        has_right = _has_right(first, j, size, FORM)
        if FORM.kind == "isotropic":
            d_y = tl.where(more, _times(d_y, along_y, j), 0.0)
            d_x = tl.where(has_right, _times(d_x, along_x, j), 0.0)
            squares = d_y * d_y + d_x * d_x
            inverse = tl.where(squares < 1.1754944e-38, 0.0, tl.rsqrt(squares))  # rsqrt takes subnormals for 0
            inverse = _times(inverse * up_y, weights, j)
            slope_y = tl.where(_counted(more, weights, j), _times(d_y * inverse, along_y, j), 0.0)
            slope_x = tl.where(_counted(has_right, weights, j), _times(d_x * inverse, along_x, j), 0.0)
        else:
            factor_y = _times(_times(up_y, weights, j), along_y, j)
            factor_x = _times(_times(up_x, weights, j), along_x, j)
            slope_y = _slope(factor_y, d_y, _counted(more, weights, j), FORM)
            slope_x = _slope(factor_x, d_x, _counted(has_right, weights, j), FORM)
        slopes_y, slopes_x = slopes_y + (slope_y,), slopes_x + (slope_x,)  # type: ignore[assignment]
    return slopes_y, slopes_x


@triton.jit
def write_strip(row_ptr, values, first, size, FORM: tl.constexpr):
    """Write the columns of a lane."""
    LANES: tl.constexpr = FORM.lanes
    SPAN: tl.constexpr = FORM.span
    ptr = row_ptr + first
    if FORM.whole:
        vector = _joined(values, LANES, SPAN).to(row_ptr.dtype.element_ty)
        tl.store(ptr[:, None] + tl.arange(0, SPAN)[None, :], vector, mask=(first < width_of(size))[:, None])
    else:
        for k in tl.static_range(SPAN):
            tl.store(ptr + k, values[k].to(row_ptr.dtype.element_ty), mask=first + k < width_of(size))
