"""What the sweeps of ssim.py and image_loss_ssim.py share: rows of windows, filters along both axes, map and partials.

Of the row after the one that is worked on, the outermost lanes of a window are read already: with those of its
neighbours they are all of a warp's, so that what lies between finds them in the L1 cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .ssim_lanes import Window, load_lane, store_lane


class Form(NamedTuple):
    """Which SSIM, and what the sweep makes, as a constant of the kernel."""

    window: Window
    x_step: int = 1  # elements from a column of the image to the next
    y_step: int = 1  # and of the prediction
    structure_only: bool = False  # without the luminance term
    one_pixel: bool = False  # nothing but the window's middle counts
    keep: int = 0  # which gradients the partials are for: 1 that of the image, 2 of the prediction, 3 both, 0 none
    needs_x: bool = False  # of the backward: the gradient of the image
    needs_y: bool = False  # that of the prediction
    weighted: bool = False  # the map has a weight


class Constants(NamedTuple):
    """Numbers of an SSIM."""

    taps: tuple  # weights of the pixels 0 .. radius away
    c1: Any
    c2: Any
    low: Any  # the images' value outside, or None: 0


class Shift(NamedTuple):
    """What is subtracted from x + y and x - y before they are squared; or what their means then lack."""

    a: Any
    d: Any


class Moments(NamedTuple):
    """Of a row of windows, each a number for each column of a lane."""

    mean_a: Any
    mean_d: Any
    square_a: Any
    square_d: Any


class Partials(NamedTuple):
    """The derivatives of the map, each a number for each column of a lane; or what the sweep knows of each map."""

    aa: Any
    dd: Any
    x: Any  # p_a + p_d
    y: Any  # p_a - p_d


class Ends(NamedTuple):
    """The first and the last lane of a row's windows."""

    first: Any
    last: Any


@triton.jit
def ends(ptr, column, bound, STRIDE: tl.constexpr, WINDOW: tl.constexpr, low=None):
    """The first and the last lane of a row's windows around `column`; STRIDE: elements from a column to the next."""
    COLUMNS: tl.constexpr = WINDOW.columns
    before: tl.constexpr = -WINDOW.radius - (WINDOW.margin + WINDOW.radius) % COLUMNS
    after: tl.constexpr = before + (WINDOW.radius - before + COLUMNS - 1) // COLUMNS * COLUMNS
    first = load_lane(ptr + before * STRIDE, (column + before).to(tl.uint32) < bound, COLUMNS, low)
    if after == before:
        return Ends(first, first)
    else:
        return Ends(first, load_lane(ptr + after * STRIDE, (column + after).to(tl.uint32) < bound, COLUMNS, low))


@triton.jit
def window(ptr, column, bound, outer, STRIDE: tl.constexpr, WINDOW: tl.constexpr, low=None):
    """All columns of a row's windows, of which `outer` are the ends; `low` outside the image, or zeros."""
    COLUMNS: tl.constexpr = WINDOW.columns
    before: tl.constexpr = -WINDOW.radius - (WINDOW.margin + WINDOW.radius) % COLUMNS
    last: tl.constexpr = (WINDOW.radius - before + COLUMNS - 1) // COLUMNS
    values = outer.first
    for k in tl.static_range(1, last):
        off = before + k * COLUMNS
        values = values + load_lane(ptr + off * STRIDE, (column + off).to(tl.uint32) < bound, COLUMNS, low)
    if last > 0:
        values = values + outer.last
    return values


@triton.jit
def _along_x(values, taps, WINDOW: tl.constexpr):
    """A window's columns filtered: a sum for each column of a lane."""
    RADIUS: tl.constexpr = WINDOW.radius
    COLUMNS: tl.constexpr = WINDOW.columns
    BEFORE: tl.constexpr = RADIUS + (WINDOW.margin + RADIUS) % COLUMNS
    totals = ()
    for j in tl.static_range(COLUMNS):
        for k in tl.static_range(RADIUS + 1):
            if k == 0:
                total = taps[k] * values[BEFORE + j]
            else:
                total += taps[k] * (values[BEFORE + j - k] + values[BEFORE + j + k])
        totals = totals + (total,)  # type: ignore[assignment]
    return totals


@triton.jit
def _add_row(sums, value, taps, RADIUS: tl.constexpr):
    """A row's `value` added to the outputs that see it: (the one it completes, the sums of the 2 RADIUS others)."""
    if RADIUS == 0:
        return taps[RADIUS] * value, sums
    else:
        rest = ()
        for j in tl.static_range(2 * RADIUS):
            updated = sums[j] + taps[RADIUS - j if j < RADIUS else j - RADIUS] * value
            if j == 0:
                done = updated
            else:
                rest = rest + (updated,)  # type: ignore[assignment]
        return done, rest + (taps[RADIUS] * value,)


