"""Triton kernels for the smoothness loss of contiguous images by first differences: they march down the rows.

A program has a stretch of rows of some columns, and carries the row it has read as the next row's own in registers: of
the image, and of the guide; a backward also the gradients by the differences along y, of which each belongs to two
rows. So all is read once but for a row per stretch, and every difference and factor is made once, but for the left
neighbour's of each lane in the backward. With a guide a program goes over all the channels of an image.

Formulas: smoothness.py. Bytes per element of size s: forward s, backward 2 s, and those of guide and weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import added, number_in, zeros
from ...core.kernels.launch import odd_number, on_device, warp_size
from ...core.kernels.memory_order import needs_int64
from ..smoothness import Inputs
from .smoothness_arguments import Image, Size, height_of, image_args, in_order, width_of
from .smoothness_rows import (
    Form,
    columns_of,
    differences,
    guide_strips,
    image_strips,
    own_mask,
    row_edges,
    row_slopes,
    row_terms,
    row_weights,
    weight_strips,
    weights_for,
)
from .smoothness_terms import start_of

# To be tuned; launchers read them anew, but launch plans do not (FASTLOSS_PLANS=0).
WARPS = 1  # of a program
WARPS_IN_FLIGHT = 4224  # that the rows are cut for: 32 on each of 132 multiprocessors
ROWS_AT_ONCE = 2  # of a turn of the loop
ROWS_AT_ONCE_WITH_GUIDE = 1  # a backward is compiled in 3 s, of two rows in 13
READ_AHEAD = False  # read the row of the next turn before this one's is computed
LEAST_ROWS, MOST_ROWS = 8, 256  # of a stretch: each reads one row more; a float32 sum of more rows loses digits
VECTOR_BYTES = 16  # of the image in a lane; with a guide half as much of 16-bit images, which takes fewer registers
LEAST_WIDTH = 64  # narrower images leave most lanes idle: they go in tiles
MOST_CHANNELS = 4  # of an image and of a guide: a lane holds them all


class Stretches(NamedTuple):
    """How planes are cut for programs."""

    rows: int  # of a stretch
    per_column: int
    per_row: int

    def odd(self) -> Stretches:
        """As a kernel takes them: see launch.odd_number."""
        return Stretches(*map(odd_number, self))


@triton.jit
def _place(program, stretches, FORM: tl.constexpr, WIDE: tl.constexpr):
    """A program's image or plane, its first row, and the first column of each lane."""
    LANES: tl.constexpr = FORM.lanes
    per_row, per_column = number_in(stretches.per_row), number_in(stretches.per_column)
    first = (program % per_row * LANES + tl.arange(0, LANES)) * FORM.span
    stretch = program // per_row
    unit, top = stretch // per_column, stretch % per_column * number_in(stretches.rows)
    if WIDE:
        unit, first = unit.to(tl.int64), first.to(tl.int64)
    return unit, top, first


@triton.jit
def _row(y, WIDE: tl.constexpr):
    """The number of a row that offsets are made of."""
    if WIDE:
        return tl.cast(y, tl.int64)
    else:
        return tl.cast(y, tl.int32)


@triton.jit
def _read(image, unit, y, first, FORM: tl.constexpr, WIDE: tl.constexpr):
    """What row `y` adds to what is known: the strips below it, of the image and of the guide, and its weights."""
    last = height_of(image.size) - 1
    row, next_row = _row(tl.minimum(y, last), WIDE), _row(tl.minimum(y + 1, last), WIDE)
    below = image_strips(image, unit, next_row, first, FORM)
    guides_below = guide_strips(image, unit, next_row, first, FORM)
    return below, guides_below, weight_strips(image, unit, row, first, FORM)


