"""Triton kernels for the statistics of DISTS: up to 64 layers in one launch, a program a plane (a sample's channel).

With d = f - t, m the mean over the plane's n pixels, and x' = x - m_x:

    statistics      m_f, m_d, mean f'^2, mean t'^2, mean d'^2, with gradients g_0 .. g_4
    gradient of d   (g_1 + 2 g_4 d') / n
    gradient of f   (g_0 + 2 g_2 f') / n + that of d
    gradient of t   2 g_3 t' / n - that of d

Each lane keeps the sum of what it has read, with what rounding took from it, and the sum of squares about the mean so
far (Welford's update); at the end the lanes are merged about the common mean, which is formed in float64. So one pass
gives the digits of two; those of a mean near zero count, for there the gradient is divided by it.

Bytes per element of size s: forward 2 s, backward 3 s with one gradient, 4 s with both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import STREAM_OPTIONS, AotCase, on_device, registers, warp_size
from ...core.kernels.layer_table import MOST, UNIT, Table, columns_of, layer_of, number_of, pointer_of, start_of
from ..dists import Inputs, Needs, Saved


class Pointers(NamedTuple):
    """Columns of a launch, see layer_table.py: of each layer a pointer, (samples * channels, pixels)."""

    features: Any
    targets: Any
    feature_grads: Any = None
    target_grads: Any = None


class Layers(NamedTuple):
    """Likewise, a number of each layer."""

    starts: Any  # its first plane in the launch
    channels: Any
    columns: Any  # its first column in stats
    units: Any  # its pixels, in Table.unit


@triton.jit
def _add(x, total, lost):
    """`total` plus x, and what rounding took from it (Kahan)."""
    x = x - lost
    after = total + x
    return after, (after - total) - x


@triton.jit
def _merged(of_lanes, square, weight, mean, n):
    """The mean in float32, what rounding left of it, and the mean square about it, of lanes with means of their own."""
    whole = mean.to(tl.float32)
    rest = (mean - whole).to(tl.float32)
    off = of_lanes - whole - rest
    return whole, rest, tl.sum(square + off * off * weight) / n


@triton.jit(do_not_specialize=["all_channels", "per_stat"])
def _dists_fwd_kernel(
    pointers,  # Pointers
    stats_ptr,  # (5, samples, all_channels) float32
    rest_ptr,  # (3, samples, all_channels) float32: what rounding left of the means of f, t and d
    layers,  # Layers
    all_channels,
    per_stat,  # samples * all_channels
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    layer = layer_of(program, layers.starts, TABLE)
    plane = program - start_of(layer, layers.starts, TABLE).to(tl.int32)
    count = number_of(layers.units, layer, layers.starts, TABLE).to(tl.int32) * TABLE.unit
    f_ptr = pointer_of(pointers.features, layer, layers.starts, TABLE) + plane.to(tl.int64) * count
    t_ptr = pointer_of(pointers.targets, layer, layers.starts, TABLE) + plane.to(tl.int64) * count
    total_f = tl.zeros((BLOCK,), tl.float32)
    total_t = tl.zeros((BLOCK,), tl.float32)
    lost_f = tl.zeros((BLOCK,), tl.float32)
    lost_t = tl.zeros((BLOCK,), tl.float32)
    total_d = tl.zeros((BLOCK,), tl.float32)
    lost_d = tl.zeros((BLOCK,), tl.float32)
    square_f = tl.zeros((BLOCK,), tl.float32)
    square_t = tl.zeros((BLOCK,), tl.float32)
    square_d = tl.zeros((BLOCK,), tl.float32)
    lanes = tl.arange(0, BLOCK)
    for k in tl.range(0, (count + BLOCK - 1) // BLOCK, loop_unroll_factor=2):
        mask = lanes < count - k * BLOCK
        f = tl.load(f_ptr + k * BLOCK + lanes, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + k * BLOCK + lanes, mask=mask, other=0.0).to(tl.float32)
        before = 1.0 / tl.maximum(k, 1)
        weight_of_new = 1.0 / (k + 1)
        step_f = f - total_f * before
        step_t = t - total_t * before
        step_d = f - t - total_d * before
        total_f, lost_f = _add(f, total_f, lost_f)
        total_t, lost_t = _add(t, total_t, lost_t)
        total_d, lost_d = _add(f - t, total_d, lost_d)
        square_f += tl.where(mask, step_f * (f - total_f * weight_of_new), 0.0)
        square_t += tl.where(mask, step_t * (t - total_t * weight_of_new), 0.0)
        square_d += tl.where(mask, step_d * (f - t - total_d * weight_of_new), 0.0)
    n = count.to(tl.float32)
    weight = (tl.maximum(count - lanes + BLOCK - 1, 0) // BLOCK).to(tl.float32)  # how many pixels a lane has read
    one = 1.0 / tl.maximum(weight, 1.0)
    mean_f = tl.sum(total_f.to(tl.float64) - lost_f) / n
    mean_t = tl.sum(total_t.to(tl.float64) - lost_t) / n
    mean_d = tl.sum(total_d.to(tl.float64) - lost_d) / n  # of the rounded differences, which the gradient takes it from
    whole_f, rest_f, all_f = _merged(total_f * one, square_f, weight, mean_f, n)
    whole_t, rest_t, all_t = _merged(total_t * one, square_t, weight, mean_t, n)
    whole_d, rest_d, all_d = _merged(total_d * one, square_d, weight, mean_d, n)
    of_channels = number_of(layers.channels, layer, layers.starts, TABLE).to(tl.int32)
    column = number_of(layers.columns, layer, layers.starts, TABLE).to(tl.int32) + plane % of_channels
    offset = (plane // of_channels).to(tl.int64) * all_channels + column
    out_ptr = stats_ptr + offset
    tl.store(out_ptr, whole_f)
    tl.store(out_ptr + per_stat, whole_d)
    tl.store(out_ptr + 2 * per_stat, all_f)
    tl.store(out_ptr + 3 * per_stat, all_t)
    tl.store(out_ptr + 4 * per_stat, all_d)
    tl.store(rest_ptr + offset, rest_f)
    tl.store(rest_ptr + per_stat + offset, whole_t - (whole_f - whole_d) + rest_t)
    tl.store(rest_ptr + 2 * per_stat + offset, rest_d)


@triton.jit(do_not_specialize=["all_channels", "per_stat"])
def _dists_bwd_kernel(
    grad_ptr,  # (5, samples, all_channels) float32
    stats_ptr,  # likewise
    rest_ptr,  # (3, samples, all_channels) float32
    pointers,  # Pointers
    layers,  # Layers
    all_channels,
    per_stat,  # samples * all_channels
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    layer = layer_of(program, layers.starts, TABLE)
    plane = program - start_of(layer, layers.starts, TABLE).to(tl.int32)
    count = number_of(layers.units, layer, layers.starts, TABLE).to(tl.int32) * TABLE.unit
    first = plane.to(tl.int64) * count
    f_ptr = pointer_of(pointers.features, layer, layers.starts, TABLE) + first
    t_ptr = pointer_of(pointers.targets, layer, layers.starts, TABLE) + first
    of_channels = number_of(layers.channels, layer, layers.starts, TABLE).to(tl.int32)
    column = number_of(layers.columns, layer, layers.starts, TABLE).to(tl.int32) + plane % of_channels
    offset = (plane // of_channels).to(tl.int64) * all_channels + column
    mean_f = tl.load(stats_ptr + offset)
    mean_d = tl.load(stats_ptr + per_stat + offset)
    mean_t = mean_f - mean_d
    rest_f = tl.load(rest_ptr + offset)
    rest_t = tl.load(rest_ptr + per_stat + offset)
    rest_d = tl.load(rest_ptr + 2 * per_stat + offset)
    scale = 1.0 / count.to(tl.float32)
    constant_f = scale * tl.load(grad_ptr + offset)
    constant_d = scale * tl.load(grad_ptr + per_stat + offset)
    slope_f = 2.0 * scale * tl.load(grad_ptr + 2 * per_stat + offset)
    slope_t = 2.0 * scale * tl.load(grad_ptr + 3 * per_stat + offset)
    slope_d = 2.0 * scale * tl.load(grad_ptr + 4 * per_stat + offset)
    lanes = tl.arange(0, BLOCK)
    for k in tl.range(0, (count + BLOCK - 1) // BLOCK, loop_unroll_factor=2):
        offsets = k * BLOCK + lanes
        mask = lanes < count - k * BLOCK
        f = tl.load(f_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d = constant_d + slope_d * (f - t - mean_d - rest_d)
        if pointers.feature_grads is not None:
            to_ptr = pointer_of(pointers.feature_grads, layer, layers.starts, TABLE) + first
            g = constant_f + slope_f * (f - mean_f - rest_f) + d
            tl.store(to_ptr + offsets, g.to(to_ptr.dtype.element_ty), mask=mask)
        if pointers.target_grads is not None:
            other_ptr = pointer_of(pointers.target_grads, layer, layers.starts, TABLE) + first
            g = slope_t * (t - mean_t - rest_t) - d
            tl.store(other_ptr + offsets, g.to(other_ptr.dtype.element_ty), mask=mask)


def _block() -> int:
    """Pixels of a step: eight of each plane in every thread."""
    return 8 * STREAM_OPTIONS["num_warps"] * warp_size()


class _Launch(NamedTuple):
    programs: int
    pointers: Pointers
    layers: Layers
    all_channels: int
    per_stat: int
    table: Table


def _launches(sides: Pointers) -> Iterator[_Launch]:
    """For the layers' tensors of all sides."""
    features = sides.features
    samples = features[0].shape[0]
    *columns, all_channels = itertools.accumulate((f.shape[1] for f in features), initial=0)
    for low in range(0, len(features), MOST):
        part = slice(low, low + MOST)
        channels = [f.shape[1] for f in features[part]]
        pixels = [f.shape[2] * f.shape[3] for f in features[part]]
        unit = UNIT if all(n % UNIT == 0 for n in pixels) else 1
        *starts, programs = itertools.accumulate((samples * c for c in channels), initial=0)
        numbers = Layers(starts, channels, columns[part], [n // unit for n in pixels])
        chosen = Pointers(*(None if side is None else side[part] for side in sides))
        layers, pointers, _, table = columns_of(numbers, chosen, unit=unit)
        yield _Launch(programs, pointers, layers, all_channels, samples * all_channels, table)


def dists_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    model, channels = x.features[0], sum(f.shape[1] for f in x.features)
    stats = model.new_empty((5, model.shape[0], channels), dtype=torch.float32)
    rest = torch.empty_like(stats[:3])
    sides = Pointers([f.contiguous() for f in x.features], [t.contiguous() for t in x.targets])
    with on_device(stats):
        for launch in _launches(sides) if stats.numel() > 0 else ():
            options = STREAM_OPTIONS | (registers(144) if launch.table.unit == 1 else {})  # else ptxas spills at 128
            _dists_fwd_kernel[(launch.programs,)](
                launch.pointers, stats, rest, launch.layers, launch.all_channels, launch.per_stat, launch.table,
                _block(), **options,
            )  # fmt: skip
    return stats, Saved(rest)


def dists_bwd(grad: Tensor, x: Inputs, stats: Tensor, saved: Saved, needs: Needs) -> list[Tensor]:
    grad = grad.contiguous()
    read = [[t.contiguous() for t in tensors] for tensors in x]
    grads = [
        [torch.empty_like(t) for t in tensors] if needed else None for tensors, needed in zip(read, needs, strict=True)
    ]
    with on_device(grad):
        for launch in _launches(Pointers(*read, *grads)) if stats.numel() > 0 else ():
            _dists_bwd_kernel[(launch.programs,)](
                grad, stats, saved.rest, launch.pointers, launch.layers, launch.all_channels, launch.per_stat,
                launch.table, _block(), **STREAM_OPTIONS,
            )  # fmt: skip
    return [gradient for side in grads if side is not None for gradient in side]


def aot_cases() -> Iterator[AotCase]:
    """Every dtype and set of gradients, even and odd planes, many layers, planes of which the list passes 2^31."""
    even = ((2, 3, 32, 32), (2, 64, 16, 16), (2, 128, 8, 8))
    lists = {"": even, "odd": ((1, 3, 33, 65), (1, 7, 5, 3)), "10 layers": even[1:2] * 10,
             "int64": ((4, 64, 8192, 8192),) * 2}  # fmt: skip
    for dtype, (label, shapes) in itertools.product((torch.float32, torch.bfloat16, torch.float16), lists.items()):
        features = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        stats = torch.empty(5, shapes[0][0], sum(shape[1] for shape in shapes), device="meta")
        name = f"{str(dtype).removeprefix('torch.')} {label}".rstrip()
        wide = () if label == "odd" else ("_dists_fwd_kernel", "_dists_bwd_kernel")
        x = Inputs(features, features)
        yield AotCase(f"forward {name}", dists_fwd, (x,), wide)
        for needs in ((True, False), (False, True), (True, True)):
            args = (stats, x, stats, Saved(stats[:3]), Needs(*needs))
            yield AotCase(f"backward {name} {needs}", dists_bwd, args, wide)
