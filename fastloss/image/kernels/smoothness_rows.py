"""What a row of an image adds to the smoothness loss, and its gradient: for kernels that march down the rows.

A lane of a program has SPAN columns beside each other. What it holds of a row is a strip,

    own [LANES, SPAN]    the values of its columns
    left, right [LANES]  those of the neighbours beside them, `left` in a backward only

So a strip and the one below it have all the first differences of the lane's pixels, in a backward those of the left
neighbour too, and the strip below is the next row's own. What there is of each difference comes as four: along y and
along x of the lane's own pixels, along y and along x of the left neighbour. The formulas stand in smoothness.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...core.kernels.device_math import weighted, zeros
from .smoothness_arguments import height_of, multiple_in, width_of
from .smoothness_terms import start_of


class Form(NamedTuple):
    """What a marching kernel is compiled for."""

    kind: str
    channels: int  # that a program goes over together: an image's if it has a guide, else 1
    guides: int  # channels of the guide, 0 without one
    span: int  # columns of a lane, 4 or 8
    lanes: int
    left: bool  # whether strips have the left neighbour
    unroll: int  # rows of a turn of the loop
    ahead: bool  # whether a row is read while the one before is computed
    whole: bool  # whether a lane's columns of the image are one vector, all there or none
    whole_guide: bool
    whole_weight: bool


@triton.jit
def _four(x, LANES: tl.constexpr):
    """The columns of a [LANES, 4] tensor, each by itself; they stay in their lanes."""
    even, odd = tl.split(tl.reshape(x, (LANES, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _joined_four(a, b, c, d, LANES: tl.constexpr):
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (LANES, 4))


@triton.jit
def _joined_eight(a, b, c, d, e, f, g, h, LANES: tl.constexpr):
    even, odd = _joined_four(a, c, e, g, LANES), _joined_four(b, d, f, h, LANES)
    return tl.reshape(tl.join(even, odd), (LANES, 8))


@triton.jit
def _moved(x, left, right, BY: tl.constexpr, FORM: tl.constexpr):
    """What stands one column to the right (BY 1) or to the left (BY -1) of each column of `x`, and the first column
    of `x`: `left` and `right` stand beside it."""
    LANES: tl.constexpr = FORM.lanes
    if FORM.span == 4:
        a, b, c, d = _four(x, LANES)
        if BY == 1:
            return _joined_four(b, c, d, right, LANES), a
        else:
            return _joined_four(left, a, b, c, LANES), a
    else:
        even, odd = tl.split(tl.reshape(x, (LANES, 4, 2)))
        a, c, e, g = _four(even, LANES)
        b, d, f, h = _four(odd, LANES)
        if BY == 1:
            return _joined_eight(b, c, d, e, f, g, h, right, LANES), a
        else:
            return _joined_eight(left, a, b, c, d, e, f, g, LANES), a


@triton.jit
def columns_of(first, FORM: tl.constexpr):
    """The columns of each lane."""
    SPAN: tl.constexpr = FORM.span
    return first[:, None] + tl.arange(0, SPAN)[None, :]


@triton.jit
def own_mask(first, width, WHOLE: tl.constexpr, FORM: tl.constexpr):
    """Which of a lane's columns are there."""
    if WHOLE:
        return (first < width)[:, None]
    else:
        return columns_of(first, FORM) < width


@triton.jit
def _strip(row_ptr, stride, first, width, WHOLE: tl.constexpr, RIGHT: tl.constexpr, FORM: tl.constexpr):
    """The strip of a row; 0 where there is no column. WHOLE: see Form. It has no `right` where nobody asks."""
    SPAN: tl.constexpr = FORM.span
    ptr = row_ptr + first * stride
    own_ptr = ptr[:, None] + (tl.arange(0, SPAN) * stride)[None, :]
    own = tl.load(own_ptr, mask=own_mask(first, width, WHOLE, FORM), other=0.0).to(tl.float32)
    if RIGHT:
        right = tl.load(ptr + SPAN * stride, mask=first + SPAN < width, other=0.0).to(tl.float32)
    if FORM.left:
        left = tl.load(ptr - stride, mask=(first > 0) & (first < width), other=0.0).to(tl.float32)
    else:
        left = right if RIGHT else tl.zeros(first.shape, tl.float32)
    return own, left, right if RIGHT else left