@triton.jit
def _march_fwd_kernel(
    image,  # see Image
    out_ptr,  # (programs, sums) float32
    stretches,  # see Stretches
    FORM: tl.constexpr,
    BY_CHANNEL: tl.constexpr,  # sums of each channel, else of all
    WEIGHTS: tl.constexpr,  # after the sums, those of the weights
    WIDE: tl.constexpr,
):
    OUTS: tl.constexpr = 1 if FORM.kind == "isotropic" else 2
    CHANNELS: tl.constexpr = FORM.channels
    LANES: tl.constexpr = FORM.lanes
    SPAN: tl.constexpr = FORM.span
    UNROLL: tl.constexpr = FORM.unroll
    AHEAD: tl.constexpr = FORM.ahead
    size, height = image.size, height_of(image.size)
    unit, top, first = _place(tl.program_id(0), stretches, FORM, WIDE)
    strips = image_strips(image, unit, _row(top, WIDE), first, FORM)
    guides = guide_strips(image, unit, _row(top, WIDE), first, FORM)
    sums = zeros((CHANNELS if BY_CHANNEL else 1) * OUTS, LANES, SPAN)
    weight_sums = zeros(OUTS if WEIGHTS else 0, LANES, SPAN)
    coming = ()
    if AHEAD:
        coming = _read(image, unit, top, first, FORM, WIDE)
    for y in tl.range(top, tl.minimum(top + number_in(stretches.rows), height), loop_unroll_factor=UNROLL):
        below, guides_below, weights = _read(image, unit, y, first, FORM, WIDE) if not AHEAD else coming  # type: ignore[misc]
        if AHEAD:
            coming = _read(image, unit, y + 1, first, FORM, WIDE)
        more = y + 1 < height
        edge_y, edge_x, _, _ = row_edges(guides, guides_below, FORM)
        each, total = (), zeros(OUTS, LANES, SPAN)
        for c in tl.static_range(CHANNELS):
            d_y, d_x, _, _ = differences(strips[c], below[c], FORM)
            w, _ = weights_for(weights, c)
            terms = row_terms(d_y, d_x, edge_y, edge_x, w, more, first, size, FORM)
            each, total = each + terms, added(total, terms)
        sums = added(sums, each if BY_CHANNEL else total)
        if WEIGHTS:
            for c in tl.static_range(len(weights)):
                w, _ = weights_for(weights, c)
                weight_sums = added(weight_sums, row_weights(w, more, first, size, FORM))
        strips, guides = below, guides_below
    out_ptr += tl.program_id(0).to(tl.int64) * (len(sums) + len(weight_sums))
    for k in tl.static_range(len(sums)):
        tl.store(out_ptr + k, tl.sum(sums[k]))
    for k in tl.static_range(len(weight_sums)):
        times = CHANNELS if image.weight.channel_stride is None else 1
        tl.store(out_ptr + len(sums) + k, tl.sum(weight_sums[k]) * times)


@triton.jit
def _upstream(grad_ptr, factors, scales_ptr, plane, FORM: tl.constexpr):
    """The gradients of a plane's sums along y and x; the same one twice if isotropic."""
    last: tl.constexpr = 0 if FORM.kind == "isotropic" else 1
    if factors is not None:
        return tl.load(grad_ptr) * factors[0], tl.load(grad_ptr) * factors[last]
    elif scales_ptr is not None:
        return tl.load(grad_ptr) * tl.load(scales_ptr), tl.load(grad_ptr) * tl.load(scales_ptr + last)
    else:
        grad_ptr += plane * (last + 1)
        return tl.load(grad_ptr), tl.load(grad_ptr + last)


@triton.jit
def _march_bwd_kernel(
    grad_ptr,  # (planes, 2, or 1 if isotropic) float32; or one element if there are factors or scales
    factors,  # None, or of the sum along each axis, y first
    scales_ptr,  # None, or the same in memory
    image,  # see Image
    image_grad_ptr,  # (planes, height, width)
    stretches,  # see Stretches
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
):
    CHANNELS: tl.constexpr = FORM.channels
    LANES: tl.constexpr = FORM.lanes
    SPAN: tl.constexpr = FORM.span
    UNROLL: tl.constexpr = FORM.unroll
    AHEAD: tl.constexpr = FORM.ahead
    size, height = image.size, height_of(image.size)
    # the last rows of a forward are those that the L2 cache still has
    unit, top, first = _place(tl.num_programs(0) - 1 - tl.program_id(0), stretches, FORM, WIDE)
    # the row above comes first: it has no gradient written, but gradients by differences along y that go on
    above_top = tl.maximum(top - 1, 0)
    strips = image_strips(image, unit, _row(above_top, WIDE), first, FORM)
    guides = guide_strips(image, unit, _row(above_top, WIDE), first, FORM)
    ups, above = (), zeros(CHANNELS, LANES, SPAN)
    for c in tl.static_range(CHANNELS):
        ups = ups + (_upstream(grad_ptr, factors, scales_ptr, unit * CHANNELS + c, FORM),)  # type: ignore[assignment]
    coming = ()
    if AHEAD:
        coming = _read(image, unit, above_top, first, FORM, WIDE)
    for y in tl.range(above_top, tl.minimum(top + number_in(stretches.rows), height), loop_unroll_factor=UNROLL):
        below, guides_below, weights = _read(image, unit, y, first, FORM, WIDE) if not AHEAD else coming  # type: ignore[misc]
        if AHEAD:
            coming = _read(image, unit, y + 1, first, FORM, WIDE)
        more = y + 1 < height
        edges = row_edges(guides, guides_below, FORM)
        to_ptr = image_grad_ptr + start_of(unit * CHANNELS, size) + _row(y, WIDE) * width_of(size)
        slopes = ()
        for c in tl.static_range(CHANNELS):
            d = differences(strips[c], below[c], FORM)
            along_y, along_x = row_slopes(d, edges, weights_for(weights, c), more, ups[c], first, size, FORM)
            gradient = (along_x + (above[c] - along_y)).to(image_grad_ptr.dtype.element_ty)
            mask = own_mask(first, width_of(size), FORM.whole, FORM) & (y >= top)
            tl.store(to_ptr + columns_of(first, FORM), gradient, mask=mask)
            to_ptr += tl.cast(height, first.dtype) * width_of(size)
            slopes = slopes + (along_y,)  # type: ignore[assignment]
        strips, guides, above = below, guides_below, slopes


