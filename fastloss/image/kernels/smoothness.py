"""Triton kernels for the smoothness loss of images and volumes, in their own memory order: contiguous or channels_last.

A difference along an axis belongs to one pixel: d = x[i+1] - x[i] to pixel i, and x[i+1] - 2 x[i] + x[i-1] to i as well
(`ORDER` 2). With e = exp(-mean_c |guide's difference over the same pixels|), 1 without a guide, w the weight of the
pixel, 1 without, and m = sqrt(sum_axes (e d)^2):

    kind        sums [N, C, axes]     their gradient g by a difference
    l1          w e |d|               w e sign(d)
    l2          w e d^2               2 w e d
    isotropic   w m                   w e^2 d / m, 0 where m is 0

A weight of 0 excludes its differences: selected, not multiplied, so that even NaN has no effect.

The backward gathers: a pixel's gradient is, summed over the axes, g[i-1] - g[i], or g[i-1] - 2 g[i] + g[i+1] for
second differences. So it is written once, without atomics. Bytes per element of size s: forward s, backward 2 s, and
those of guide and weight; the neighbours come from the caches. The factors of a guide are made once for all channels of
an image, which a program takes in turn; with channels_last, or if isotropic, for each, and the guide from the caches.

The kernels here go in tiles. Contiguous images by first differences have others: smoothness_march.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

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
from ...core.kernels.scaled_sum import total_of, weighted_total_of
from ..smoothness import Grads, Inputs, Saved, weight_counts
from .smoothness_arguments import Size, image_args, in_order
from .smoothness_march import march_gradient, march_sums, marches
from .smoothness_terms import edges_of, pixel_stride, smoothness_grad, smoothness_terms, start_of, tile_of

KINDS = ("l1", "l2", "isotropic")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
ABOUT_THE_BEST = 1.15  # times the cost of the best: see tiles_of


class Block(NamedTuple):
    """Of a program's tile."""

    rows: int
    columns: int


class Tiles(NamedTuple):
    """How a plane is cut into tiles."""

    block: Block
    per_row: int
    per_column: int


@triton.jit
def tile_at(tile, tiles_per_row, BLOCK: tl.constexpr):
    """The first row and the columns of a tile of a plane."""
    COLUMNS: tl.constexpr = BLOCK.columns
    return tile // tiles_per_row * BLOCK.rows, tile % tiles_per_row * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit(do_not_specialize=["splits", "tiles_per_row"], do_not_specialize_on_alignment=["steps"])
def _smoothness_fwd_kernel(
    image,  # see Image
    out_ptr,  # (planes, splits, pixel_stride, AXES, or 1 if isotropic) float32
    splits,  # programs of a plane
    tiles_per_row,
    steps,  # tiles of a program, one below the other
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
    AXES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,  # see Block
    SHARED: tl.constexpr,  # a program has a tile of all the channels of an image, which share the guide's factors
):
    ROWS: tl.constexpr = BLOCK.rows
    size = image.size
    program = tl.program_id(0)
    plane = (program.to(tl.int64) if WIDE else program) // splits
    first, column = tile_at(program % splits, tiles_per_row, BLOCK)
    outs: tl.constexpr = 1 if KIND == "isotropic" else AXES
    if SHARED:
        plane *= size.planes
        pixels, inside = tile_of(plane, first + tl.arange(0, ROWS), column, size, AXES, WIDE)
        edges = edges_of(image, plane, pixels, inside, ORDER, AXES, False)
        for channel in range(size.planes):
            pixels, inside = tile_of(plane + channel, first + tl.arange(0, ROWS), column, size, AXES, WIDE)
            sums = smoothness_terms(image, plane + channel, pixels, inside, KIND, ORDER, AXES, edges)
            sum_ptr = out_ptr + (tl.cast(plane + channel, tl.int64) * splits + program % splits) * outs + outs - 1
            for axis in tl.static_range(outs):
                tl.store(sum_ptr - axis, tl.sum(sums[axis]))
    else:
        COLUMNS: tl.constexpr = BLOCK.columns
        sums = zeros(outs, ROWS, COLUMNS)
        for step in range(steps):
            row = (first * steps + step * ROWS) + tl.arange(0, ROWS)
            pixels, inside = tile_of(plane, row, column, size, AXES, WIDE)
            sums = added(sums, smoothness_terms(image, plane, pixels, inside, KIND, ORDER, AXES))
        out_ptr += program.to(tl.int64) * pixel_stride(size) * outs + outs - 1
        for channel in range(pixel_stride(size)):
            is_channel = (column % pixel_stride(size) == channel)[None, :]
            for axis in tl.static_range(outs):
                tl.store(out_ptr + channel * outs - axis, tl.sum(tl.where(is_channel, sums[axis], 0.0)))