@triton.jit
def image_strips(image, unit, y, first, FORM: tl.constexpr):
    """Of row `y`, a strip for each channel of a program's unit: an image, or a plane."""
    CHANNELS: tl.constexpr = FORM.channels
    size = image.size
    row_ptr = image.ptr + start_of(unit * CHANNELS, size) + y * width_of(size)
    strips = ()
    for _ in tl.static_range(CHANNELS):
        strips = strips + (_strip(row_ptr, 1, first, width_of(size), FORM.whole, True, FORM),)  # type: ignore[assignment]
        row_ptr += tl.cast(height_of(size), y.dtype) * width_of(size)
    return strips


@triton.jit
def guide_strips(image, unit, y, first, FORM: tl.constexpr):
    """Of row `y`, a strip for each channel of the guide."""
    GUIDES: tl.constexpr = FORM.guides
    guide, width = image.guide, width_of(image.size)
    strips = ()
    if GUIDES != 0:
        row_ptr = guide.ptr + unit * multiple_in(guide.image_stride, guide) + y * width * guide.pixel_stride
        for _ in tl.static_range(GUIDES):
            strips = strips + (_strip(row_ptr, guide.pixel_stride, first, width, FORM.whole_guide, True, FORM),)  # type: ignore[assignment]
            row_ptr += multiple_in(guide.channel_stride, guide)
    return strips


@triton.jit
def weight_strips(image, unit, y, first, FORM: tl.constexpr):
    """Of row `y`, the weights of its pixels' differences: a strip for each channel, or one where channels share them;
    of no weight nothing."""
    CHANNELS: tl.constexpr = FORM.channels
    weight, width, planes = image.weight, width_of(image.size), image.size.planes
    strips = ()
    if weight.ptr is not None:
        row_ptr = weight.ptr + y * multiple_in(weight.y_stride, weight)
        row_ptr += unit * CHANNELS // planes * multiple_in(weight.image_stride, weight)
        if weight.channel_stride is None:
            strips = (_strip(row_ptr, weight.x_stride, first, width, FORM.whole_weight, False, FORM),)  # type: ignore[assignment]
        else:
            row_ptr += unit * CHANNELS % planes * multiple_in(weight.channel_stride, weight)
            for _ in tl.static_range(CHANNELS):
                strips = strips + (_strip(row_ptr, weight.x_stride, first, width, FORM.whole_weight, False, FORM),)  # type: ignore[assignment]
                row_ptr += multiple_in(weight.channel_stride, weight)
    return strips


@triton.jit
def differences(strip, below, FORM: tl.constexpr):
    """Of neighbouring pixels, the four."""
    own, left, right = strip
    own_below, left_below, _ = below
    after, first_column = _moved(own, left, right, 1, FORM)
    return own_below - own, after - own, left_below - left, first_column - left


@triton.jit
def row_edges(guides, below, FORM: tl.constexpr):
    """The guide's factors of the differences, the four; 1 without a guide."""
    GUIDES: tl.constexpr = FORM.guides
    if GUIDES == 0:
        return 1.0, 1.0, 1.0, 1.0
    else:
        scale: tl.constexpr = -1.4426950408889634 / GUIDES
        LANES: tl.constexpr = FORM.lanes
        SPAN: tl.constexpr = FORM.span
        own_y, own_x = zeros(2, LANES, SPAN)
        left_y, left_x = zeros(2, LANES)
        for c in tl.static_range(GUIDES):
            d_y, d_x, left_d_y, left_d_x = differences(guides[c], below[c], FORM)
            own_y, own_x = own_y + tl.abs(d_y), own_x + tl.abs(d_x)
            left_y, left_x = left_y + tl.abs(left_d_y), left_x + tl.abs(left_d_x)
        return tl.exp2(own_y * scale), tl.exp2(own_x * scale), tl.exp2(left_y * scale), tl.exp2(left_x * scale)


@triton.jit
def weights_for(strips, channel: tl.constexpr):
    """The weights of a channel's own pixels, and of the left neighbours; 1 without weights."""
    if len(strips) == 0:
        return 1.0, 1.0
    elif len(strips) == 1:
        own, left, _ = strips[0]
        return own, left
    else:
        own, left, _ = strips[channel]
        return own, left


@triton.jit
def _has_right(first, size, FORM: tl.constexpr):
    """Which of a lane's pixels have a neighbour to their right. Within whole vectors all but the last have: lanes
    without columns hold zeros, whose differences are 0, and write nothing."""
    SPAN: tl.constexpr = FORM.span
    if FORM.whole:
        return (tl.arange(0, SPAN) < SPAN - 1)[None, :] | (first + SPAN < width_of(size))[:, None]
    else:
        return columns_of(first, FORM) + 1 < width_of(size)


