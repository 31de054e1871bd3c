"""Triton kernels for SSIM: sums of one minus the map, its partial derivatives, and the gradients of both images.

With G the window, a = x + y and d = x - y (x the image, y the prediction):

    ma = G a, md = G d, va = G a^2 - ma^2, vd = G d^2 - md^2
    l = md^2 / ((ma^2 + md^2) / 2 + C1), s = vd / ((va + vd) / 2 + C2)      one minus luminance, minus structure
    loss = l + s - l s                                                      one minus SSIM

    p_aa, p_dd, p_a, p_d    d loss / d (G a^2, G d^2, ma, md)               the partials
    grad x = G (p_a + p_d) + 2 a G p_aa + 2 d G p_dd
    grad y = G (p_a - p_d) + 2 a G p_aa - 2 d G p_dd

A lane is one column of one plane; a program walks 128 lanes down a stretch of rows. Along x the window is read as
shifted loads, which the L1 cache serves; along y every row is added to the 2 radius + 1 outputs that see it, whose
sums stay in registers. No shared memory, no exchange between lanes, no barrier. The forward keeps three partials
(four where both images need a gradient), unscaled, for the backward.

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

from .common import REDUCE_PROGRAMS, AotCase, on_device

BLOCK = 128  # lanes of a program: one per thread, since shifted loads cannot be wide
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _lane(channels, width, lanes, ASIDE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(lane, image, channel, column), the next column being ASIDE lanes on: 1, or the number of channels.

    In a lane past the end the column is one that no image has.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    lane = program * BLOCK + tl.arange(0, BLOCK)
    if ASIDE > 1:
        channel, column, image = lane % ASIDE, lane // ASIDE % width, lane // ASIDE // width
    else:
        column, channel, image = lane % width, lane // width % channels, lane // width // channels
    return lane, image.to(tl.int64), channel, tl.where(lane < lanes, column, 1 << 30).to(tl.int32)


@triton.jit
def _map_lane(lane, width, MARGIN: tl.constexpr, ASIDE: tl.constexpr):
    """The lane of the same column in the map, which has MARGIN columns less on either side."""
    return lane - (lane // (width * ASIDE) * 2 + 1) * MARGIN * ASIDE


@triton.jit
def _at(tensor, image, channel, column):
    """Where a lane's column begins. `tensor`: (pointer, strides of image, channel, row and column)."""
    return tensor[0] + image * tensor[1] + channel.to(tl.int64) * tensor[2] + column.to(tl.int64) * tensor[4]


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
def _next_row(sums, RADIUS: tl.constexpr):
    """The same for a row of zeros."""
    if RADIUS == 0:
        return tl.zeros_like(sums[0]), sums
    else:
        return sums[0], sums[1:] + (tl.zeros_like(sums[0]),)


@triton.jit
def _nothing(RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), tl.float32)
    sums = (zero,)
    for _ in tl.static_range(1, 2 * RADIUS):
        sums = sums + (zero,)  # type: ignore[assignment]
    return sums


@triton.jit
def _pixels(x_at, y_at, column, bound):
    inside = column.to(tl.uint32) < bound
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    return x + y, x - y


@triton.jit
def _along_x(center, column, bound, taps, ASIDE: tl.constexpr, RADIUS: tl.constexpr):
    """A row of a partial filtered along x; `column` counts from the first of the map."""
    total = taps[0] * tl.load(center, mask=column.to(tl.uint32) < bound, other=0.0)
    for k in tl.static_range(1, RADIUS + 1):
        left = tl.load(center - k * ASIDE, mask=(column - k).to(tl.uint32) < bound, other=0.0)
        total += taps[k] * (left + tl.load(center + k * ASIDE, mask=(column + k).to(tl.uint32) < bound, other=0.0))
    return total


@triton.jit
def _terms(ma, md, saa, sdd, c1, c2, STRUCTURE: tl.constexpr):
    """What luminance and structure lack of 1, from the filtered sums and squares; the inverses of their divisors."""
    maa, mdd = ma * ma, md * md
    va, vd = saa - maa, sdd - mdd
    per_s = 1.0 / (0.5 * (va + vd) + c2)
    form = vd * per_s
    if STRUCTURE:
        per_l = tl.zeros_like(form)
    else:
        per_l = 1.0 / (0.5 * (maa + mdd) + c1)
    return mdd * per_l, form, per_l, per_s


