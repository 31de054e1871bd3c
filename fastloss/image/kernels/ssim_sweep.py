"""What the sweeps of ssim.py and image_loss_ssim.py share: rows of windows, filters along both axes, map and partials.

A lane is SIDE adjacent columns, one or two. Two are read and written as one number of twice the bits, which lie
aligned, so that a window of 12 columns is six loads and serves both. Of the row after the one that is worked on, the
outermost of a window are read already: with those of its neighbours they are all of a warp's, so that what lies
between finds them in the L1 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lane_of(channels, width, lanes, ASIDE: tl.constexpr, WIDE: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(first element of a lane, image, channel, column), the next column being ASIDE elements on: 1, or the channels.

    `lanes` and `width` are in elements. In a lane past the end the column is one that no image has.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    lane = (program * BLOCK + tl.arange(0, BLOCK)) * SIDE
    if ASIDE > 1:
        channel, column, image = lane % ASIDE, lane // ASIDE % width, lane // ASIDE // width
    else:
        column, channel, image = lane % width, lane // width % channels, lane // width // channels
    return lane, image.to(tl.int64), channel, tl.where(lane < lanes, column, 1 << 30).to(tl.int32)


@triton.jit
def map_lane_of(lane, width, MARGIN: tl.constexpr, ASIDE: tl.constexpr):
    """The element of the same column in the map, which has MARGIN columns less on either side."""
    return lane - (lane // (width * ASIDE) * 2 + 1) * MARGIN * ASIDE


@triton.jit
def at_column(tensor, image, channel, column):
    """Where a lane's column begins. `tensor`: (pointer, strides of image, channel, row and column)."""
    return tensor[0] + image * tensor[1] + channel.to(tl.int64) * tensor[2] + column.to(tl.int64) * tensor[4]


@triton.jit
def load_lane(at, inside, SIDE: tl.constexpr, low=None):
    """The SIDE elements of a lane as float32, `low` outside, or zeros."""
    values = _load_lane(at, inside, SIDE)
    if low is None:
        return values
    elif SIDE == 1:
        return (tl.where(inside, values[0], low),)
    else:
        return tl.where(inside, values[0], low), tl.where(inside, values[1], low)


