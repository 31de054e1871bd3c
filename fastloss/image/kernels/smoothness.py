"""Triton kernels for the smoothness loss of images and volumes, in their own memory order: contiguous or channels_last.

A difference along an axis belongs to one pixel: d = x[i+1] - x[i] to pixel i, and x[i+1] - 2 x[i] + x[i-1] to i as well
(`ORDER` 2). With e = exp(-mean_c |guide's difference over the same pixels|), 1 without a guide, w the weight of the
pixel, 1 without, and m = sqrt(sum_axes (e d)^2):

    kind        sums [N, C, axes]     pull p of a difference, by which the gradient of the sums is made
    l1          w e |d|               w e sign(d)
    l2          w e d^2               2 w e d
    isotropic   w m                   w e^2 d / m, 0 where m is 0

A weight of 0 excludes its differences: selected, not multiplied, so that even NaN has no effect.

The backward gathers: a pixel's gradient is, summed over the axes, p[i-1] - p[i], or p[i-1] - 2 p[i] + p[i+1] for
second differences. So it is written once, without atomics. Bytes per element of size s: forward s, backward 2 s, and
those of guide and weight; the neighbours come from the caches. The factors of a guide are made once for all channels of
an image, which a program takes in turn; with channels_last, or if isotropic, for each, and the guide from the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import added, zeros
from ...core.kernels.launch import (
    REDUCE_PROGRAMS,
    STREAM_BLOCK,
    STREAM_OPTIONS,
    AotCase,
    on_device,
    registers,
    vector_block,
)
from ...core.kernels.memory_order import needs_int64
from ...core.kernels.scaled_sum import total_launchers
from .smoothness_terms import apart, edges_of, smoothness_pulled, smoothness_terms, start_of, tile_of

KINDS = ("l1", "l2", "isotropic")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS_LAST = 31  # a program adds up each channel by itself; more are copied to be contiguous


@triton.jit
def tile_at(tile, across, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The first row and the columns of a tile of a unit."""
    return tile // across * ROWS, tile % across * COLS + tl.arange(0, COLS)