@triton.jit
def take_row(sums, values, taps, WINDOW: tl.constexpr):
    """A row filtered along x and taken in, for each column of a lane: the outputs it completes, new sums."""
    row = _along_x(values, taps, WINDOW)
    done, new = (), ()
    for j in tl.static_range(len(row)):
        output, rest = _add_row(sums[j], row[j], taps, WINDOW.radius)
        done, new = done + (output,), new + (rest,)  # type: ignore[assignment]
    return done, new


@triton.jit
def nothing(WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of one map before its first row."""
    RADIUS: tl.constexpr = WINDOW.radius
    zero = tl.zeros((BLOCK,), tl.float32)
    sums = (zero,)
    for _ in tl.static_range(1, 2 * RADIUS):
        sums = sums + (zero,)  # type: ignore[assignment]
    if WINDOW.columns == 1:
        return (sums,)
    else:
        return sums, sums


@triton.jit
def _nearest(value, found, least):
    """`value` where it is nearer to 0 than what was found, and how near the nearest is. Never NaN nor infinite."""
    nearer = tl.abs(value) < least
    return tl.where(nearer, value, found), tl.where(nearer, tl.abs(value), least)


@triton.jit
def shift_of(x, y, height, width, inside, c2):
    """The shift of a plane: what its images have in common, by four of its pixels; `x` and `y` are each a `Plane`.

    It is the sample nearest to 0, so that no single pixel can cost the others their digits; 0 where nothing would
    cancel: then images that are equal in a place have a loss and a gradient of exactly 0 there.
    """
    a, d = tl.zeros(inside.shape, tl.float32), tl.zeros(inside.shape, tl.float32)
    least_a, least_d = a + float("inf"), d + float("inf")
    for i in tl.static_range(4):
        row = (i // 2 * 2 + 1) * tl.cast(height, tl.int64) // 4
        column = (i % 2 * 2 + 1) * tl.cast(width, tl.int64) // 4
        x_ptr = x.ptr + (row * x.row_stride + column * x.column_stride)
        y_ptr = y.ptr + (row * y.row_stride + column * y.column_stride)
        x_value = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
        y_value = tl.load(y_ptr, mask=inside, other=0.0).to(tl.float32)
        a, least_a = _nearest(x_value + y_value, a, least_a)
        d, least_d = _nearest(x_value - y_value, d, least_d)
    a, d = tl.where(least_a * least_a > 4096.0 * c2, a, 0.0), tl.where(least_d * least_d > 4096.0 * c2, d, 0.0)
    return Shift(a, d)


@triton.jit
def shifted(x, y, shift):
    """x + y and x - y minus the shift: exact where both images are near half of it."""
    a, d = (), ()
    for i in tl.static_range(len(x)):
        a, d = a + ((x[i] - shift.a) + y[i],), d + ((x[i] - y[i]) - shift.d,)  # type: ignore[assignment]
    return a, d


@triton.jit
def finite(values):
    """0 for what is not finite."""
    new = ()
    for i in tl.static_range(len(values)):
        new = new + (tl.where(values[i] - values[i] == 0, values[i], 0.0),)  # type: ignore[assignment]
    return new


@triton.jit
def _squared(a):
    new = ()
    for i in tl.static_range(len(a)):
        new = new + (a[i] * a[i],)  # type: ignore[assignment]
    return new


@triton.jit
def next_moments(sums, x, y, shift, taps, WINDOW: tl.constexpr):
    """Windows of a row of both images taken in: the moments it completes, G a, G d, G a^2, G d^2; new sums."""
    a, d = shifted(x, y, shift)
    mean_a, sums_a = take_row(sums.mean_a, a, taps, WINDOW)
    mean_d, sums_d = take_row(sums.mean_d, d, taps, WINDOW)
    square_a, sums_aa = take_row(sums.square_a, _squared(a), taps, WINDOW)
    square_d, sums_dd = take_row(sums.square_d, _squared(d), taps, WINDOW)
    return Moments(mean_a, mean_d, square_a, square_d), Moments(sums_a, sums_d, sums_aa, sums_dd)


@triton.jit
def _counted(values, w):
    new = ()
    for j in tl.static_range(len(values)):
        new = new + (tl.where(w[j] == 0, 0.0, values[j]),)  # type: ignore[assignment]
    return new


@triton.jit
def counted(moments, w):
    """The moments where the weights are not 0: what does not count may be NaN."""
    return Moments(
        _counted(moments.mean_a, w), _counted(moments.mean_d, w), _counted(moments.square_a, w),
        _counted(moments.square_d, w),
    )  # fmt: skip


@triton.jit
def _map_loss(moments, rest, w, constants, J: tl.constexpr, FORM: tl.constexpr):
    """Of a lane's column J, w times one minus SSIM, and its partials. `rest`: what the shifted means lack."""
    w, ma, md = w[J], moments.mean_a[J], moments.mean_d[J]
    va, vd = moments.square_a[J] - ma * ma, moments.square_d[J] - md * md
    per_s = 1.0 / (0.5 * (va + vd) + constants.c2)
    if FORM.one_pixel:
        per_s = tl.zeros_like(per_s)
    form = vd * per_s
    whole_a, whole_d = ma + rest.a, md + rest.d
    maa, mdd = whole_a * whole_a, whole_d * whole_d
    if FORM.structure_only:
        per_l = tl.zeros_like(form)
    else:
        per_l = 1.0 / (0.5 * (maa + mdd) + constants.c1)
    light = mdd * per_l
    by_s, by_l = w * (1.0 - light) * per_s, w * (1.0 - form) * per_l
    p_aa, p_dd = -0.5 * form * by_s, by_s * (1.0 - 0.5 * form)
    p_a = 2.0 * (whole_a * (-0.5 * light * by_l) - ma * p_aa)
    p_d = 2.0 * (whole_d * (by_l * (1.0 - 0.5 * light)) - md * p_dd)
    return (light + form - light * form) * w, Partials(p_aa, p_dd, p_a + p_d, p_a - p_d)


@triton.jit
def map_loss(moments, rest, w, ptr, map_stride, inside, constants, FORM: tl.constexpr):
    """w times one minus SSIM of a row, summed over a lane. Its partials go to `ptr`; from a map to the next there are
    `map_stride` elements."""
    COLUMNS: tl.constexpr = FORM.window.columns
    KEEP: tl.constexpr = FORM.keep
    total, made = _map_loss(moments, rest, w, constants, 0, FORM)
    if COLUMNS == 2:
        more, other = _map_loss(moments, rest, w, constants, 1, FORM)
        total += more
        partials = Partials((made.aa, other.aa), (made.dd, other.dd), (made.x, other.x), (made.y, other.y))
    else:
        partials = Partials((made.aa,), (made.dd,), (made.x,), (made.y,))
    if KEEP > 0:
        store_lane(ptr, partials.aa, inside, COLUMNS)
        store_lane(ptr + map_stride, partials.dd, inside, COLUMNS)
        if KEEP & 1:
            store_lane(ptr + 2 * map_stride, partials.x, inside, COLUMNS)
        if KEEP & 2:
            store_lane(ptr + (3 if KEEP == 3 else 2) * map_stride, partials.y, inside, COLUMNS)
    return total


@triton.jit
def partial_ends(ptr, map_stride, column, bound, FORM: tl.constexpr):
    """The ends of a row's windows in the partials that are needed."""
    WINDOW: tl.constexpr = FORM.window
    STRIDE: tl.constexpr = WINDOW.pixel_stride
    aa = ends(ptr, column, bound, STRIDE, WINDOW)
    dd = ends(ptr + map_stride, column, bound, STRIDE, WINDOW)
    x, y = aa, aa
    if FORM.needs_x:
        x = ends(ptr + 2 * map_stride, column, bound, STRIDE, WINDOW)
    if FORM.needs_y:
        y = ends(ptr + (3 if FORM.keep == 3 else 2) * map_stride, column, bound, STRIDE, WINDOW)
    return Partials(aa, dd, x, y)


@triton.jit
def next_filtered(sums, ptr, map_stride, column, bound, outer, taps, FORM: tl.constexpr):
    """A row of the partials taken in: those that are needed, filtered, and new sums.

    `column` is that of the map, `bound` the map's width, or 0 for a row outside; `outer` are the row's ends.
    """
    WINDOW: tl.constexpr = FORM.window
    STRIDE: tl.constexpr = WINDOW.pixel_stride
    values = window(ptr, column, bound, outer.aa, STRIDE, WINDOW)
    aa, sums_aa = take_row(sums.aa, values, taps, WINDOW)
    values = window(ptr + map_stride, column, bound, outer.dd, STRIDE, WINDOW)
    dd, sums_dd = take_row(sums.dd, values, taps, WINDOW)
    x, sums_x = aa, sums.x
    y, sums_y = aa, sums.y
    if FORM.needs_x:
        values = window(ptr + 2 * map_stride, column, bound, outer.x, STRIDE, WINDOW)
        x, sums_x = take_row(sums_x, values, taps, WINDOW)
    if FORM.needs_y:
        values = window(ptr + (3 if FORM.keep == 3 else 2) * map_stride, column, bound, outer.y, STRIDE, WINDOW)
        y, sums_y = take_row(sums_y, values, taps, WINDOW)
    return Partials(aa, dd, x, y), Partials(sums_aa, sums_dd, sums_x, sums_y)
