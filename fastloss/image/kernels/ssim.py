"""Triton kernels for SSIM: sums of one minus the map, its partial derivatives, and the gradients of both images.

With G the window, a = x + y and d = x - y (x the image, y the prediction):

    ma = G a, md = G d, va = G (a - sa)^2 - (ma - sa)^2, vd = G (d - sd)^2 - (md - sd)^2    sa, sd: what cancels there
    l = md^2 / ((ma^2 + md^2) / 2 + C1), s = vd / ((va + vd) / 2 + C2)      one minus luminance, minus structure
    loss = l + s - l s                                                      one minus SSIM

    p_aa, p_dd, p_a, p_d    d loss / d (G (a - sa)^2, G (d - sd)^2, ma, md)     the partials
    grad x = G (p_a + p_d) + 2 (a - sa) G p_aa + 2 (d - sd) G p_dd
    grad y = G (p_a - p_d) + 2 (a - sa) G p_aa - 2 (d - sd) G p_dd

A lane is two adjacent columns of one plane (one where they cannot be read as one number); a program walks its lanes
down a stretch of rows. Along x the window is read as shifted loads, which the L1 cache serves, since of the next row
the outermost are on their way; along y every row is added to the 2 radius + 1 outputs that see it, whose sums stay in
registers (ssim_sweep.py). The forward keeps three partials (four where both images need a gradient), unscaled.

Bytes per element of size s and k partials: forward 2 s + 4 k, backward 4 k + 3 s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import AotCase, odd_number, on_device
from ..ssim import Grads, Needs, Saved
from ..ssim_reference import Inputs
from .ssim_lanes import Plane, Strided, Window, at_column, lane_of, load_lane, map_lane_of, store_lane, strided_in
from .ssim_sweep import (
    Constants,
    Form,
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

BLOCK = 128  # lanes of a program: one per thread, since shifted loads cannot be wide
WIDE_LANES = 2**31 - 2 * BLOCK  # a lane's number, or one block past the last, does not fit 32 bits from here on
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Here, programs of two warps, all of them resident at once: 8 on a multiprocessor with up to 128 registers.
PAIRS = 64
SWEEP = {"num_warps": 2, "enable_fp_fusion": True}
ROWS, PROGRAMS = 64, 528
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


class Size(NamedTuple):
    """Of the images."""

    channels: int
    height: int
    width: int
    lanes: int  # elements of a row of all planes
    map_lanes: int  # and of the map

    def odd(self) -> Size:
        """As a kernel takes it: see :class:`Strided`."""
        return Size(self.channels, *map(odd_number, self[1:]))


@triton.jit
def size_in(odd):
    height, width = number_in(odd.height), number_in(odd.width)
    return Size(odd.channels, height, width, number_in(odd.lanes), number_in(odd.map_lanes))


@triton.jit(do_not_specialize=["rows"])
def _ssim_fwd_kernel(
    x,  # Strided
    y,  # Strided
    weight,  # Strided: (images, channels, height - 2 margin, width - 2 margin); or None
    sums_ptr,  # (stretches, lanes) float32
    partials_ptr,  # (maps, height - 2 margin, lanes of the map) float32; maps: p_aa, p_dd, p_a +- p_d
    size,  # Size
    rows,  # of the map, that a program takes
    constants,  # Constants
    FORM: tl.constexpr,  # Form
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WINDOW: tl.constexpr = FORM.window
    RADIUS: tl.constexpr = WINDOW.radius
    MARGIN: tl.constexpr = WINDOW.margin
    COLUMNS: tl.constexpr = WINDOW.columns
    X_STEP: tl.constexpr = FORM.x_step
    Y_STEP: tl.constexpr = FORM.y_step
    x, y, size = strided_in(x), strided_in(y), size_in(size)
    if weight is not None:
        weight = strided_in(weight)
    height, width, lanes = size.height, size.width, size.map_lanes
    low = constants.low
    lane, image, channel, column = lane_of(size.channels, width - 2 * MARGIN, lanes, WINDOW, WIDE, BLOCK)
    inside = column.to(tl.uint32) < tl.cast(width - 2 * MARGIN, tl.uint32)
    if weight is not None:
        w_ptr = at_column(weight, image, channel, column)
    x_plane = Plane(at_column(x, image, channel, column * 0), x.row_stride, x.column_stride)
    y_plane = Plane(at_column(y, image, channel, column * 0), y.row_stride, y.column_stride)
    shift = shift_of(x_plane, y_plane, height, width, inside, constants.c2)
    rest = shift
    if low is not None:
        rest = Shift(shift.a - 2.0 * low, shift.d)
    column += MARGIN
    x_ptr, y_ptr = at_column(x, image, channel, column), at_column(y, image, channel, column)
    map_stride = tl.cast(height - 2 * MARGIN, tl.int64) * lanes
    none = nothing(WINDOW, BLOCK)
    sums = Moments(none, none, none, none)
    total = tl.zeros((BLOCK,), tl.float32)
    first = MARGIN + tl.program_id(1).to(tl.int64) * rows
    last = tl.minimum(first + rows, height - MARGIN)
    x_ptr, y_ptr = x_ptr + (first - RADIUS) * x.row_stride, y_ptr + (first - RADIUS) * y.row_stride
    bound = tl.where(first >= RADIUS, width, 0).to(tl.uint32)
    x_ends = ends(x_ptr, column, bound, X_STEP, WINDOW, low)
    y_ends = ends(y_ptr, column, bound, Y_STEP, WINDOW, low)
    for row in range(first - RADIUS, last + RADIUS):
        x_outer, y_outer, here = x_ends, y_ends, bound
        bound = tl.where((row >= -1) & (row + 1 < height), width, 0).to(tl.uint32)
        x_ends = ends(x_ptr + x.row_stride, column, bound, X_STEP, WINDOW, low)
        y_ends = ends(y_ptr + y.row_stride, column, bound, Y_STEP, WINDOW, low)
        x_row = window(x_ptr, column, here, x_outer, X_STEP, WINDOW, low)
        y_row = window(y_ptr, column, here, y_outer, Y_STEP, WINDOW, low)
        moments, sums = next_moments(sums, x_row, y_row, shift, constants.taps, WINDOW)
        x_ptr += x.row_stride
        y_ptr += y.row_stride
        map_row = row - RADIUS - MARGIN
        if map_row + MARGIN >= first:
            w, taken = (1.0, 1.0), moments
            if weight is not None:
                w_row = w_ptr + map_row * weight.row_stride
                w_left = tl.load(w_row, mask=inside, other=0.0).to(tl.float32)
                w_right = tl.load(w_row + weight.column_stride * (COLUMNS - 1), mask=inside, other=0.0).to(tl.float32)
                w = (w_left, w_right)
                taken = counted(moments, w)
            partial_ptr = partials_ptr + map_row * lanes + lane
            total += map_loss(taken, rest, w, partial_ptr, map_stride, inside, constants, FORM)
    lanes, lane = lanes // COLUMNS, lane // COLUMNS
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * lanes + lane, tl.where(inside, total, 0.0), mask=lane < lanes)


@triton.jit(do_not_specialize=["rows"])
def _ssim_bwd_kernel(
    upstream_ptr,  # (images, channels) float32
    x,  # Strided
    y,  # Strided
    x_grad,  # Strided, or None
    y_grad,  # Strided, or None
    partials_ptr,  # (maps, height - 2 margin, lanes of the map) float32
    size,  # Size
    rows,  # of the images, that a program takes
    constants,  # Constants
    FORM: tl.constexpr,  # Form
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WINDOW: tl.constexpr = FORM.window
    RADIUS: tl.constexpr = WINDOW.radius
    MARGIN: tl.constexpr = WINDOW.margin
    COLUMNS: tl.constexpr = WINDOW.columns
    x, y, size = strided_in(x), strided_in(y), size_in(size)
    height, width, map_lanes = size.height, size.width, size.map_lanes
    lane, image, channel, column = lane_of(size.channels, width, size.lanes, WINDOW, WIDE, BLOCK)
    inside = column.to(tl.uint32) < tl.cast(width, tl.uint32)
    x_ptr, y_ptr = at_column(x, image, channel, column), at_column(y, image, channel, column)
    x_plane = Plane(at_column(x, image, channel, column * 0), x.row_stride, x.column_stride)
    y_plane = Plane(at_column(y, image, channel, column * 0), y.row_stride, y.column_stride)
    shift = shift_of(x_plane, y_plane, height, width, inside, constants.c2)
    upstream = tl.load(upstream_ptr + image * size.channels + channel, mask=inside, other=0.0)
    map_stride = tl.cast(height - 2 * MARGIN, tl.int64) * map_lanes
    map_column = column - MARGIN
    none = nothing(WINDOW, BLOCK)
    sums = Partials(none, none, none, none)
    first = tl.program_id(1).to(tl.int64) * rows
    last = tl.minimum(first + rows, height)
    map_ptr = partials_ptr + (first - RADIUS - MARGIN) * map_lanes + map_lane_of(lane, width, WINDOW)
    bound = tl.where(first - RADIUS >= MARGIN, width - 2 * MARGIN, 0).to(tl.uint32)
    following = partial_ends(map_ptr, map_stride, map_column, bound, FORM)
    read = inside & (RADIUS == 0)
    x_next = load_lane(x_ptr + first * x.row_stride, read, COLUMNS)
    y_next = load_lane(y_ptr + first * y.row_stride, read, COLUMNS)
    for row in range(first - RADIUS, last + RADIUS):
        outer, x_row, y_row, within = following, x_next, y_next, bound
        bound = tl.where((row + 1 >= MARGIN) & (row + 1 < height - MARGIN), width - 2 * MARGIN, 0).to(tl.uint32)
        following = partial_ends(map_ptr + map_lanes, map_stride, map_column, bound, FORM)
        done = row - RADIUS  # the row of the images that this row of the map completes
        read = inside & (done + 1 >= first) & (done + 1 < last)
        x_next = load_lane(x_ptr + (done + 1) * x.row_stride, read, COLUMNS)
        y_next = load_lane(y_ptr + (done + 1) * y.row_stride, read, COLUMNS)
        filtered, sums = next_filtered(sums, map_ptr, map_stride, map_column, within, outer, constants.taps, FORM)
        map_ptr += map_lanes
        if done >= first:
            x_grads, y_grads = (), ()
            a, d = shifted(x_row, y_row, shift)
            if FORM.weighted:  # NaN that no weight sees has partials of 0; where one does, they are NaN
                a, d = finite(a), finite(d)
            for j in tl.static_range(COLUMNS):
                by_a, by_d = 2.0 * a[j] * filtered.aa[j], 2.0 * d[j] * filtered.dd[j]
                x_grads = x_grads + (upstream * (filtered.x[j] + by_a + by_d),)  # type: ignore[assignment]
                y_grads = y_grads + (upstream * (filtered.y[j] + by_a - by_d),)  # type: ignore[assignment]
            if x_grad is not None:
                to = strided_in(x_grad)
                x_grad_ptr = at_column(to, image, channel, column) + done * to.row_stride
                store_lane(x_grad_ptr, x_grads, inside, COLUMNS)
            if y_grad is not None:
                to = strided_in(y_grad)
                y_grad_ptr = at_column(to, image, channel, column) + done * to.row_stride
                store_lane(y_grad_ptr, y_grads, inside, COLUMNS)


def taps_of(window: int, sigma: float) -> tuple[float, ...]:
    exact = [math.exp(-0.5 * (k / sigma) * (k / sigma)) for k in range(window // 2 + 1)]
    middle, *others = exact
    total = middle + 2 * sum(others)
    return tuple(tap / total for tap in exact)


def one_pixel(taps: tuple[float, ...]) -> bool:
    """Whether the middle of a window rounds to 1, so that nothing else counts: variances are 0, exactly."""
    middle, *_ = taps
    return middle > 1 - 2**-25


def strided(tensor: Tensor | None) -> Strided | None:
    return None if tensor is None else Strided(tensor, *tensor.stride()).odd()


def columns_of(*tensors: Tensor | None) -> int:
    """Columns of a lane: two where every image is rows of pairs that lie aligned."""
    pairs = all(
        t.shape[3] % 2 == 0 and t.stride(3) == 1 and t.data_ptr() % (2 * t.element_size()) == 0
        and all(stride % 2 == 0 or size == 1 for stride, size in zip(t.stride()[:3], t.shape[:3], strict=True))
        for t in tensors if t is not None
    )  # fmt: skip
    return 2 if pairs else 1


def stretch(height: int, lanes: int) -> int:
    """Rows of a program: as many as leave all multiprocessors their programs, for each reads the window's besides."""
    rows = ROWS
    while rows > 8 and triton.cdiv(lanes, PAIRS) * triton.cdiv(height, rows) < PROGRAMS:
        rows //= 2
    return rows