@triton.jit
def _load_lane(at, inside, SIDE: tl.constexpr):
    kind: tl.constexpr = at.dtype.element_ty
    if SIDE == 1:
        return (tl.load(at, mask=inside, other=0.0).to(tl.float32),)
    elif kind.primitive_bitwidth == 32:
        bits = tl.load(at.to(tl.pointer_type(tl.int64), bitcast=True), mask=inside, other=0)
        low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
        return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    else:
        bits = tl.load(at.to(tl.pointer_type(tl.int32), bitcast=True), mask=inside, other=0)
        low, high = bits.to(tl.int16).to(kind, bitcast=True), (bits >> 16).to(tl.int16).to(kind, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def store_lane(at, values, inside, SIDE: tl.constexpr):
    kind: tl.constexpr = at.dtype.element_ty
    if SIDE == 1:
        tl.store(at, values[0].to(kind), mask=inside)
    elif kind.primitive_bitwidth == 32:
        low, high = values[0].to(tl.int32, bitcast=True).to(tl.int64), values[1].to(tl.int32, bitcast=True).to(tl.int64)
        bits = (low & 0xFFFFFFFF) | (high << 32)
        tl.store(at.to(tl.pointer_type(tl.int64), bitcast=True), bits, mask=inside)
    else:
        low, high = values[0].to(kind).to(tl.int16, bitcast=True), values[1].to(kind).to(tl.int16, bitcast=True)
        bits = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
        tl.store(at.to(tl.pointer_type(tl.int32), bitcast=True), bits, mask=inside)


@triton.jit
def ends(
    at, column, bound, STEP: tl.constexpr, MARGIN: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr, low=None
):
    """The first and the last lane of a row's windows around `column`, MARGIN columns from an even one."""
    before: tl.constexpr = -RADIUS - (MARGIN + RADIUS) % SIDE
    after: tl.constexpr = before + (RADIUS - before + SIDE - 1) // SIDE * SIDE
    first = load_lane(at + before * STEP, (column + before).to(tl.uint32) < bound, SIDE, low)
    if after == before:
        return first, first
    else:
        return first, load_lane(at + after * STEP, (column + after).to(tl.uint32) < bound, SIDE, low)


@triton.jit
def window(
    at, column, bound, outer, STEP: tl.constexpr, MARGIN: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr,
    low=None,
):  # fmt: skip
    """All columns of a row's windows, of which `outer` are the ends; `low` outside the image, or zeros."""
    before: tl.constexpr = -RADIUS - (MARGIN + RADIUS) % SIDE
    last: tl.constexpr = (RADIUS - before + SIDE - 1) // SIDE
    values = outer[0]
    for k in tl.static_range(1, last):
        off = before + k * SIDE
        values = values + load_lane(at + off * STEP, (column + off).to(tl.uint32) < bound, SIDE, low)
    if last > 0:
        values = values + outer[1]
    return values


@triton.jit
def _along_x(values, taps, MARGIN: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr):
    """A window's columns filtered: SIDE sums."""
    BEFORE: tl.constexpr = RADIUS + (MARGIN + RADIUS) % SIDE
    totals = ()
    for j in tl.static_range(SIDE):
        total = taps[0] * values[BEFORE + j]
        for k in tl.static_range(1, RADIUS + 1):
            total += taps[k] * (values[BEFORE + j - k] + values[BEFORE + j + k])
        totals = totals + (total,)  # type: ignore[assignment]
    return totals


@triton.jit
def _add_row(sums, value, taps, RADIUS: tl.constexpr):
    """A row's `value` added to the outputs that see it: (the one it completes, the sums of the 2 RADIUS others)."""
    if RADIUS == 0:
        return taps[0] * value, sums
    else:
        rest = ()
        for j in tl.static_range(1, 2 * RADIUS):
            rest = rest + (sums[j] + taps[RADIUS - j if j < RADIUS else j - RADIUS] * value,)  # type: ignore[assignment]
        return sums[0] + taps[RADIUS] * value, rest + (taps[RADIUS] * value,)


@triton.jit
def take_row(sums, values, taps, MARGIN: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr):
    """A row filtered along x and taken in, for each column of a lane: the outputs it completes, new sums."""
    row = _along_x(values, taps, MARGIN, RADIUS, SIDE)
    done, new = (), ()
    for j in tl.static_range(SIDE):
        output, rest = _add_row(sums[j], row[j], taps, RADIUS)
        done, new = done + (output,), new + (rest,)  # type: ignore[assignment]
    return done, new


@triton.jit
def nothing(RADIUS: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of one map before its first row."""
    zero = tl.zeros((BLOCK,), tl.float32)
    sums = (zero,)
    for _ in tl.static_range(1, 2 * RADIUS):
        sums = sums + (zero,)  # type: ignore[assignment]
    if SIDE == 1:
        return (sums,)
    else:
        return sums, sums


@triton.jit
def _nearest(value, found, least):
    """`value` where it is nearer to 0 than what was found, and how near the nearest is. Never NaN nor infinite."""
    nearer = tl.abs(value) < least
    return tl.where(nearer, value, found), tl.where(nearer, tl.abs(value), least)


@triton.jit
def shift_of(x_at, y_at, x_way, y_way, height, width, inside, c2):
    """What is subtracted from x + y and x - y before they are squared: what a plane's images have in common, by four
    of its pixels, whose first is at x_at and y_at; the ways are those to the next row and column.

    It is the sample nearest to 0, so that no single pixel can cost the others their digits; 0 where nothing would
    cancel: then images that are equal in a place have a loss and a gradient of exactly 0 there.
    """
    a, d = tl.zeros(inside.shape, tl.float32), tl.zeros(inside.shape, tl.float32)
    least_a, least_d = a + float("inf"), d + float("inf")
    for i in tl.static_range(4):
        row = (i // 2 * 2 + 1) * tl.cast(height, tl.int64) // 4
        column = (i % 2 * 2 + 1) * tl.cast(width, tl.int64) // 4
        x = tl.load(x_at + (row * x_way[0] + column * x_way[1]), mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_at + (row * y_way[0] + column * y_way[1]), mask=inside, other=0.0).to(tl.float32)
        a, least_a = _nearest(x + y, a, least_a)
        d, least_d = _nearest(x - y, d, least_d)
    return tl.where(least_a * least_a > 4096.0 * c2, a, 0.0), tl.where(least_d * least_d > 4096.0 * c2, d, 0.0)


@triton.jit
def shifted(x, y, shift):
    """x + y and x - y minus the shift: exact where both images are near half of it."""
    a, d = (), ()
    for i in tl.static_range(len(x)):
        a, d = a + ((x[i] - shift[0]) + y[i],), d + ((x[i] - y[i]) - shift[1],)  # type: ignore[assignment]
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
def next_moments(sums, x, y, shift, taps, MARGIN: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr):
    """Windows of a row of both images taken in: the moments ma, md, G a^2, G d^2 it completes, new sums."""
    a, d = shifted(x, y, shift)
    ma, mean_a = take_row(sums[0], a, taps, MARGIN, RADIUS, SIDE)
    md, mean_d = take_row(sums[1], d, taps, MARGIN, RADIUS, SIDE)
    saa, square_a = take_row(sums[2], _squared(a), taps, MARGIN, RADIUS, SIDE)
    sdd, square_d = take_row(sums[3], _squared(d), taps, MARGIN, RADIUS, SIDE)
    return (ma, md, saa, sdd), (mean_a, mean_d, square_a, square_d)


@triton.jit
def counted(moments, w, SIDE: tl.constexpr):
    """The moments where the weights are not 0: what does not count may be NaN."""
    new = ()
    for k in tl.static_range(4):
        each = ()
        for j in tl.static_range(SIDE):
            each = each + (tl.where(w[j] == 0, 0.0, moments[k][j]),)  # type: ignore[assignment]
        new = new + (each,)  # type: ignore[assignment]
    return new


@triton.jit
def _map_loss(ma, md, saa, sdd, rest, w, c1, c2, STRUCTURE: tl.constexpr, ONE_PIXEL: tl.constexpr):
    """w times one minus SSIM; its partials p_aa, p_dd, p_a + p_d, p_a - p_d. `rest`: what the shifted means lack."""
    va, vd = saa - ma * ma, sdd - md * md
    per_s = 1.0 / (0.5 * (va + vd) + c2)
    if ONE_PIXEL:
        per_s = tl.zeros_like(per_s)
    form = vd * per_s
    whole_a, whole_d = ma + rest[0], md + rest[1]
    maa, mdd = whole_a * whole_a, whole_d * whole_d
    if STRUCTURE:
        per_l = tl.zeros_like(form)
    else:
        per_l = 1.0 / (0.5 * (maa + mdd) + c1)
    light = mdd * per_l
    by_s, by_l = w * (1.0 - light) * per_s, w * (1.0 - form) * per_l
    p_aa, p_dd = -0.5 * form * by_s, by_s * (1.0 - 0.5 * form)
    p_a = 2.0 * (whole_a * (-0.5 * light * by_l) - ma * p_aa)
    p_d = 2.0 * (whole_d * (by_l * (1.0 - 0.5 * light)) - md * p_dd)
    return (light + form - light * form) * w, (p_aa, p_dd, p_a + p_d, p_a - p_d)


@triton.jit
def map_loss(
    moments, rest, w, to, step, inside, c1, c2, STRUCTURE: tl.constexpr, ONE_PIXEL: tl.constexpr, KEEP: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """w times one minus SSIM of a row, summed over a lane; its partials go to `to`, a map lies `step` from the next."""
    ma, md, saa, sdd = moments
    total, made = _map_loss(ma[0], md[0], saa[0], sdd[0], rest, w[0], c1, c2, STRUCTURE, ONE_PIXEL)
    if SIDE == 2:
        more, other = _map_loss(ma[1], md[1], saa[1], sdd[1], rest, w[1], c1, c2, STRUCTURE, ONE_PIXEL)
        total += more
    else:
        other = made
    if KEEP > 0:
        store_lane(to, (made[0], other[0]), inside, SIDE)
        store_lane(to + step, (made[1], other[1]), inside, SIDE)
        if KEEP & 1:
            store_lane(to + 2 * step, (made[2], other[2]), inside, SIDE)
        if KEEP & 2:
            store_lane(to + (3 if KEEP == 3 else 2) * step, (made[3], other[3]), inside, SIDE)
    return total


@triton.jit
def partial_ends(
    here, step, column, bound, needs, KEPT: tl.constexpr, ASIDE: tl.constexpr, MARGIN: tl.constexpr,
    RADIUS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """The ends of a row's windows in the partials that are needed."""
    p_aa, p_dd = (
        ends(here, column, bound, ASIDE, MARGIN, RADIUS, SIDE),
        ends(here + step, column, bound, ASIDE, MARGIN, RADIUS, SIDE),
    )
    p_x, p_y = p_aa, p_aa
    if needs[0] is not None:
        p_x = ends(here + 2 * step, column, bound, ASIDE, MARGIN, RADIUS, SIDE)
    if needs[1] is not None:
        p_y = ends(here + (3 if KEPT == 3 else 2) * step, column, bound, ASIDE, MARGIN, RADIUS, SIDE)
    return p_aa, p_dd, p_x, p_y


@triton.jit
def next_filtered(
    sums, here, step, column, bound, outer, taps, needs, KEPT: tl.constexpr, ASIDE: tl.constexpr,
    MARGIN: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """A row of the partials taken in: G p_aa, G p_dd and, as `needs` has them, G (p_a + p_d), G (p_a - p_d); new sums.

    `column` is that of the map, `bound` the map's width, or 0 for a row outside; `outer` are the row's ends.
    """
    of_aa, of_dd, of_x, of_y = sums
    values = window(here, column, bound, outer[0], ASIDE, MARGIN, RADIUS, SIDE)
    p_aa, of_aa = take_row(of_aa, values, taps, MARGIN, RADIUS, SIDE)
    values = window(here + step, column, bound, outer[1], ASIDE, MARGIN, RADIUS, SIDE)
    p_dd, of_dd = take_row(of_dd, values, taps, MARGIN, RADIUS, SIDE)
    p_x, p_y = p_aa, p_aa
    if needs[0] is not None:
        values = window(here + 2 * step, column, bound, outer[2], ASIDE, MARGIN, RADIUS, SIDE)
        p_x, of_x = take_row(of_x, values, taps, MARGIN, RADIUS, SIDE)
    if needs[1] is not None:
        at = here + (3 if KEPT == 3 else 2) * step
        p_y, of_y = take_row(
            of_y, window(at, column, bound, outer[3], ASIDE, MARGIN, RADIUS, SIDE), taps, MARGIN, RADIUS, SIDE
        )
    return (p_aa, p_dd, p_x, p_y), (of_aa, of_dd, of_x, of_y)
