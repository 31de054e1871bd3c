"""Triton kernels for the smoothness loss of images and volumes, in their own memory order: contiguous or channels_last.

A difference along an axis belongs to one pixel: d = x[i+1] - x[i] to pixel i, and x[i+1] - 2 x[i] + x[i-1] to i as well
(`ORDER` 2). With e = exp(-mean_c |guide's difference over the same pixels|), 1 without a guide, w the weight of the
pixel, 1 without, and m = sqrt(sum_axes (e d)^2):

    kind        sums [N, C, axes]     pull p of a difference, by which the gradient of the sums is made
    l1          w e |d|               w e sign(d)
    l2          w e d^2               2 w e d
    isotropic   w m                   w e^2 d / m, 0 where m is 0

The backward gathers: a pixel's gradient is, summed over the axes, p[i-1] - p[i], or p[i-1] - 2 p[i] + p[i+1] for
second differences. So it is written once, without atomics. Bytes per element of size s: forward s, backward 2 s, and
those of guide and weight; the neighbours come from the caches, and so does a guide that several channels share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    REDUCE_PROGRAMS,
    STREAM_BLOCK,
    STREAM_OPTIONS,
    AotCase,
    added,
    broadcast_args,
    load_broadcast,
    needs_int64,
    on_device,
    sign,
    zeros,
)

KINDS = ("l1", "l2", "isotropic")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS_LAST = 31  # a program adds up each channel by itself; more are copied to be contiguous


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
def count_of(size, WIDE: tl.constexpr):
    """Elements of a unit."""
    return start_of(tl.cast(1, tl.int64 if WIDE else tl.int32), size)


@triton.jit
def spot_of(offsets, size):
    """Elements of a unit: their offsets, those of their pixels, and the coordinates x, y and z."""
    pixel = offsets // apart(size)
    return offsets, pixel, pixel % size[0], pixel // size[0] % size[1], pixel // (size[0] * size[1])


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
def _read(image_ptr, offsets, shift, mask):
    return tl.load(image_ptr + offsets + shift, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _step(
    image_ptr, guide, unit, spot, size, inside, mask,
    AXIS: tl.constexpr, ALONG: tl.constexpr, SHIFT: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Differences along ALONG of the pixels SHIFT steps along AXIS, and their factors e; 0 where `mask` is not set."""
    way, away, offsets = _way(size, AXIS), _way(size, ALONG), spot[0]
    image_ptr += start_of(unit, size)
    # the elements themselves are read under one mask, hence once for all the differences, and in whole vectors
    if SHIFT == 0:
        here = tl.load(image_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        here = _read(image_ptr, offsets, SHIFT * way * apart(size), mask)
    if SHIFT == -1 and AXIS == ALONG:
        d = tl.load(image_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - here
    else:
        d = _read(image_ptr, offsets, (SHIFT * way + away) * apart(size), mask) - here
    if ORDER == 2:
        if SHIFT == 1 and AXIS == ALONG:
            d -= here - tl.load(image_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            d -= here - _read(image_ptr, offsets, (SHIFT * way - away) * apart(size), mask)
    d = tl.where(mask, d, 0.0)
    if guide is None:
        return d, 1.0
    else:
        e = _edge(guide, unit // size[3], spot[1] + SHIFT * way, away, mask, ORDER)
        return d, tl.where(mask, e, 0.0)


@triton.jit
def weight_at(weight, unit, spot, size, mask, AXIS: tl.constexpr, SHIFT: tl.constexpr):
    """Weights of the pixels SHIFT steps along an axis, as float32.

    weight: see load_broadcast; or (pointers to the first pixels of the columns, strides of a row and of a column).
    """
    if len(weight) == 3:
        at = weight[0] + spot[3] * weight[1] + SHIFT * weight[2 if AXIS == 0 else 1]
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        return load_broadcast(weight, start_of(unit, size) + spot[0] + SHIFT * _way(size, AXIS) * apart(size), mask)


@triton.jit
def _pull(
    image_ptr, guide, weight, unit, spot, size, inside,
    AXIS: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """The pull of the difference along an axis that belongs to the pixel SHIFT steps along it; 0 if there is none."""
    mask = inside & _has(spot, size, AXIS, SHIFT, ORDER)
    w = 1.0
    if weight is not None:
        w = weight_at(weight, unit, spot, size, mask, AXIS, SHIFT)
    d, e = _step(image_ptr, guide, unit, spot, size, inside, mask, AXIS, AXIS, SHIFT, ORDER)
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
    return pull * w


@triton.jit
def smoothness_terms(
    image_ptr, guide, weight, unit, spot, size, inside, KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr
):
    """What elements add to the sums: along x, y and z, or one number if isotropic; 0 where `inside` is not set."""
    w = 1.0
    if weight is not None:
        w = weight_at(weight, unit, spot, size, inside, 0, 0)
    terms = ()
    squares = tl.zeros(spot[0].shape, tl.float32)
    for axis in tl.static_range(AXES):
        has = inside & _has(spot, size, axis, 0, ORDER)
        d, e = _step(image_ptr, guide, unit, spot, size, inside, has, axis, axis, 0, ORDER)
        if KIND == "isotropic":
            squares += d * e * d * e
        else:
            terms = terms + ((tl.abs(d) if KIND == "l1" else d * d) * e * w,)  # type: ignore[assignment]
    if KIND == "isotropic":
        terms = (tl.sqrt(squares) * w,)  # type: ignore[assignment]
    return terms


@triton.jit
def smoothness_pulled(
    image_ptr, guide, weight, unit, spot, size, inside,
    AXIS: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """The gradient of elements along an axis, per gradient of its sum."""
    before = _pull(image_ptr, guide, weight, unit, spot, size, inside, AXIS, -1, KIND, ORDER, AXES)
    here = _pull(image_ptr, guide, weight, unit, spot, size, inside, AXIS, 0, KIND, ORDER, AXES)
    pulled = before - here
    if ORDER == 2:
        pulled -= here - _pull(image_ptr, guide, weight, unit, spot, size, inside, AXIS, 1, KIND, ORDER, AXES)
    return pulled


@triton.jit
def _smoothness_fwd_kernel(
    image_ptr,  # (units, count)
    guide,  # None or a tuple, see _edge
    weight,  # None or a tuple, see load_broadcast
    out_ptr,  # (units, splits, step, AXES, or 1 if isotropic) float32
    size,  # see apart
    splits,
    used,  # lanes of a block: a multiple of step, so that a lane stays with its channel
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
    AXES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    unit = program // splits
    count = count_of(size, WIDE)
    lanes = tl.arange(0, BLOCK)
    outs: tl.constexpr = 1 if KIND == "isotropic" else AXES
    sums = zeros(outs, BLOCK)
    for start in range(program % splits * used, count, splits * used):
        offsets = start + lanes
        inside = (lanes < used) & (offsets < count)
        spot = spot_of(offsets, size)
        sums = added(sums, smoothness_terms(image_ptr, guide, weight, unit, spot, size, inside, KIND, ORDER, AXES))
    out_ptr += program.to(tl.int64) * apart(size) * outs + outs - 1
    for channel in range(apart(size)):
        own = lanes % apart(size) == channel
        for axis in tl.static_range(outs):
            tl.store(out_ptr + channel * outs - axis, tl.sum(tl.where(own, sums[axis], 0.0)))


@triton.jit
def _upstream(grad_ptr, offsets, size, outs: tl.constexpr, inside):
    """The gradient of an axis's sum: one number, or one per channel."""
    if len(size) == 5:
        return tl.load(grad_ptr + offsets % size[4] * outs, mask=inside, other=0.0)
    else:
        return tl.load(grad_ptr)


@triton.jit
def _smoothness_bwd_kernel(
    grad_ptr,  # (units, step, AXES, or 1 if isotropic) float32
    image_ptr,  # (units, count)
    guide,  # None or a tuple, see _edge
    weight,  # None or a tuple, see load_broadcast
    image_grad_ptr,  # (units, count)
    size,  # as in the forward
    splits,
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
    AXES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    unit = program // splits
    count = count_of(size, WIDE)
    offsets = program % splits * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    spot = spot_of(offsets, size)
    outs: tl.constexpr = 1 if KIND == "isotropic" else AXES
    grad_ptr += unit * apart(size) * outs + outs - 1
    total = tl.zeros((BLOCK,), tl.float32)
    for axis in tl.static_range(AXES):
        pulled = smoothness_pulled(image_ptr, guide, weight, unit, spot, size, inside, axis, KIND, ORDER, AXES)
        if KIND != "isotropic":
            pulled *= _upstream(grad_ptr - axis, offsets, size, outs, inside)
        total += pulled
    if KIND == "isotropic":
        total *= _upstream(grad_ptr, offsets, size, outs, inside)
    tl.store(image_grad_ptr + start_of(unit, size) + offsets, total.to(image_grad_ptr.dtype.element_ty), mask=inside)


def block_of(guide: Tensor | None, weight: Tensor | None, kind: str, order: int, forward: bool) -> int:
    """Elements of a program: what needs more of its neighbours at once holds more registers for each."""
    if order == 1 and guide is None:
        return 1024 if weight is not None or (kind == "isotropic" and not forward) else STREAM_BLOCK
    if order == 1 or guide is None:
        return 512
    return 256


def in_order(image: Tensor) -> Tensor:
    """`image` itself where it is contiguous or channels_last, else a contiguous copy."""
    last = torch.channels_last if image.ndim == 4 else torch.channels_last_3d
    if not image.is_contiguous() and image.shape[1] <= MAX_CHANNELS_LAST and image.is_contiguous(memory_format=last):
        return image
    return image.contiguous()


def sizes(image: Tensor) -> tuple[int, ...]:
    """Of an image in order: width, height, depth, units (planes, or 1) of an image and, if channels_last, channels."""
    channels, (*depth, height, width) = image.shape[1], image.shape[2:]
    size = width, height, depth[0] if depth else 1
    return (*size, channels) if image.is_contiguous() else (*size, 1, channels)


def guide_args(guide: Tensor | None) -> tuple | None:
    if guide is None:
        return None
    guide = in_order(guide)
    return guide, guide.shape[1], guide.stride(0), guide.stride(1), guide.stride(-1)


def smoothness_fwd(
    image_pred: Tensor, guide: Tensor | None, weight: Tensor | None, kind: str, order: int
) -> Tensor:
    images, channels, axes = *image_pred.shape[:2], image_pred.ndim - 2
    outs = 1 if kind == "isotropic" else axes
    if image_pred.numel() == 0:
        return image_pred.new_zeros((images, channels, outs), dtype=torch.float32)
    image = in_order(image_pred)
    size = sizes(image)
    step, units = image.shape[1] // size[3], images * size[3]
    block = block_of(guide, weight, kind, order, True)
    used = block // math.lcm(step, 8) * math.lcm(step, 8)  # whole channels, and 128-bit loads
    splits = min(triton.cdiv(image.numel() // units, used), triton.cdiv(REDUCE_PROGRAMS, units))
    out = image.new_empty((images, size[3], splits, step, outs), dtype=torch.float32)
    weight_args = None if weight is None else broadcast_args(weight, image)
    with on_device(image):
        _smoothness_fwd_kernel[(units * splits,)](
            image, guide_args(guide), weight_args, out, size, splits, used, kind, order, axes,
            needs_int64(image, weight, guide), block, **STREAM_OPTIONS,
        )  # fmt: skip
    return (out.sum(2) if splits > 1 else out[:, :, 0]).reshape(images, channels, outs)


def smoothness_bwd(
    grad: Tensor, image_pred: Tensor, guide: Tensor | None, weight: Tensor | None, kind: str, order: int
) -> Tensor:
    out = torch.empty_like(image_pred)
    if out.numel() == 0:
        return out
    image = in_order(image_pred)
    written = out if out.stride() == image.stride() else torch.empty_like(image)
    size = sizes(image)
    units = image.shape[0] * size[3]
    block = block_of(guide, weight, kind, order, False)
    splits = triton.cdiv(image.numel() // units, block)
    weight_args = None if weight is None else broadcast_args(weight, image)
    with on_device(image):
        _smoothness_bwd_kernel[(units * splits,)](
            grad.contiguous(), image, guide_args(guide), weight_args, written, size, splits, kind, order,
            image.ndim - 2, needs_int64(image, weight, guide), block, **STREAM_OPTIONS,
        )  # fmt: skip
    return out if written is out else out.copy_(written)


def aot_cases() -> Iterator[AotCase]:
    """Every kind and dtype; odd sizes and offsets past 32 bits; each option; volumes and channels_last with all."""
    image, volume = (2, 3, 64, 64), (1, 2, 16, 32, 64)
    everything: dict[str, Any] = {"order": 2, "guide": True, "weight": True}
    each: dict[str, dict[str, Any]] = {name: {name: value} for name, value in everything.items()}
    for kind in KINDS:
        for dtype in HALF_AND_SINGLE:
            yield from _aot_calls("", image, dtype, kind, vector=True)
        for label, more in each.items():
            yield from _aot_calls(label, image, torch.float32, kind, **more)
        yield from _aot_calls("all", volume, torch.bfloat16, kind, **everything)
        yield from _aot_calls("all, channels_last", image, torch.float32, kind, last=True, **everything)
    yield from _aot_calls("odd", (1, 3, 33, 65), torch.float32, "l1")
    yield from _aot_calls("int64", (1, 1, 65536, 32768), torch.bfloat16, "l1", vector=True)


def _aot_calls(
    label: str, shape: tuple, dtype: torch.dtype, kind: str, *,
    order: int = 1, guide: bool = False, weight: bool = False, last: bool = False, vector: bool = False,
) -> Iterator[AotCase]:  # fmt: skip
    tensor: dict[str, Any] = {"dtype": dtype, "device": "meta"}
    image = torch.empty(shape, **tensor)
    if last:
        image = image.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    edges = torch.empty((shape[0], 3, *shape[2:]), **tensor) if guide else None
    by_pixel = torch.empty((shape[0], 1, *shape[2:]), device="meta").expand(shape) if weight else None
    grad = torch.empty((*shape[:2], 1 if kind == "isotropic" else len(shape) - 2), device="meta")
    label = f"{kind} {str(dtype).removeprefix('torch.')} {len(shape) - 2}-D {label}".rstrip()
    options = (image, edges, by_pixel, kind, order)
    yield AotCase(f"forward {label}", smoothness_fwd, options, ("_smoothness_fwd_kernel",) if vector else ())
    # isotropic: most of the loads are one element off, hence narrow, whatever the size
    wide = ("_smoothness_bwd_kernel",) if vector and kind != "isotropic" else ()
    yield AotCase(f"backward {label}", smoothness_bwd, (grad, *options), wide)