def size_of(image: Tensor, margin: int) -> Size:
    images, channels, height, width = image.shape
    planes = images * channels
    return Size(channels, height, width, planes * width, planes * (width - 2 * margin))


def pixel_stride(image: Tensor) -> int:
    """Of the lanes: they are in the order of memory, be the image contiguous or channels_last."""
    return image.shape[1] if image.stride(1) == 1 and image.stride(3) != 1 else 1


def _form(x: Inputs, columns: int, **more: Any) -> Form:
    window = Window(x.window // 2, 0 if x.same else x.window // 2, columns, pixel_stride(x.image))
    return Form(window, keep=x.keep, **more)


def ssim_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    image, keep = x.image, x.keep
    margin = 0 if x.same else x.window // 2
    size = size_of(image, margin)
    map_height, map_width = size.height - 2 * margin, size.width - 2 * margin
    kept = (3 + (keep == 3), map_height, size.map_lanes) if keep else (0,)
    partials = image.new_empty(kept, dtype=torch.float32)
    if image.numel() == 0:
        return image.new_zeros(image.shape[:2], dtype=torch.float32), Saved(partials)
    columns = columns_of(image, x.image_pred)
    lanes = size.map_lanes // columns
    rows = stretch(map_height, lanes)
    stretches = triton.cdiv(map_height, rows)
    sums, taps = image.new_empty((stretches, lanes), dtype=torch.float32), taps_of(x.window, x.sigma)
    steps = {"x_step": image.stride(3), "y_step": x.image_pred.stride(3)}
    form = _form(x, columns, structure_only=x.structure_only, one_pixel=one_pixel(taps), **steps)
    with on_device(image):
        _ssim_fwd_kernel[(triton.cdiv(lanes, PAIRS), stretches)](
            strided(image), strided(x.image_pred), strided(x.weight), sums, partials, size.odd(), rows,
            Constants(taps, x.c1, x.c2, x.low or None), form, size.map_lanes >= WIDE_LANES, PAIRS, **SWEEP,
        )  # fmt: skip
    if form.window.pixel_stride > 1:
        return sums.view(stretches, -1, map_width, size.channels).sum((0, 2)), Saved(partials)
    return sums.view(stretches, -1, size.channels, map_width // columns).sum((0, 3)), Saved(partials)


def ssim_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> Grads:
    if not x.keep:  # nobody asked for a gradient when the forward ran
        x = x._replace(keep=needs.image + 2 * needs.image_pred)
        _, saved = ssim_fwd(x)
    x_grad = torch.empty_like(x.image) if needs.image else None
    y_grad = torch.empty_like(x.image_pred) if needs.image_pred else None
    size = size_of(x.image, 0 if x.same else x.window // 2)
    if x.image.numel():
        columns = columns_of(x.image, x.image_pred, x_grad, y_grad)
        lanes = size.lanes // columns
        rows = stretch(size.height, lanes)
        form = _form(x, columns, needs_x=needs.image, needs_y=needs.image_pred, weighted=x.weight is not None)
        with on_device(x.image):
            _ssim_bwd_kernel[(triton.cdiv(lanes, PAIRS), triton.cdiv(size.height, rows))](
                grad.contiguous(), strided(x.image), strided(x.image_pred), strided(x_grad), strided(y_grad),
                saved.kept, size.odd(), rows, Constants(taps_of(x.window, x.sigma), x.c1, x.c2, None), form,
                size.lanes >= WIDE_LANES, PAIRS, **SWEEP,
            )  # fmt: skip
    none = x.image.new_empty(0)
    return Grads(none if x_grad is None else x_grad, none if y_grad is None else y_grad)


def aot_cases() -> Iterator[AotCase]:
    """Every dtype, both paddings, with and without weight, one gradient or both; other windows and layouts."""

    def case(label: str, image: Tensor, weight: Tensor | None, keep: int, **changed: Any) -> Iterator[AotCase]:
        o: dict[str, Any] = {"window": 11, "sigma": 1.5, "same": True, "c1": 1e-4, "c2": 9e-4, "low": 0.0}
        o |= {"structure_only": False, **changed}
        cut = 0 if o["same"] else o["window"] - 1
        map_lanes = image.shape[0] * image.shape[1] * (image.shape[3] - cut)
        partials = torch.empty((3 + (keep == 3), image.shape[2] - cut, map_lanes), device="meta")
        grad = torch.empty(image.shape[:2], device="meta")
        x = Inputs(image, image, weight, **o, keep=keep)
        yield AotCase(f"forward {label}", ssim_fwd, (x,))
        if keep:
            needs = Needs(keep & 1 > 0, keep & 2 > 0)
            yield AotCase(f"backward {label}", ssim_bwd, (grad, Saved(partials), x, needs))

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype, keep in itertools.product(HALF_AND_SINGLE, range(4)):
        yield from case(
            f"{str(dtype).removeprefix('torch.')} keeps {keep}", meta(2, 3, 64, 64, dtype=dtype), None, keep
        )
    image, odd = meta(2, 3, 64, 64), meta(1, 3, 33, 65)
    yield from case("odd, valid, weight", odd, meta(1, 3, 23, 55), 3, same=False)
    yield from case("weight of an image", image, meta(2, 1, 64, 64).expand(2, 3, 64, 64), 2)
    yield from case("low", image, None, 3, low=-1.0)
    yield from case("low, weight", odd, meta(1, 1, 33, 65).expand(1, 3, 33, 65), 2, low=-1.0)
    yield from case("structure", image, None, 3, structure_only=True)
    yield from case("channels last", image.contiguous(memory_format=torch.channels_last), None, 3)
    yield from case("window 1", odd, None, 3, window=1)
    yield from case("window 5", odd, None, 2, window=5)
    yield from case("int64 planes", meta(1, 1, 65536, 32768), None, 3)
    yield from case("int64 lanes", meta(65536, 1, 16, 32768), None, 3)
