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
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import STREAM_OPTIONS, AotCase, on_device, registers, warp_size
from .layer_table import MOST, UNIT, columns_of, layer_of, number_of, pointer_of, start_of


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


@triton.jit(do_not_specialize=["all_channels", "table"])
def _dists_fwd_kernel(
    features,  # columns, see layer_table.py: a pointer a layer, (samples * channels, pixels)
    targets,  # likewise
    stats_ptr,  # (5, samples, all_channels) float32
    rest_ptr,  # (3, samples, all_channels) float32: what rounding left of the means of f, t and d
    starts,  # of each layer: its first plane in the launch
    channels,
    firsts,  # its first column in stats
    units,  # its pixels, in UNIT
    all_channels,
    table,  # samples * all_channels
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    layer = layer_of(program, starts, DTYPE)
    plane = program - start_of(layer, starts, DTYPE).to(tl.int32)
    count = number_of(units, layer, starts, DTYPE).to(tl.int32) * UNIT
    f_ptr = pointer_of(features, layer, starts, DTYPE, ALIGNED) + plane.to(tl.int64) * count
    t_ptr = pointer_of(targets, layer, starts, DTYPE, ALIGNED) + plane.to(tl.int64) * count
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
        share = 1.0 / (k + 1)
        step_f = f - total_f * before
        step_t = t - total_t * before
        step_d = f - t - total_d * before
        total_f, lost_f = _add(f, total_f, lost_f)
        total_t, lost_t = _add(t, total_t, lost_t)
        total_d, lost_d = _add(f - t, total_d, lost_d)
        square_f += tl.where(mask, step_f * (f - total_f * share), 0.0)
        square_t += tl.where(mask, step_t * (t - total_t * share), 0.0)
        square_d += tl.where(mask, step_d * (f - t - total_d * share), 0.0)
    n = count.to(tl.float32)
    weight = (tl.maximum(count - lanes + BLOCK - 1, 0) // BLOCK).to(tl.float32)  # how many pixels a lane has read
    one = 1.0 / tl.maximum(weight, 1.0)
    mean_f = tl.sum(total_f.to(tl.float64) - lost_f) / n
    mean_t = tl.sum(total_t.to(tl.float64) - lost_t) / n
    mean_d = tl.sum(total_d.to(tl.float64) - lost_d) / n  # of the rounded differences, which the gradient takes it from
    whole_f, rest_f, all_f = _merged(total_f * one, square_f, weight, mean_f, n)
    whole_t, rest_t, all_t = _merged(total_t * one, square_t, weight, mean_t, n)
    whole_d, rest_d, all_d = _merged(total_d * one, square_d, weight, mean_d, n)
    of_channels = number_of(channels, layer, starts, DTYPE).to(tl.int32)
    column = number_of(firsts, layer, starts, DTYPE).to(tl.int32) + plane % of_channels
    at = (plane // of_channels).to(tl.int64) * all_channels + column
    out_ptr = stats_ptr + at
    tl.store(out_ptr, whole_f)
    tl.store(out_ptr + table, whole_d)
    tl.store(out_ptr + 2 * table, all_f)
    tl.store(out_ptr + 3 * table, all_t)
    tl.store(out_ptr + 4 * table, all_d)
    tl.store(rest_ptr + at, rest_f)
    tl.store(rest_ptr + table + at, whole_t - (whole_f - whole_d) + rest_t)
    tl.store(rest_ptr + 2 * table + at, rest_d)


@triton.jit(do_not_specialize=["all_channels", "table"])
def _dists_bwd_kernel(
    grad_ptr,  # (5, samples, all_channels) float32
    stats_ptr,  # likewise
    rest_ptr,  # (3, samples, all_channels) float32
    features,  # a pointer a layer: (samples * channels, pixels)
    targets,  # likewise
    feature_grads,  # None, or likewise
    target_grads,  # None, or likewise
    starts,
    channels,
    firsts,
    units,
    all_channels,
    table,  # samples * all_channels
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    layer = layer_of(program, starts, DTYPE)
    plane = program - start_of(layer, starts, DTYPE).to(tl.int32)
    count = number_of(units, layer, starts, DTYPE).to(tl.int32) * UNIT
    first = plane.to(tl.int64) * count
    f_ptr = pointer_of(features, layer, starts, DTYPE, ALIGNED) + first
    t_ptr = pointer_of(targets, layer, starts, DTYPE, ALIGNED) + first
    of_channels = number_of(channels, layer, starts, DTYPE).to(tl.int32)
    column = number_of(firsts, layer, starts, DTYPE).to(tl.int32) + plane % of_channels
    at = (plane // of_channels).to(tl.int64) * all_channels + column
    mean_f = tl.load(stats_ptr + at)
    mean_d = tl.load(stats_ptr + table + at)
    mean_t = mean_f - mean_d
    rest_f = tl.load(rest_ptr + at)
    rest_t = tl.load(rest_ptr + table + at)
    rest_d = tl.load(rest_ptr + 2 * table + at)
    scale = 1.0 / count.to(tl.float32)
    constant_f = scale * tl.load(grad_ptr + at)
    constant_d = scale * tl.load(grad_ptr + table + at)
    slope_f = 2.0 * scale * tl.load(grad_ptr + 2 * table + at)
    slope_t = 2.0 * scale * tl.load(grad_ptr + 3 * table + at)
    slope_d = 2.0 * scale * tl.load(grad_ptr + 4 * table + at)
    lanes = tl.arange(0, BLOCK)
    for k in tl.range(0, (count + BLOCK - 1) // BLOCK, loop_unroll_factor=2):
        offsets = k * BLOCK + lanes
        mask = lanes < count - k * BLOCK
        f = tl.load(f_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d = constant_d + slope_d * (f - t - mean_d - rest_d)
        if feature_grads is not None:
            to_ptr = pointer_of(feature_grads, layer, starts, DTYPE, ALIGNED) + first
            g = constant_f + slope_f * (f - mean_f - rest_f) + d
            tl.store(to_ptr + offsets, g.to(to_ptr.dtype.element_ty), mask=mask)
        if target_grads is not None:
            other_ptr = pointer_of(target_grads, layer, starts, DTYPE, ALIGNED) + first
            g = slope_t * (t - mean_t - rest_t) - d
            tl.store(other_ptr + offsets, g.to(other_ptr.dtype.element_ty), mask=mask)


def _block() -> int:
    """Pixels of a step: eight of each plane in every thread."""
    return 8 * STREAM_OPTIONS["num_warps"] * warp_size()


def _launches(
    features: Sequence[Tensor], sides: Sequence[Sequence[Tensor] | None]
) -> Iterator[tuple[int, list, tuple]]:
    """(programs, columns of pointers, further arguments) of each launch for the layers' tensors of all sides."""
    samples, columns = features[0].shape[0], [0, *itertools.accumulate(f.shape[1] for f in features)]
    for at in range(0, len(features), MOST):
        part = slice(at, at + MOST)
        channels = [f.shape[1] for f in features[part]]
        pixels = [f.shape[2] * f.shape[3] for f in features[part]]
        unit = UNIT if all(n % UNIT == 0 for n in pixels) else 1
        starts = list(itertools.accumulate((samples * c for c in channels), initial=0))
        numbers = (starts[:-1], channels, columns[at : at + len(channels)], [n // unit for n in pixels])
        of = columns_of(numbers, [None if side is None else side[part] for side in sides])
        yield (
            starts[-1],
            of.pointers,
            (*of.numbers, columns[-1], samples * columns[-1], of.dtype, of.aligned, unit, _block()),
        )


def dists_fwd(features: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    stats = features[0].new_empty((5, features[0].shape[0], sum(f.shape[1] for f in features)), dtype=torch.float32)
    rest = torch.empty_like(stats[:3])
    features, targets = [f.contiguous() for f in features], [t.contiguous() for t in targets]
    with on_device(stats):
        for programs, pointers, plan in _launches(features, (features, targets)) if stats.numel() > 0 else ():
            options = STREAM_OPTIONS | (registers(144) if plan[-2] == 1 else {})  # else ptxas spills at 128
            _dists_fwd_kernel[(programs,)](*pointers, stats, rest, *plan, **options)
    return stats, rest


def dists_bwd(
    grad: Tensor,
    features: list[Tensor],
    targets: list[Tensor],
    stats: Tensor,
    rest: Tensor,
    needs_features: bool,
    needs_targets: bool,
) -> list[Tensor]:
    features, targets, grad = [f.contiguous() for f in features], [t.contiguous() for t in targets], grad.contiguous()
    made = [
        [torch.empty_like(t) for t in tensors] if needed else None
        for tensors, needed in ((features, needs_features), (targets, needs_targets))
    ]
    with on_device(grad):
        for programs, pointers, plan in _launches(features, (features, targets, *made)) if stats.numel() > 0 else ():
            _dists_bwd_kernel[(programs,)](grad, stats, rest, *pointers, *plan, **STREAM_OPTIONS)
    return [gradient for side in made if side is not None for gradient in side]


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
        yield AotCase(f"forward {name}", dists_fwd, (features, features), wide)
        for needs in ((True, False), (False, True), (True, True)):
            args = (stats, features, features, stats, stats[:3], *needs)
            yield AotCase(f"backward {name} {needs}", dists_bwd, args, wide)