@triton.jit
def _smoothness_fwd_kernel(
    image_ptr,  # (units, count)
    guide,  # None or a tuple, see smoothness_terms.py
    weight,  # None or a tuple, see smoothness_terms.py
    out_ptr,  # (units, splits, step, AXES, or 1 if isotropic) float32
    size,  # see apart
    splits,
    across,  # tiles beside each other
    steps,  # tiles of a program, one below the other
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
    AXES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SHARED: tl.constexpr,  # a program has a tile of all the channels of an image, which share the guide's factors
):
    program = tl.program_id(0)
    unit = (program.to(tl.int64) if WIDE else program) // splits
    first, column = tile_at(program % splits, across, ROWS, COLS)
    outs: tl.constexpr = 1 if KIND == "isotropic" else AXES
    if SHARED:
        unit *= size[3]
        spot, inside = tile_of(unit, first + tl.arange(0, ROWS), column, size, AXES, WIDE)
        edges = edges_of(guide, unit // size[3], spot, size, inside, ORDER, AXES, False)
        for channel in range(size[3]):
            spot, inside = tile_of(unit + channel, first + tl.arange(0, ROWS), column, size, AXES, WIDE)
            sums = smoothness_terms(
                image_ptr, guide, weight, unit + channel, spot, size, inside, KIND, ORDER, AXES, edges
            )
            to = out_ptr + (tl.cast(unit + channel, tl.int64) * splits + program % splits) * outs + outs - 1
            for axis in tl.static_range(outs):
                tl.store(to - axis, tl.sum(sums[axis]))
    else:
        sums = zeros(outs, ROWS, COLS)
        for step in range(steps):
            row = (first * steps + step * ROWS) + tl.arange(0, ROWS)
            spot, inside = tile_of(unit, row, column, size, AXES, WIDE)
            sums = added(sums, smoothness_terms(image_ptr, guide, weight, unit, spot, size, inside, KIND, ORDER, AXES))
        out_ptr += program.to(tl.int64) * apart(size) * outs + outs - 1
        for channel in range(apart(size)):
            own = (column % apart(size) == channel)[None, :]
            for axis in tl.static_range(outs):
                tl.store(out_ptr + channel * outs - axis, tl.sum(tl.where(own, sums[axis], 0.0)))


@triton.jit
def _upstream(grad_ptr, factors, unit, spot, size, AXIS: tl.constexpr, OUTS: tl.constexpr, inside):
    """The gradient of an axis's sum: one number, or one per channel; or of a total, times the axis's factor."""
    if factors is not None:
        return tl.load(grad_ptr) * factors[OUTS - 1 - AXIS]
    grad_ptr += unit * apart(size) * OUTS + OUTS - 1 - AXIS
    if len(size) == 5:
        return tl.load(grad_ptr + spot[5] * OUTS, mask=inside, other=0.0)
    else:
        return tl.load(grad_ptr)


@triton.jit
def _write_gradient(
    grad_ptr, factors, image_ptr, guide, weight, image_grad_ptr, unit, spot, size, inside,
    KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr, edges=None,
):  # fmt: skip
    outs: tl.constexpr = 1 if KIND == "isotropic" else AXES
    total = tl.zeros(inside.shape, tl.float32)
    for axis in tl.static_range(AXES):
        pulled = smoothness_pulled(image_ptr, guide, weight, unit, spot, size, inside, axis, KIND, ORDER, AXES, edges)
        if KIND != "isotropic":
            pulled *= _upstream(grad_ptr, factors, unit, spot, size, axis, outs, inside)
        total += pulled
    if KIND == "isotropic":
        total *= _upstream(grad_ptr, factors, unit, spot, size, 0, outs, inside)
    to = image_grad_ptr + start_of(unit, size) + spot[0]
    tl.store(to, total.to(image_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _smoothness_bwd_kernel(
    grad_ptr,  # (units, step, AXES, or 1 if isotropic) float32; or one element if there are factors
    factors,  # None, or of the sum along each axis, z first
    image_ptr,  # (units, count)
    guide,  # None or a tuple, see smoothness_terms.py
    weight,  # None or a tuple, see smoothness_terms.py
    image_grad_ptr,  # (units, count)
    size,  # as in the forward
    splits,
    across,
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
    AXES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SHARED: tl.constexpr,  # as in the forward
):
    program = tl.program_id(0)
    unit = (program.to(tl.int64) if WIDE else program) // splits
    first, column = tile_at(program % splits, across, ROWS, COLS)
    row = first + tl.arange(0, ROWS)
    if SHARED:
        unit *= size[3]
        spot, inside = tile_of(unit, row, column, size, AXES, WIDE)
        edges = edges_of(guide, unit // size[3], spot, size, inside, ORDER, AXES, True)
        for channel in range(size[3]):
            spot, inside = tile_of(unit + channel, row, column, size, AXES, WIDE)
            _write_gradient(
                grad_ptr, factors, image_ptr, guide, weight, image_grad_ptr, unit + channel, spot, size, inside, KIND,
                ORDER, AXES, edges,
            )  # fmt: skip
    else:
        spot, inside = tile_of(unit, row, column, size, AXES, WIDE)
        _write_gradient(
            grad_ptr, factors, image_ptr, guide, weight, image_grad_ptr, unit, spot, size, inside, KIND, ORDER, AXES
        )


def block_of(
    guide: Tensor | None, weight: Tensor | None, kind: str, order: int, forward: bool, element_size: int = 4
) -> int:
    """Elements of a program: what needs more of its neighbours at once holds more registers for each."""
    if order == 1 and guide is None:
        if kind == "isotropic":
            return 512 if not forward else 1024 if weight is not None else STREAM_BLOCK
        long = forward and weight is None and element_size == 2
        return 4096 if long else max(1024, vector_block(element_size))
    if order == 1 or guide is None:
        return 512
    return 256


def in_order(image: Tensor) -> Tensor:
    """`image` itself where it is contiguous or channels_last, else a contiguous copy."""
    last = torch.channels_last if image.ndim == 4 else torch.channels_last_3d
    if not image.is_contiguous() and image.shape[1] <= MAX_CHANNELS_LAST and image.is_contiguous(memory_format=last):
        return image
    return image.contiguous()


def tile(size: tuple[int, ...], block: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile of `block` elements, and how many tiles a unit has beside and below each other.

    Narrow tiles have more neighbours around them, wide ones more columns that are not there.
    """
    columns, rows = size[0] * (size[4] if len(size) == 5 else 1), size[1] * size[2]
    widths = (width for width in (256, 128, 64, 32, 16) if width <= max(128, block // 8))
    wide = min(widths, key=lambda width: triton.cdiv(columns, width) * (width + 8))
    return block // wide, wide, triton.cdiv(columns, wide), triton.cdiv(rows, block // wide)


def steps_of(tiles: int, below: int) -> int:
    """Tiles of a program of a reduction: about REDUCE_PROGRAMS programs have the same number each."""
    return max(1, min(below, round(tiles / REDUCE_PROGRAMS)))


def shares(guide: Tensor | None, kind: str, size: tuple[int, ...]) -> bool:
    """Whether a program goes over all the channels of an image, see the kernels."""
    return guide is not None and kind != "isotropic" and size[3] > 1


def weight_args(weight: Tensor | None) -> tuple | None:
    """Any strides, hence any broadcast; see weight_at."""
    if weight is None:
        return None
    *by_image, rows, columns = weight.stride()
    return (weight, *by_image, *[0] * (weight.ndim == 4), rows, columns)


def aside_of(size: tuple[int, ...]) -> int:
    return size[4] if len(size) == 5 else 1


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


def _first_stage(image_pred: Tensor, guide: Tensor | None, weight: Tensor | None, kind: str, order: int) -> Tensor:
    """Sums of each program: ``[N, planes of an image, programs of a plane, channels of a pixel, directions]``."""
    images, channels, axes = *image_pred.shape[:2], image_pred.ndim - 2
    outs = 1 if kind == "isotropic" else axes
    if image_pred.numel() == 0:
        return image_pred.new_zeros((images, channels, 1, 1, outs), dtype=torch.float32)
    image = in_order(image_pred)
    size = sizes(image)
    step, units = image.shape[1] // size[3], images * size[3]
    block = block_of(guide, weight, kind, order, True, image.element_size())
    rows, columns, across, below = tile(size, block)
    shared = shares(guide, kind, size)
    steps = 1 if shared else steps_of(units * across * below, below)
    splits = across * triton.cdiv(below, steps)
    out = image.new_empty((images, size[3], splits, step, outs), dtype=torch.float32)
    with on_device(image):
        _smoothness_fwd_kernel[(images * splits if shared else units * splits,)](
            image, guide_args(guide), weight_args(weight), out, size, splits, across, steps, kind, order, axes,
            needs_int64(image, weight, guide), rows, columns, shared,
            **(STREAM_OPTIONS | {"num_warps": 8 if block == 4096 else 4}),
        )  # fmt: skip
    return out


def smoothness_fwd(image_pred: Tensor, guide: Tensor | None, weight: Tensor | None, kind: str, order: int) -> Tensor:
    out = _first_stage(image_pred, guide, weight, kind, order)
    return (out.sum(2) if out.shape[2] > 1 else out[:, :, 0]).reshape(*image_pred.shape[:2], out.shape[4])


def smoothness_bwd(
    grad: Tensor, image_pred: Tensor, guide: Tensor | None, weight: Tensor | None, kind: str, order: int,
    factors: Sequence[float] | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(image_pred)
    if out.numel() == 0:
        return out
    image = in_order(image_pred)
    written = out if out.stride() == image.stride() else torch.empty_like(image)
    size = sizes(image)
    shared = shares(guide, kind, size)
    units = image.shape[0] if shared else image.shape[0] * size[3]
    rows, columns, across, below = tile(size, block_of(guide, weight, kind, order, False, image.element_size()))
    splits = across * below
    options = STREAM_OPTIONS | (registers(255) if guide is not None and order == 2 else {})  # else it spills at 168
    with on_device(image):
        _smoothness_bwd_kernel[(units * splits,)](
            grad.contiguous(), None if factors is None else tuple(factors), image, guide_args(guide),
            weight_args(weight), written, size, splits, across, kind, order, image.ndim - 2,
            needs_int64(image, weight, guide), rows, columns, shared, **options,
        )  # fmt: skip
    return out if written is out else out.copy_(written)


smoothness_total_fwd, smoothness_total_bwd = total_launchers(
    lambda *args: _first_stage(*args).flatten(0, 3).T, smoothness_bwd
)


def aot_cases() -> Iterator[AotCase]:
    """Every kind and dtype; odd sizes and offsets past 32 bits; each option; volumes and channels_last with all."""
    image, volume = (2, 3, 64, 64), (1, 2, 16, 32, 64)
    everything: dict[str, Any] = {"order": 2, "guide": True, "weight": torch.float32}
    each: dict[str, dict[str, Any]] = {name: {name: value} for name, value in everything.items()}
    for kind in KINDS:
        for dtype in HALF_AND_SINGLE:
            yield from _aot_calls("", image, dtype, kind, vector=True)
        for label, more in each.items():
            yield from _aot_calls(label, image, torch.float32, kind, **more)
        yield from _aot_calls("all", volume, torch.bfloat16, kind, **everything)
        yield from _aot_calls("all, channels_last", image, torch.float32, kind, last=True, **everything)
    yield from _aot_calls("odd", (1, 3, 33, 65), torch.float32, "l1")
    yield from _aot_calls("mask", image, torch.float32, "l1", weight=torch.bool)
    for kind, factors in (("l1", [0.5, 0.25]), ("isotropic", [0.5])):
        args = (torch.empty(image, device="meta"), None, None, kind, 1, factors)
        yield AotCase(f"forward {kind} total", smoothness_total_fwd, args)
        yield AotCase(f"backward {kind} total", smoothness_total_bwd, (torch.empty((), device="meta"), *args))
    yield from _aot_calls("int64", (1, 1, 65536, 32768), torch.bfloat16, "l1", vector=True)


def _aot_calls(
    label: str, shape: tuple, dtype: torch.dtype, kind: str, *,
    order: int = 1, guide: bool = False, weight: torch.dtype | None = None, last: bool = False, vector: bool = False,
) -> Iterator[AotCase]:  # fmt: skip
    tensor: dict[str, Any] = {"dtype": dtype, "device": "meta"}
    image = torch.empty(shape, **tensor)
    if last:
        image = image.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    edges = torch.empty((shape[0], 3, *shape[2:]), **tensor) if guide else None
    pixels = (shape[0], 1, *shape[2:])
    by_pixel = None if weight is None else torch.empty(pixels, dtype=weight, device="meta").expand(shape)
    grad = torch.empty((*shape[:2], 1 if kind == "isotropic" else len(shape) - 2), device="meta")
    label = f"{kind} {str(dtype).removeprefix('torch.')} {len(shape) - 2}-D {label}".rstrip()
    options = (image, edges, by_pixel, kind, order)
    yield AotCase(f"forward {label}", smoothness_fwd, options, ("_smoothness_fwd_kernel",) if vector else ())
    # isotropic: most of the loads are one element off, hence narrow, whatever the size
    wide = ("_smoothness_bwd_kernel",) if vector and kind != "isotropic" else ()
    yield AotCase(f"backward {label}", smoothness_bwd, (grad, *options), wide)