def marches(x: Inputs) -> bool:
    """Whether these kernels compute a call; the others go in tiles, see smoothness.py."""
    image, guide = x.image_pred, x.guide
    if image.ndim != 4 or x.order != 1 or image.shape[3] < LEAST_WIDTH or image.numel() == 0:
        return False
    if not image.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last):
        return False
    return guide is None or max(image.shape[1], guide.shape[1]) <= MOST_CHANNELS


def _form(image: Image, kind: str, backward: bool) -> Form:
    """`image`: the kernels' argument."""
    guide, weight, planes = image.guide, image.weight, image.size.planes
    span = VECTOR_BYTES // image.ptr.element_size() if guide.ptr is None else 4
    whole, whole_guide, whole_weight = (bool(of.fours or of.eights) for of in (image.size, guide, weight))
    rows_at_once = ROWS_AT_ONCE if guide.ptr is None else ROWS_AT_ONCE_WITH_GUIDE
    return Form(
        kind, 1 if guide.ptr is None else planes, guide.channels or 0, span, WARPS * warp_size(), backward,
        rows_at_once, READ_AHEAD, whole, whole and whole_guide and guide.pixel_stride == 1,
        whole and whole_weight and weight.x_stride == 1,
    )  # fmt: skip


def _stretches(size: Size, units: int, form: Form) -> Stretches:
    per_row = triton.cdiv(size.width, form.lanes * form.span)
    rows = triton.cdiv(size.height * units * per_row * WARPS, WARPS_IN_FLIGHT)
    rows = min(max(rows, LEAST_ROWS), MOST_ROWS)
    per_column = triton.cdiv(size.height, rows)
    return Stretches(triton.cdiv(size.height, per_column), per_column, per_row)


class _Call(NamedTuple):
    """What both directions need."""

    image: Image
    stretches: Stretches
    form: Form
    wide: bool
    programs: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": WARPS, "enable_fp_fusion": True}


def _call(x: Inputs, backward: bool) -> _Call:
    image = image_args(in_order(x.image_pred), x)
    size, argument = image.size, image.odd()
    form = _form(argument, x.kind, backward)
    if form.channels > 1 and x.weight is not None and x.weight.stride(1) == 0:  # shared
        argument = argument._replace(weight=argument.weight._replace(channel_stride=None))
    units = x.image_pred.shape[0] * size.planes // form.channels
    stretches = _stretches(size, units, form)
    programs = units * stretches.per_column * stretches.per_row
    return _Call(argument, stretches, form, needs_int64(image.ptr, x.weight, image.guide.ptr), programs)


def march_sums(x: Inputs, by_channel: bool, weights: bool = False) -> Tensor:
    """Sums of each program: ``[programs, channels that it goes over, directions]`` by channel, its last two as one;
    else ``[programs, directions]``, or with `weights`, whose sums come after, twice as many."""
    call = _call(x, False)
    outs = 1 if x.kind == "isotropic" else 2
    count = outs * (call.form.channels if by_channel else 1) + weights * outs
    out = x.image_pred.new_empty((call.programs, count), dtype=torch.float32)
    with on_device(out):
        _march_fwd_kernel[(call.programs,)](
            call.image, out, call.stretches.odd(), call.form, by_channel, weights, call.wide, **call.options
        )
    return out


def march_gradient(
    grad: Tensor, x: Inputs, written: Tensor, factors: tuple[float, ...] | None, scales: Tensor | None
) -> None:
    """Write the gradient of the sums; with `factors` that of the scaled sum, with `scales` the same from memory."""
    call = _call(x, True)
    with on_device(written):
        _march_bwd_kernel[(call.programs,)](
            grad, factors, scales, call.image, written, call.stretches.odd(), call.form, call.wide, **call.options
        )