@triton.jit
def _ssim_fwd_kernel(
    x,  # (images, channels, height, width), any strides
    y,  # (images, channels, height, width), any strides
    weight,  # (images, channels, height - 2 margin, width - 2 margin), any strides; or (None,)
    sums_ptr,  # (stretches, lanes) float32
    partials_ptr,  # (maps, height - 2 margin, lanes of the map) float32; maps: p_aa, p_dd, p_a +- p_d
    taps,  # of the pixels 0 .. RADIUS away
    size,  # channels, height, width, lanes of the images and of the map
    rows,
    c1,
    c2,
    MARGIN: tl.constexpr,
    RADIUS: tl.constexpr,
    STRUCTURE: tl.constexpr,
    KEEP: tl.constexpr,
    ASIDE: tl.constexpr,
    X_STEP: tl.constexpr,
    Y_STEP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channels, height, width, lanes, map_lanes = size
    lane, image, channel, column = _lane(channels, width, lanes, ASIDE, WIDE, BLOCK)
    inside = (column - MARGIN).to(tl.uint32) < tl.cast(width - 2 * MARGIN, tl.uint32)
    map_lane = _map_lane(lane, width, MARGIN, ASIDE)
    x_at, y_at = _at(x, image, channel, column), _at(y, image, channel, column)
    if weight[0] is not None:
        w_at = _at(weight, image, channel, column - MARGIN)
    mean_a, mean_d = _nothing(RADIUS, BLOCK), _nothing(RADIUS, BLOCK)
    square_a, square_d = _nothing(RADIUS, BLOCK), _nothing(RADIUS, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    first = MARGIN + tl.program_id(1).to(tl.int64) * rows
    last = tl.minimum(first + rows, height - MARGIN)
    bound = tl.cast(width, tl.uint32)
    x_at, y_at = x_at + (first - RADIUS) * x[3], y_at + (first - RADIUS) * y[3]
    for row in range(first - RADIUS, last + RADIUS):
        if (row >= 0) & (row < height):
            a, d = _pixels(x_at, y_at, column, bound)
            a_1, d_1, a_2, d_2 = taps[0] * a, taps[0] * d, taps[0] * (a * a), taps[0] * (d * d)
            for k in tl.static_range(1, RADIUS + 1):
                al, dl = _pixels(x_at - k * X_STEP, y_at - k * Y_STEP, column - k, bound)
                ar, dr = _pixels(x_at + k * X_STEP, y_at + k * Y_STEP, column + k, bound)
                a_1 += taps[k] * (al + ar)
                d_1 += taps[k] * (dl + dr)
                a_2 += taps[k] * (al * al + ar * ar)
                d_2 += taps[k] * (dl * dl + dr * dr)
            ma, mean_a = _add_row(mean_a, a_1, taps, RADIUS)
            md, mean_d = _add_row(mean_d, d_1, taps, RADIUS)
            saa, square_a = _add_row(square_a, a_2, taps, RADIUS)
            sdd, square_d = _add_row(square_d, d_2, taps, RADIUS)
        else:
            ma, mean_a = _next_row(mean_a, RADIUS)
            md, mean_d = _next_row(mean_d, RADIUS)
            saa, square_a = _next_row(square_a, RADIUS)
            sdd, square_d = _next_row(square_d, RADIUS)
        x_at += x[3]
        y_at += y[3]
        at = row - RADIUS
        if at >= first:
            light, form, per_l, per_s = _terms(ma, md, saa, sdd, c1, c2, STRUCTURE)
            loss = light + form - light * form
            w = 1.0
            if weight[0] is not None:
                w = tl.load(w_at + (at - MARGIN) * weight[3], mask=inside, other=0.0).to(tl.float32)
            total += loss * w
            if KEEP > 0:
                by_s, by_l = w * (1.0 - light) * per_s, w * (1.0 - form) * per_l
                p_aa, p_dd = -0.5 * form * by_s, by_s * (1.0 - 0.5 * form)
                p_a = 2.0 * ma * (-0.5 * light * by_l - p_aa)
                p_d = 2.0 * md * (by_l * (1.0 - 0.5 * light) - p_dd)
                to = partials_ptr + (at - MARGIN) * map_lanes + map_lane
                step = tl.cast(height - 2 * MARGIN, tl.int64) * map_lanes
                tl.store(to, p_aa, mask=inside)
                tl.store(to + step, p_dd, mask=inside)
                if KEEP & 1:
                    tl.store(to + 2 * step, p_a + p_d, mask=inside)
                if KEEP & 2:
                    tl.store(to + (3 if KEEP == 3 else 2) * step, p_a - p_d, mask=inside)
    tl.store(sums_ptr + tl.program_id(1) * lanes + lane, tl.where(inside, total, 0.0), mask=lane < lanes)


@triton.jit
def _ssim_bwd_kernel(
    upstream_ptr,  # (images, channels) float32
    x,  # (images, channels, height, width), any strides
    y,  # (images, channels, height, width), any strides
    x_grad,  # the same, or (None,)
    y_grad,  # the same, or (None,)
    partials_ptr,  # (maps, height - 2 margin, lanes of the map) float32
    taps,  # of the pixels 0 .. RADIUS away
    size,  # channels, height, width, lanes of the images and of the map
    rows,
    MARGIN: tl.constexpr,
    RADIUS: tl.constexpr,
    KEPT: tl.constexpr,
    ASIDE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channels, height, width, lanes, map_lanes = size
    lane, image, channel, column = _lane(channels, width, lanes, ASIDE, WIDE, BLOCK)
    inside = column < width
    x_at, y_at = _at(x, image, channel, column), _at(y, image, channel, column)
    upstream = tl.load(upstream_ptr + image * channels + channel, mask=inside, other=0.0)
    map_lane, step = _map_lane(lane, width, MARGIN, ASIDE), tl.cast(height - 2 * MARGIN, tl.int64) * map_lanes
    of_aa, of_dd = _nothing(RADIUS, BLOCK), _nothing(RADIUS, BLOCK)
    of_x, of_y = _nothing(RADIUS, BLOCK), _nothing(RADIUS, BLOCK)
    at_map, bound = column - MARGIN, tl.cast(width - 2 * MARGIN, tl.uint32)
    first = tl.program_id(1).to(tl.int64) * rows
    last = tl.minimum(first + rows, height)
    for row in range(first - RADIUS, last + RADIUS):
        if (row >= MARGIN) & (row < height - MARGIN):
            here = partials_ptr + (row - MARGIN) * map_lanes + map_lane
            p_aa, of_aa = _add_row(of_aa, _along_x(here, at_map, bound, taps, ASIDE, RADIUS), taps, RADIUS)
            p_dd, of_dd = _add_row(of_dd, _along_x(here + step, at_map, bound, taps, ASIDE, RADIUS), taps, RADIUS)
            if x_grad[0] is not None:
                row_x = _along_x(here + 2 * step, at_map, bound, taps, ASIDE, RADIUS)
                p_x, of_x = _add_row(of_x, row_x, taps, RADIUS)
            if y_grad[0] is not None:
                row_y = _along_x(here + (3 if KEPT == 3 else 2) * step, at_map, bound, taps, ASIDE, RADIUS)
                p_y, of_y = _add_row(of_y, row_y, taps, RADIUS)
        else:
            p_aa, of_aa = _next_row(of_aa, RADIUS)
            p_dd, of_dd = _next_row(of_dd, RADIUS)
            if x_grad[0] is not None:
                p_x, of_x = _next_row(of_x, RADIUS)
            if y_grad[0] is not None:
                p_y, of_y = _next_row(of_y, RADIUS)
        at = row - RADIUS
        if at >= first:
            a, d = _pixels(x_at + at * x[3], y_at + at * y[3], column, tl.cast(width, tl.uint32))
            by_a, by_d = 2.0 * a * p_aa, 2.0 * d * p_dd
            if x_grad[0] is not None:
                to = _at(x_grad, image, channel, column) + at * x_grad[3]
                tl.store(to, (upstream * (p_x + by_a + by_d)).to(x_grad[0].dtype.element_ty), mask=inside)
            if y_grad[0] is not None:
                to = _at(y_grad, image, channel, column) + at * y_grad[3]
                tl.store(to, (upstream * (p_y + by_a - by_d)).to(y_grad[0].dtype.element_ty), mask=inside)


def _taps(window: int, sigma: float) -> tuple[float, ...]:
    exact = [math.exp(k * k / (-2 * sigma * sigma)) for k in range(window // 2 + 1)]
    total = exact[0] + 2 * sum(exact[1:])
    return tuple(tap / total for tap in exact)


def _strided(tensor: Tensor | None) -> tuple:
    return (None,) if tensor is None else (tensor, *tensor.stride())


def _layout(image: Tensor, margin: int) -> tuple[tuple[int, ...], int, int]:
    """What the kernels call size, the lanes from a column to the next, the rows of a program."""
    images, channels, height, width = image.shape
    lanes = images * channels * width
    rows = 64
    while rows > 16 and triton.cdiv(lanes, BLOCK) * triton.cdiv(height, rows) < REDUCE_PROGRAMS:
        rows //= 2
    size = (channels, height, width, lanes, images * channels * (width - 2 * margin))
    return size, channels if image.stride(1) == 1 and image.stride(3) != 1 else 1, rows


def _wide(size: tuple[int, ...]) -> bool:
    """Whether a lane's number, or one block past the last, does not fit 32 bits."""
    return size[3] >= 2**31 - BLOCK


def ssim_fwd(
    image: Tensor, image_pred: Tensor, weight: Tensor | None, window: int, sigma: float, same: bool, c1: float,
    c2: float, structure_only: bool, keep: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    margin = 0 if same else window // 2
    size, aside, rows = _layout(image, margin)
    channels, height, width, lanes, map_lanes = size
    kept = (3 + (keep == 3), height - 2 * margin, map_lanes) if keep else (0,)
    partials = image.new_empty(kept, dtype=torch.float32)
    if image.numel() == 0:
        return image.new_zeros(image.shape[:2], dtype=torch.float32), partials
    stretches = triton.cdiv(height - 2 * margin, rows)
    sums = image.new_empty((stretches, lanes), dtype=torch.float32)
    with on_device(image):
        _ssim_fwd_kernel[(triton.cdiv(lanes, BLOCK), stretches)](
            _strided(image), _strided(image_pred), _strided(weight), sums, partials, _taps(window, sigma), size, rows,
            c1, c2, margin, window // 2, structure_only, keep, aside, image.stride(3), image_pred.stride(3),
            _wide(size), BLOCK, **OPTIONS,
        )  # fmt: skip
    if aside > 1:
        return sums.view(stretches, -1, width, channels).sum((0, 2)), partials
    return sums.view(stretches, -1, channels, width).sum((0, 3)), partials


def ssim_bwd(
    grad: Tensor, partials: Tensor, image: Tensor, image_pred: Tensor, weight: Tensor | None, window: int,
    sigma: float, same: bool, c1: float, c2: float, structure_only: bool, keep: int, needs_image: bool,
    needs_image_pred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not keep:  # nobody asked for a gradient when the forward ran
        keep = needs_image + 2 * needs_image_pred
        _, partials = ssim_fwd(image, image_pred, weight, window, sigma, same, c1, c2, structure_only, keep)
    x_grad = torch.empty_like(image) if needs_image else None
    y_grad = torch.empty_like(image_pred) if needs_image_pred else None
    margin = 0 if same else window // 2
    size, aside, rows = _layout(image, margin)
    if image.numel():
        with on_device(image):
            _ssim_bwd_kernel[(triton.cdiv(size[3], BLOCK), triton.cdiv(size[1], rows))](
                grad.contiguous(), _strided(image), _strided(image_pred), _strided(x_grad), _strided(y_grad),
                partials, _taps(window, sigma), size, rows, margin, window // 2, keep, aside, _wide(size), BLOCK,
                **OPTIONS,
            )  # fmt: skip
    none = image.new_empty(0)
    return none if x_grad is None else x_grad, none if y_grad is None else y_grad


def aot_cases() -> Iterator[AotCase]:
    """Every dtype, both paddings, with and without weight, one gradient or both; other windows and layouts."""

    def case(label: str, image: Tensor, weight: Tensor | None, keep: int, **changed: Any) -> Iterator[AotCase]:
        o = {"window": 11, "sigma": 1.5, "same": True, "c1": 1e-4, "c2": 9e-4, "structure_only": False} | changed
        cut = 0 if o["same"] else o["window"] - 1
        map_lanes = image.shape[0] * image.shape[1] * (image.shape[3] - cut)
        partials = torch.empty((3 + (keep == 3), image.shape[2] - cut, map_lanes), device="meta")
        grad = torch.empty(image.shape[:2], device="meta")
        inputs = (image, image, weight, *o.values(), keep)
        yield AotCase(f"forward {label}", ssim_fwd, inputs)
        if keep:
            yield AotCase(f"backward {label}", ssim_bwd, (grad, partials, *inputs, keep & 1 > 0, keep & 2 > 0))

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype, keep in itertools.product(HALF_AND_SINGLE, range(4)):
        yield from case(
            f"{str(dtype).removeprefix('torch.')} keeps {keep}", meta(2, 3, 64, 64, dtype=dtype), None, keep
        )
    image, odd = meta(2, 3, 64, 64), meta(1, 3, 33, 65)
    yield from case("odd, valid, weight", odd, meta(1, 3, 23, 55), 3, same=False)
    yield from case("weight of an image", image, meta(2, 1, 64, 64).expand(2, 3, 64, 64), 2)
    yield from case("structure", image, None, 3, structure_only=True)
    yield from case("channels last", image.contiguous(memory_format=torch.channels_last), None, 3)
    yield from case("window 1", odd, None, 3, window=1)
    yield from case("window 5", odd, None, 2, window=5)
    yield from case("int64 planes", meta(1, 1, 65536, 32768), None, 3)
    yield from case("int64 lanes", meta(65536, 1, 16, 32768), None, 3)