@triton.jit
def row_terms(d_y, d_x, edge_y, edge_x, w, more, first, size, FORM: tl.constexpr):
    """What a lane's pixels add to the sums along y and along x, or to the one sum if isotropic.

    `edge_y`, `edge_x`: the guide's factors; `w`: the weights, of which 0 excludes even NaN. `more`: whether there is a
    row below.
    """
    has_right = _has_right(first, size, FORM)
    if FORM.kind == "isotropic":
        a, b = tl.where(more, d_y * edge_y, 0.0), tl.where(has_right, d_x * edge_x, 0.0)
        return (weighted(tl.sqrt(a * a + b * b), w),)
    else:
        if FORM.kind == "l1":
            term_y, term_x = tl.abs(d_y), tl.abs(d_x)
        else:
            term_y, term_x = d_y * d_y, d_x * d_x
        term_y = tl.where(more & (w != 0), term_y * (edge_y * w), 0.0)
        return term_y, tl.where(has_right & (w != 0), term_x * (edge_x * w), 0.0)


@triton.jit
def row_weights(w, more, first, size, FORM: tl.constexpr):
    """The weights of a lane's differences along y and along x, or of its pixels if isotropic."""
    if FORM.kind == "isotropic":
        return (w,)
    else:
        return tl.where(more, w, 0.0), tl.where(_has_right(first, size, FORM), w, 0.0)


@triton.jit
def _signed(factor, d):
    """factor * sign(d), 0 for a d of 0 or NaN: the sign's bit moves into the factor."""
    least = tl.full((), 1, tl.int32).to(tl.float32, bitcast=True)  # see sign() of core's device_math.py
    bits = factor.to(tl.int32, bitcast=True) ^ (d.to(tl.int32, bitcast=True) & -2147483648)
    return tl.where(tl.abs(d) >= least, bits.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _slopes(d_y, d_x, edge_y, edge_x, w, more, has_right, up_y, up_x, FORM: tl.constexpr):
    """The gradients by the differences along y and along x; `up_y`, `up_x`: the gradients of the sums."""
    counted_y, counted_x = more & (w != 0), has_right & (w != 0)
    if FORM.kind == "isotropic":
        a, b = tl.where(more, d_y * edge_y, 0.0), tl.where(has_right, d_x * edge_x, 0.0)
        squares = a * a + b * b
        # rsqrt takes subnormals for 0; a flat pixel has no gradient, whatever the upstream one
        inverse = tl.where(squares < 1.1754944e-38, 0.0, tl.rsqrt(squares) * (up_y * w))
        return tl.where(counted_y, a * inverse * edge_y, 0.0), tl.where(counted_x, b * inverse * edge_x, 0.0)
    else:
        factor_y, factor_x = up_y * w * edge_y, up_x * w * edge_x
        if FORM.kind == "l1":
            none = tl.zeros(d_y.shape, tl.float32)
            slope_y = _signed(tl.where(counted_y, factor_y, 0.0) + none, d_y)
            return slope_y, _signed(tl.where(counted_x, factor_x, 0.0) + none, d_x)
        else:
            slope_y = tl.where(counted_y, 2.0 * factor_y * d_y, 0.0)
            return slope_y, tl.where(counted_x, 2.0 * factor_x * d_x, 0.0)


@triton.jit
def row_slopes(d, edges, weights, more, upstream, first, size, FORM: tl.constexpr):
    """The gradients by a row's differences along y; and for each pixel, by that along x of its left neighbour less by
    its own. `d`, `edges`: the four; `weights`: two."""
    d_y, d_x, left_d_y, left_d_x = d
    up_y, up_x = upstream
    edge_y, edge_x, left_edge_y, left_edge_x = edges
    w, left_w = weights
    has_right = _has_right(first, size, FORM)
    slope_y, slope_x = _slopes(d_y, d_x, edge_y, edge_x, w, more, has_right, up_y, up_x, FORM)
    _, left = _slopes(left_d_y, left_d_x, left_edge_y, left_edge_x, left_w, more, first > 0, up_y, up_x, FORM)
    before, _ = _moved(slope_x, left, left, -1, FORM)
    return slope_y, before - slope_x