@triton.jit
def _upstream(grad_ptr, factors, scales_ptr, plane, pixels, size, AXIS: tl.constexpr, OUTS: tl.constexpr, inside):
    """The gradient of an axis's sum: one number, or one per channel; or of a scaled sum, times the axis's factor."""
    if factors is not None:
        return tl.load(grad_ptr) * factors[OUTS - 1 - AXIS]
    elif scales_ptr is not None:
        return tl.load(grad_ptr) * tl.load(scales_ptr + OUTS - 1 - AXIS)
    elif size.pixel_stride is None:  # no branch after a return: triton 3.6 would give both one type
        return tl.load(grad_ptr + plane * OUTS + OUTS - 1 - AXIS)
    else:
        grad_ptr += plane * pixel_stride(size) * OUTS + OUTS - 1 - AXIS
        return tl.load(grad_ptr + pixels.channel * OUTS, mask=inside, other=0.0)


@triton.jit
def _write_gradient(
    grad_ptr, factors, scales_ptr, image, image_grad_ptr, plane, pixels, inside,
    KIND: tl.constexpr, ORDER: tl.constexpr, AXES: tl.constexpr, edges=None,
):  # fmt: skip
    outs: tl.constexpr = 1 if KIND == "isotropic" else AXES
    total = tl.zeros(inside.shape, tl.float32)
    for axis in tl.static_range(AXES):
        grad = smoothness_grad(image, plane, pixels, inside, axis, KIND, ORDER, AXES, edges)
        if KIND != "isotropic":
            grad *= _upstream(grad_ptr, factors, scales_ptr, plane, pixels, image.size, axis, outs, inside)
        total += grad
    if KIND == "isotropic":
        total *= _upstream(grad_ptr, factors, scales_ptr, plane, pixels, image.size, 0, outs, inside)
    to_ptr = image_grad_ptr + start_of(plane, image.size) + pixels.offset
    tl.store(to_ptr, total.to(image_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits", "tiles_per_row"])
def _smoothness_bwd_kernel(
    grad_ptr,  # (planes, pixel_stride, AXES, or 1 if isotropic) float32; or one element if there are factors
    factors,  # None, or of the sum along each axis, z first
    scales_ptr,  # None, or the same in memory
    image,  # see Image
    image_grad_ptr,  # (images, planes, pixels, pixel_stride), as the image
    splits,  # tiles of a plane
    tiles_per_row,
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
    AXES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,  # see Block
    SHARED: tl.constexpr,  # as in the forward
):
    ROWS: tl.constexpr = BLOCK.rows
    size = image.size
    program = tl.program_id(0)
    plane = (program.to(tl.int64) if WIDE else program) // splits
    first, column = tile_at(program % splits, tiles_per_row, BLOCK)
    row = first + tl.arange(0, ROWS)
    if SHARED:
        plane *= size.planes
        pixels, inside = tile_of(plane, row, column, size, AXES, WIDE)
        edges = edges_of(image, plane, pixels, inside, ORDER, AXES, True)
        for channel in range(size.planes):
            pixels, inside = tile_of(plane + channel, row, column, size, AXES, WIDE)
            _write_gradient(
                grad_ptr, factors, scales_ptr, image, image_grad_ptr, plane + channel, pixels, inside,
                KIND, ORDER, AXES, edges,
            )  # fmt: skip
    else:
        pixels, inside = tile_of(plane, row, column, size, AXES, WIDE)
        _write_gradient(grad_ptr, factors, scales_ptr, image, image_grad_ptr, plane, pixels, inside, KIND, ORDER, AXES)


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


def tiles_of(size: Size, elements: int) -> Tiles:
    """How a plane is cut into tiles of so many elements.

    Narrow tiles have more neighbours around them, wide ones more columns that are not there. The widest of about the
    best are taken, so that images of many sizes have the same kernels: wider than 192, those of 128 columns.
    """
    columns, rows = size.width * (size.pixel_stride or 1), size.height * size.depth
    widths = [width for width in (256, 128, 64, 32, 16) if width <= max(128, elements // 8)]
    costs = [triton.cdiv(columns, width) * (width + 8) for width in widths]
    block_columns = next(w for w, cost in zip(widths, costs, strict=True) if cost <= ABOUT_THE_BEST * min(costs))
    block_rows = elements // block_columns
    return Tiles(Block(block_rows, block_columns), triton.cdiv(columns, block_columns), triton.cdiv(rows, block_rows))


def steps_of(planes: int, tiles: Tiles) -> int:
    """Tiles of a program of a reduction: about REDUCE_PROGRAMS programs have the same number each."""
    count = planes * tiles.per_row * tiles.per_column
    return max(1, min(tiles.per_column, round(count / REDUCE_PROGRAMS)))


def shares_edges(guide: Tensor | None, kind: str, size: Size) -> bool:
    """Whether a program goes over all the channels of an image, see the kernels."""
    return guide is not None and kind != "isotropic" and size.planes > 1


def _first_stage(x: Inputs) -> Tensor:
    """Sums of each program: ``[N, planes of an image, programs of a plane, channels of a pixel, directions]``."""
    images, channels, axes = *x.image_pred.shape[:2], x.image_pred.ndim - 2
    outs = 1 if x.kind == "isotropic" else axes
    if x.image_pred.numel() == 0:
        return x.image_pred.new_zeros((images, channels, 1, 1, outs), dtype=torch.float32)
    pred = in_order(x.image_pred)
    image = image_args(pred, x)
    size, planes = image.size, images * image.size.planes
    elements = block_of(x.guide, x.weight, x.kind, x.order, True, pred.element_size())
    tiles, shared = tiles_of(size, elements), shares_edges(x.guide, x.kind, size)
    steps = 1 if shared else steps_of(planes, tiles)
    splits = tiles.per_row * triton.cdiv(tiles.per_column, steps)
    out = pred.new_empty((images, size.planes, splits, size.pixel_stride or 1, outs), dtype=torch.float32)
    with on_device(pred):
        _smoothness_fwd_kernel[(images * splits if shared else planes * splits,)](
            image.odd(), out, splits, tiles.per_row, steps, x.kind, x.order, axes,
            needs_int64(pred, x.weight, image.guide.ptr), tiles.block, shared,
            **(STREAM_OPTIONS | {"num_warps": 8 if elements == 4096 else 4}),
        )  # fmt: skip
    return out


def smoothness_fwd(x: Inputs) -> Tensor:
    if marches(x):
        images, channels = x.image_pred.shape[:2]
        out = march_sums(x, by_channel=True)
        together = channels if x.guide is not None else 1
        by_unit = out.reshape(images * channels // together, -1, out.shape[1])
        by_unit = by_unit.sum(1) if by_unit.shape[1] > 1 else by_unit[:, 0]
        return by_unit.reshape(images, channels, out.shape[1] // together)
    out = _first_stage(x)
    by_plane = out.sum(2) if out.shape[2] > 1 else out[:, :, 0]
    return by_plane.reshape(*x.image_pred.shape[:2], out.shape[4])


def smoothness_total_fwd(x: Inputs, factors: list[float]) -> Tensor:
    return total_of(_totals(x), factors)


def smoothness_mean_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    assert x.weight is not None
    if marches(x):
        both = march_sums(x, by_channel=False, weights=True).T
        sums, weights = both.chunk(2)
    else:
        counts = [count.sum() for count in weight_counts(x.image_pred, x.weight, x.kind, x.order)]
        sums, weights = _totals(x), torch.stack(counts)[:, None]
    out, scales = weighted_total_of(sums, weights)
    return out, Saved(scales)


def _totals(x: Inputs) -> Tensor:
    """Sums of each program over all channels: ``[directions, programs]``."""
    if marches(x):
        return march_sums(x, by_channel=False).T
    return _first_stage(x).flatten(0, 3).T


def smoothness_bwd(grad: Tensor, x: Inputs) -> Grads:
    return Grads(_gradient(grad, x, None))


def smoothness_total_bwd(grad: Tensor, x: Inputs, factors: list[float]) -> Grads:
    return Grads(_gradient(grad, x, tuple(factors)))


def smoothness_mean_bwd(grad: Tensor, x: Inputs, saved: Saved) -> Grads:
    return Grads(_gradient(grad, x, None, saved.scales))


def _gradient(grad: Tensor, x: Inputs, factors: tuple[float, ...] | None, scales: Tensor | None = None) -> Tensor:
    """Of the sums; with `factors` of the scaled sum, with `scales` the same, factors in memory."""
    out = torch.empty_like(x.image_pred)
    if out.numel() == 0:
        return out
    pred = in_order(x.image_pred)
    written = out if out.stride() == pred.stride() else torch.empty_like(pred)
    if marches(x):
        march_gradient(grad.contiguous(), x._replace(image_pred=pred), written, factors, scales)
        return out if written is out else out.copy_(written)
    image = image_args(pred, x)
    shared = shares_edges(x.guide, x.kind, image.size)
    planes = pred.shape[0] if shared else pred.shape[0] * image.size.planes
    tiles = tiles_of(image.size, block_of(x.guide, x.weight, x.kind, x.order, False, pred.element_size()))
    splits = tiles.per_row * tiles.per_column
    options = STREAM_OPTIONS | (registers(255) if x.guide is not None and x.order == 2 else {})  # else it spills at 168
    with on_device(pred):
        _smoothness_bwd_kernel[(planes * splits,)](
            grad.contiguous(), factors, scales, image.odd(), written, splits, tiles.per_row, x.kind, x.order,
            pred.ndim - 2, needs_int64(pred, x.weight, image.guide.ptr), tiles.block, shared, **options,
        )  # fmt: skip
    return out if written is out else out.copy_(written)


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
        x = Inputs(torch.empty(image, device="meta"), None, None, kind, 1)
        yield AotCase(f"forward {kind} total", smoothness_total_fwd, (x, factors))
        yield AotCase(f"backward {kind} total", smoothness_total_bwd, (torch.empty((), device="meta"), x, factors))
    for kind, dtype in itertools.product(KINDS, (torch.float32, torch.bfloat16)):
        pred, weight = torch.empty(image, dtype=dtype, device="meta"), torch.empty((2, 1, 64, 64), device="meta")
        x = Inputs(pred, pred, weight.expand(image), kind, 1)
        label = f"mean {kind} {str(dtype).removeprefix('torch.')}"
        yield AotCase(f"forward {label}", smoothness_mean_fwd, (x,))
        one, scales = torch.empty((), device="meta"), Saved(torch.empty(1 if kind == "isotropic" else 2, device="meta"))
        yield AotCase(f"backward {label}", smoothness_mean_bwd, (one, x, scales))
        last = x._replace(image_pred=pred.contiguous(memory_format=torch.channels_last))
        yield AotCase(f"backward {label}, channels_last", smoothness_mean_bwd, (one, last, scales))
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
    x = Inputs(image, edges, by_pixel, kind, order)
    yield AotCase(f"forward {label}", smoothness_fwd, (x,), ("_smoothness_fwd_kernel",) if vector else ())
    # isotropic: most of the loads are one element off, hence narrow, whatever the size
    wide = ("_smoothness_bwd_kernel",) if vector and kind != "isotropic" else ()
    yield AotCase(f"backward {label}", smoothness_bwd, (grad, x), wide)
