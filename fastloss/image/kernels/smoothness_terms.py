"""What a difference of neighbouring pixels adds to the smoothness loss, and how it pulls them: for kernels that walk
over an image in any way. The formulas stand in smoothness.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.kernels.device_math import sign, weighted


@triton.jit
def apart(size):
    """Elements of a pixel; size = width, height, depth, units of an image and, if channels_last, channels."""
    if len(size) == 5:
        return size[4]
    else:
        return 1


@triton.jit
def start_of(unit, size):
    """Where a unit begins; factor by factor, for the elements of a unit alone may not fit 32 bits."""
    return unit * size[0] * size[1] * size[2] * apart(size)


@triton.jit
def tile_of(unit, row, column, size, AXES: tl.constexpr, WIDE: tl.constexpr):
    """Elements of rows and columns of a unit (a column: a channel of a pixel, if channels_last): their spot (offsets,
    those of their pixels, coordinates x, y and z, channels), and whether they are there.

    Only rows and columns are divided, never each element; what depends on one of them is made once for all the others.
    """
    row, column = row[:, None], column[None, :]
    inside = (row < size[1] * size[2]) & (column < size[0] * apart(size))
    if WIDE:
        row, column = row.to(tl.int64), column.to(tl.int64)
    x, y, z = column // apart(size), row, 0
    if AXES == 3:
        y, z = row % size[1], row // size[1]
    channel = column % apart(size) if len(size) == 5 else unit % size[3]
    return (row * (size[0] * apart(size)) + column, row * size[0] + x, x, y, z, channel), inside


@triton.jit
def _way(size, AXIS: tl.constexpr):
    """How many pixels a step along an axis is (0: x, 1: y, 2: z)."""
    if AXIS == 0:
        return 1
    elif AXIS == 1:
        return size[0]
    else:
        return size[0] * size[1]


@triton.jit
def _has(spot, size, AXIS: tl.constexpr, SHIFT: tl.constexpr, ORDER: tl.constexpr):
    """Whether the pixel SHIFT steps along an axis is there and has a difference along it."""
    place = spot[2 + AXIS] + SHIFT
    return (place >= ORDER - 1) & (place + 1 < size[AXIS])


@triton.jit
def _edge(guide, image, pixel, away, mask, ORDER: tl.constexpr):
    """exp(-mean_c |dI|); guide = (pointer, channels, strides of an image, a channel and a pixel)."""
    total = tl.zeros(pixel.shape, tl.float32)
    start = pixel - away if ORDER == 2 else pixel
    for c in range(guide[1]):
        at = guide[0] + image * guide[2] + c * guide[3]
        end = tl.load(at + (pixel + away) * guide[4], mask=mask, other=0.0).to(tl.float32)
        total += tl.abs(end - tl.load(at + start * guide[4], mask=mask, other=0.0).to(tl.float32))
    return tl.exp(total / -guide[1])


@triton.jit
def _factor(
    guide, image, spot, size, mask, AXIS: tl.constexpr, ALONG: tl.constexpr, SHIFT: tl.constexpr, ORDER: tl.constexpr
):  # fmt: skip
    """The factor e of the difference along ALONG of the pixel SHIFT steps along AXIS; 0 where `mask` is not set."""
    e = _edge(guide, image, spot[1] + SHIFT * _way(size, AXIS), _way(size, ALONG), mask, ORDER)
    return tl.where(mask, e, 0.0)


@triton.jit
def edges_of(guide, image, spot, size, inside, ORDER: tl.constexpr, AXES: tl.constexpr, BACK: tl.constexpr):
    """The factors of the differences that belong to pixels, along x, y and z; with BACK of all that pull at them: from
    -1 to ORDER - 1 steps along x, then along y and z. The channels of an image have them in common."""
    found = ()
    for axis in tl.static_range(AXES):
        for k in tl.static_range(ORDER + 1 if BACK else 1):
            has = inside & _has(spot, size, axis, k - 1 if BACK else 0, ORDER)
            e = _factor(guide, image, spot, size, has, axis, axis, k - 1 if BACK else 0, ORDER)
            found = found + (e,)  # type: ignore[assignment]
    return found


@triton.jit
def _read(at, shift, mask, other):
    return tl.load(at + shift, mask=mask, other=other).to(tl.float32)


@triton.jit
def _step(
    image_ptr, guide, unit, spot, size, inside, mask,
    AXIS: tl.constexpr, ALONG: tl.constexpr, SHIFT: tl.constexpr, ORDER: tl.constexpr, FILL: tl.constexpr = False,
    edge=None,
):  # fmt: skip
    """Differences along ALONG of the pixels SHIFT steps along AXIS, and their factors e; 0 where `mask` is not set.

    `edge`: those factors, where the caller has them.

    FILL, which needs AXIS == ALONG: a neighbour that is not there is taken to be equal, which saves a selection for
    each difference; but NaN instead of 0 beside an infinity.
    """
    way, away = _way(size, AXIS), _way(size, ALONG)
    at = image_ptr + start_of(unit, size) + spot[0]
    # the elements themselves are read under one mask, hence once for all the differences, and in whole vectors
    own = tl.load(at, mask=inside, other=0.0)
    other = own if FILL else 0.0
    own = own.to(tl.float32)
    here = own if SHIFT == 0 else _read(at, SHIFT * way * apart(size), mask, other)
    if SHIFT == -1 and AXIS == ALONG:
        d = own - here
    else:
        d = _read(at, (SHIFT * way + away) * apart(size), mask, other) - here
    if ORDER == 2:
        if SHIFT == 1 and AXIS == ALONG:
            d -= here - own
        else:
            d -= here - _read(at, (SHIFT * way - away) * apart(size), mask, other)
    if not FILL:
        d = tl.where(mask, d, 0.0)
    if edge is not None:
        return d, edge
    elif guide is None:
        return d, 1.0
    else:
        return d, _factor(guide, unit // size[3], spot, size, mask, AXIS, ALONG, SHIFT, ORDER)


@triton.jit
def weight_at(weight, unit, spot, size, mask, AXIS: tl.constexpr, SHIFT: tl.constexpr):
    """Weights of the pixels SHIFT steps along an axis, as float32.

    weight: (pointer, strides of an image, a channel, z, y and x); or (pointers to the first pixels of the columns,
    strides of a row and of a column).
    """
    if len(weight) == 3:
        at = weight[0] + spot[3] * weight[1]
    else:
        at = weight[0] + unit // size[3] * weight[1] + spot[5] * weight[2] + spot[4] * weight[3]
        at += spot[3] * weight[4] + spot[2] * weight[5]
    along = weight[len(weight) - 1 - AXIS]
    return tl.load(at + SHIFT * along, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pull(
    image_ptr, guide, weight, unit, spot, size, inside,
    AXIS: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr, edges=None,
):  # fmt: skip
    """The pull of the difference along an axis that belongs to the pixel SHIFT steps along it; 0 if there is none."""
    mask = inside & _has(spot, size, AXIS, SHIFT, ORDER)
    w = 1.0
    if weight is not None:
        w = weight_at(weight, unit, spot, size, mask, AXIS, SHIFT)
    fill: tl.constexpr = KIND == "l1"  # the sign of NaN is 0
    edge = None if edges is None else edges[AXIS * (ORDER + 1) + SHIFT + 1]
    d, e = _step(image_ptr, guide, unit, spot, size, inside, mask, AXIS, AXIS, SHIFT, ORDER, fill, edge)
    if KIND == "isotropic":
        squares = d * e * d * e
        for other in tl.static_range(AXES):
            if other != AXIS:
                has = mask & _has(spot, size, other, 0, ORDER)
                f, h = _step(image_ptr, guide, unit, spot, size, inside, has, AXIS, other, SHIFT, ORDER)
                squares += f * h * f * h
        pull = e * e * d * tl.where(squares < 1.1754944e-38, 0.0, tl.rsqrt(squares))  # rsqrt takes subnormals for 0
    elif KIND == "l1":
        pull = e * sign(d)
    else:
        pull = e * 2.0 * d
    return pull if weight is None else weighted(pull, w)


@triton.jit
def smoothness_terms(
    image_ptr, guide, weight, unit, spot, size, inside, KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr,
    edges=None,
):  # fmt: skip
    """What elements add to the sums: along x, y and z, or one number if isotropic; 0 where `inside` is not set.

    `edges`: of edges_of, or None; not for isotropic.
    """
    w = 1.0
    if weight is not None:
        w = weight_at(weight, unit, spot, size, inside, 0, 0)
    terms = ()
    squares = tl.zeros(spot[0].shape, tl.float32)
    for axis in tl.static_range(AXES):
        has = inside & _has(spot, size, axis, 0, ORDER)
        edge = None if edges is None else edges[axis]
        d, e = _step(image_ptr, guide, unit, spot, size, inside, has, axis, axis, 0, ORDER, False, edge)
        if KIND == "isotropic":
            squares += d * e * d * e
        else:
            term = (tl.abs(d) if KIND == "l1" else d * d) * e
            terms = terms + (term if weight is None else weighted(term, w),)  # type: ignore[assignment]
    if KIND == "isotropic":
        term = tl.sqrt(squares)
        terms = (term if weight is None else weighted(term, w),)  # type: ignore[assignment]
    return terms


@triton.jit
def smoothness_pulled(
    image_ptr, guide, weight, unit, spot, size, inside,
    AXIS: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr, edges=None,
):  # fmt: skip
    """The gradient of elements along an axis, per gradient of its sum. `edges`: of edges_of with BACK, or None."""
    before = _pull(image_ptr, guide, weight, unit, spot, size, inside, AXIS, -1, KIND, ORDER, AXES, edges)
    here = _pull(image_ptr, guide, weight, unit, spot, size, inside, AXIS, 0, KIND, ORDER, AXES, edges)
    pulled = before - here
    if ORDER == 2:
        pulled -= here - _pull(image_ptr, guide, weight, unit, spot, size, inside, AXIS, 1, KIND, ORDER, AXES, edges)
    return pulled
