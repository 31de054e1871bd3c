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
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import REDUCE_PROGRAMS, AotCase, on_device
from ..ssim import Grads, Needs, Saved
from ..ssim_reference import Inputs
from .ssim_sweep import (
    at_column,
    counted,
    ends,
    finite,
    lane_of,
    load_lane,
    map_lane_of,
    map_loss,
    next_filtered,
    next_moments,
    nothing,
    partial_ends,
    shift_of,
    shifted,
    store_lane,
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


@triton.jit
def _ssim_fwd_kernel(
    x,  # (images, channels, height, width), any strides
    y,  # (images, channels, height, width), any strides
    weight,  # (images, channels, height - 2 margin, width - 2 margin), any strides; or (None,)
    sums_ptr,  # (stretches, lanes) float32
    partials_ptr,  # (maps, height - 2 margin, lanes of the map) float32; maps: p_aa, p_dd, p_a +- p_d
    taps,  # of the pixels 0 .. RADIUS away
    size,  # channels, height, width, elements of a row of the images and of the map
    rows,
    c1,
    c2,
    low,  # the images' value outside, or None: 0
    MARGIN: tl.constexpr,
    RADIUS: tl.constexpr,
    STRUCTURE: tl.constexpr,
    ONE_PIXEL: tl.constexpr,
    KEEP: tl.constexpr,
    ASIDE: tl.constexpr,
    X_STEP: tl.constexpr,
    Y_STEP: tl.constexpr,
    WIDE: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channels, height, width, _, lanes = size
    lane, image, channel, column = lane_of(channels, width - 2 * MARGIN, lanes, ASIDE, WIDE, SIDE, BLOCK)
    inside = column.to(tl.uint32) < tl.cast(width - 2 * MARGIN, tl.uint32)
    if weight[0] is not None:
        w_at = at_column(weight, image, channel, column)
    shift = shift_of(
        at_column(x, image, channel, column * 0), at_column(y, image, channel, column * 0), (x[3], x[4]), (y[3], y[4]),
        height, width, inside, c2,
    )  # fmt: skip
    rest = shift
    if low is not None:
        rest = (shift[0] - 2.0 * low, shift[1])
    column += MARGIN
    x_at, y_at = at_column(x, image, channel, column), at_column(y, image, channel, column)
    step = tl.cast(height - 2 * MARGIN, tl.int64) * lanes
    none = nothing(RADIUS, SIDE, BLOCK)
    sums = (none, none, none, none)
    total = tl.zeros((BLOCK,), tl.float32)
    first = MARGIN + tl.program_id(1).to(tl.int64) * rows
    last = tl.minimum(first + rows, height - MARGIN)
    x_at, y_at = x_at + (first - RADIUS) * x[3], y_at + (first - RADIUS) * y[3]
    bound = tl.where(first >= RADIUS, width, 0).to(tl.uint32)
    x_ends = ends(x_at, column, bound, X_STEP, MARGIN, RADIUS, SIDE, low)
    y_ends = ends(y_at, column, bound, Y_STEP, MARGIN, RADIUS, SIDE, low)
    for row in range(first - RADIUS, last + RADIUS):
        x_outer, y_outer, here = x_ends, y_ends, bound
        bound = tl.where((row >= -1) & (row + 1 < height), width, 0).to(tl.uint32)
        x_ends = ends(x_at + x[3], column, bound, X_STEP, MARGIN, RADIUS, SIDE, low)
        y_ends = ends(y_at + y[3], column, bound, Y_STEP, MARGIN, RADIUS, SIDE, low)
        x_row = window(x_at, column, here, x_outer, X_STEP, MARGIN, RADIUS, SIDE, low)
        y_row = window(y_at, column, here, y_outer, Y_STEP, MARGIN, RADIUS, SIDE, low)
        moments, sums = next_moments(sums, x_row, y_row, shift, taps, MARGIN, RADIUS, SIDE)
        x_at += x[3]
        y_at += y[3]
        at = row - RADIUS - MARGIN
        if at + MARGIN >= first:
            w, taken = (1.0, 1.0), moments
            if weight[0] is not None:
                w_here = w_at + at * weight[3]
                w_first = tl.load(w_here, mask=inside, other=0.0).to(tl.float32)
                w_second = tl.load(w_here + weight[4] * (SIDE - 1), mask=inside, other=0.0).to(tl.float32)
                w = (w_first, w_second)
                taken = counted(moments, w, SIDE)
            to = partials_ptr + at * lanes + lane
            total += map_loss(taken, rest, w, to, step, inside, c1, c2, STRUCTURE, ONE_PIXEL, KEEP, SIDE)
    lanes, lane = lanes // SIDE, lane // SIDE
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * lanes + lane, tl.where(inside, total, 0.0), mask=lane < lanes)


@triton.jit
def _ssim_bwd_kernel(
    upstream_ptr,  # (images, channels) float32
    x,  # (images, channels, height, width), any strides
    y,  # (images, channels, height, width), any strides
    x_grad,  # the same, or (None,)
    y_grad,  # the same, or (None,)
    partials_ptr,  # (maps, height - 2 margin, lanes of the map) float32
    taps,  # of the pixels 0 .. RADIUS away
    size,  # channels, height, width, elements of a row of the images and of the map
    rows,
    c2,
    MARGIN: tl.constexpr,
    RADIUS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    KEPT: tl.constexpr,
    ASIDE: tl.constexpr,
    WIDE: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channels, height, width, lanes, map_lanes = size
    lane, image, channel, column = lane_of(channels, width, lanes, ASIDE, WIDE, SIDE, BLOCK)
    inside = column.to(tl.uint32) < tl.cast(width, tl.uint32)
    x_at, y_at = at_column(x, image, channel, column), at_column(y, image, channel, column)
    shift = shift_of(
        at_column(x, image, channel, column * 0), at_column(y, image, channel, column * 0), (x[3], x[4]), (y[3], y[4]),
        height, width, inside, c2,
    )  # fmt: skip
    upstream = tl.load(upstream_ptr + image * channels + channel, mask=inside, other=0.0)
    step = tl.cast(height - 2 * MARGIN, tl.int64) * map_lanes
    map_column = column - MARGIN
    none = nothing(RADIUS, SIDE, BLOCK)
    sums = (none, none, none, none)
    needs = (x_grad[0], y_grad[0])
    first = tl.program_id(1).to(tl.int64) * rows
    last = tl.minimum(first + rows, height)
    here = partials_ptr + (first - RADIUS - MARGIN) * map_lanes + map_lane_of(lane, width, MARGIN, ASIDE)
    bound = tl.where(first - RADIUS >= MARGIN, width - 2 * MARGIN, 0).to(tl.uint32)
    following = partial_ends(here, step, map_column, bound, needs, KEPT, ASIDE, MARGIN, RADIUS, SIDE)
    read = inside & (RADIUS == 0)
    x_next, y_next = load_lane(x_at + first * x[3], read, SIDE), load_lane(y_at + first * y[3], read, SIDE)
    for row in range(first - RADIUS, last + RADIUS):
        outer, x_row, y_row, within = following, x_next, y_next, bound
        bound = tl.where((row + 1 >= MARGIN) & (row + 1 < height - MARGIN), width - 2 * MARGIN, 0).to(tl.uint32)
        following = partial_ends(here + map_lanes, step, map_column, bound, needs, KEPT, ASIDE, MARGIN, RADIUS, SIDE)
        at = row - RADIUS
        read = inside & (at + 1 >= first) & (at + 1 < last)
        x_next = load_lane(x_at + (at + 1) * x[3], read, SIDE)
        y_next = load_lane(y_at + (at + 1) * y[3], read, SIDE)
        filtered, sums = next_filtered(
            sums, here, step, map_column, within, outer, taps, needs, KEPT, ASIDE, MARGIN, RADIUS, SIDE
        )
        here += map_lanes
        if at >= first:
            p_aa, p_dd, p_x, p_y = filtered
            of_x, of_y = (), ()
            a, d = shifted(x_row, y_row, shift)
            if WEIGHTED:  # NaN that no weight sees has partials of 0; where one does, they are NaN
                a, d = finite(a), finite(d)
            for j in tl.static_range(SIDE):
                by_a, by_d = 2.0 * a[j] * p_aa[j], 2.0 * d[j] * p_dd[j]
                of_x = of_x + (upstream * (p_x[j] + by_a + by_d),)  # type: ignore[assignment]
                of_y = of_y + (upstream * (p_y[j] + by_a - by_d),)  # type: ignore[assignment]
            if x_grad[0] is not None:
                store_lane(at_column(x_grad, image, channel, column) + at * x_grad[3], of_x, inside, SIDE)
            if y_grad[0] is not None:
                store_lane(at_column(y_grad, image, channel, column) + at * y_grad[3], of_y, inside, SIDE)


def taps_of(window: int, sigma: float) -> tuple[float, ...]:
    exact = [math.exp(-0.5 * (k / sigma) * (k / sigma)) for k in range(window // 2 + 1)]
    total = exact[0] + 2 * sum(exact[1:])
    return tuple(tap / total for tap in exact)


def one_pixel(taps: tuple[float, ...]) -> bool:
    """Whether the middle of a window rounds to 1, so that nothing else counts: variances are 0, exactly."""
    return taps[0] > 1 - 2**-25


def strided(tensor: Tensor | None) -> tuple:
    return (None,) if tensor is None else (tensor, *tensor.stride())


def side_of(*tensors: Tensor | None) -> int:
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


def layout(image: Tensor, margin: int) -> tuple[tuple[int, ...], int, int]:
    """What the kernels call size, the lanes from a column to the next, the rows of a program."""
    images, channels, height, width = image.shape
    lanes = images * channels * width
    rows = 64
    while rows > 16 and triton.cdiv(lanes, BLOCK) * triton.cdiv(height, rows) < REDUCE_PROGRAMS:
        rows //= 2
    size = (channels, height, width, lanes, images * channels * (width - 2 * margin))
    return size, channels if image.stride(1) == 1 and image.stride(3) != 1 else 1, rows


def ssim_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    image, keep = x.image, x.keep
    margin = 0 if x.same else x.window // 2
    size, aside, _ = layout(image, margin)
    channels, height, width, _, map_lanes = size
    kept = (3 + (keep == 3), height - 2 * margin, map_lanes) if keep else (0,)
    partials = image.new_empty(kept, dtype=torch.float32)
    if image.numel() == 0:
        return image.new_zeros(image.shape[:2], dtype=torch.float32), Saved(partials)
    side = side_of(image, x.image_pred)
    lanes = map_lanes // side
    rows = stretch(height - 2 * margin, lanes)
    stretches = triton.cdiv(height - 2 * margin, rows)
    sums, taps = image.new_empty((stretches, lanes), dtype=torch.float32), taps_of(x.window, x.sigma)
    with on_device(image):
        _ssim_fwd_kernel[(triton.cdiv(lanes, PAIRS), stretches)](
            strided(image), strided(x.image_pred), strided(x.weight), sums, partials, taps, size, rows, x.c1, x.c2,
            x.low or None, margin, x.window // 2, x.structure_only, one_pixel(taps), keep, aside, image.stride(3),
            x.image_pred.stride(3), map_lanes >= WIDE_LANES, side, PAIRS, **SWEEP,
        )  # fmt: skip
    if aside > 1:
        return sums.view(stretches, -1, width - 2 * margin, channels).sum((0, 2)), Saved(partials)
    return sums.view(stretches, -1, channels, (width - 2 * margin) // side).sum((0, 3)), Saved(partials)


def ssim_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> Grads:
    if not x.keep:  # nobody asked for a gradient when the forward ran
        x = x._replace(keep=needs.image + 2 * needs.image_pred)
        _, saved = ssim_fwd(x)
    x_grad = torch.empty_like(x.image) if needs.image else None
    y_grad = torch.empty_like(x.image_pred) if needs.image_pred else None
    margin = 0 if x.same else x.window // 2
    size, aside, _ = layout(x.image, margin)
    if x.image.numel():
        side = side_of(x.image, x.image_pred, x_grad, y_grad)
        lanes = size[3] // side
        rows = stretch(size[1], lanes)
        with on_device(x.image):
            _ssim_bwd_kernel[(triton.cdiv(lanes, PAIRS), triton.cdiv(size[1], rows))](
                grad.contiguous(), strided(x.image), strided(x.image_pred), strided(x_grad), strided(y_grad),
                saved.kept, taps_of(x.window, x.sigma), size, rows, x.c2, margin, x.window // 2, x.weight is not None,
                x.keep, aside, size[3] >= WIDE_LANES, side, PAIRS, **SWEEP,
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
