"""Triton kernels for the statistics of DISTS: up to 64 layers in one launch, a program a plane (a sample's channel).

With d = f - t, m the mean over the plane's n pixels, and x' = x - m_x:

    statistics      m_f, m_d, mean f'^2, mean t'^2, mean d'^2, with gradients g_0 .. g_4
    gradient of d   (g_1 + 2 g_4 d') / n
    gradient of f   (g_0 + 2 g_2 f') / n + that of d
    gradient of t   2 g_3 t' / n - that of d

A thread reads 128 bits of each side at once, a row. It adds their sum to that of the rows before, keeping what rounding
took from it, and merges their squares about their own mean with those before (Chan, Golub, LeVeque); at the end the
threads' are merged about the common mean, which is formed in float64. So one pass gives the digits of two; those of a
mean near zero count, for there the gradient is divided by it.

Bytes per element of size s: forward 2 s, backward 3 s with one gradient, 4 s with both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import STREAM_OPTIONS, AotCase, on_device, warp_size, zeros
from .layers import MOST, UNIT, columns_of, layer_of, number_of, pointer_of, start_of

PIXELS = 8  # of a plane, in every thread at each step
AHEAD = 4  # steps whose loads are in flight together: a large plane is one program's, which waits for little else
PART = 8  # steps of a program of the backward, whose planes need no single program
BACKWARD_AHEAD = 2


@triton.jit
def _add(x, total, lost):
    """`total` plus x, and what rounding took from it (Kahan)."""
    x = x - lost
    after = total + x
    return after, (after - total) - x


@triton.jit
def _merge(x, inside, total, lost, square, each, before, share):
    """A row's sum (Kahan's) and squares about its mean with `each` elements x more; weights as `_step` has them.

    The elements are summed among themselves first, so that a row costs what before an element cost.
    """
    of_row = tl.sum(x, 1)
    mean = of_row * each
    off = x - mean[:, None]
    if inside is not None:
        off = tl.where(inside, off, 0.0)
    gap = mean - total * before
    square += tl.sum(off * off, 1) + gap * gap * share
    total, lost = _add(of_row, total, lost)
    return total, lost, square


@triton.jit
def _step(f_ptr, t_ptr, k, count, sums, WHOLE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The sums of f, t and f - t with the k-th piece of the plane: WIDTH elements in each of ROWS."""
    at = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    first = k * (ROWS * WIDTH)
    seen = 1.0 * (k * WIDTH)
    before = 1.0 / tl.maximum(seen, 1.0)
    if WHOLE:
        inside = None
        f = tl.load(f_ptr + first + at).to(tl.float32)
        t = tl.load(t_ptr + first + at).to(tl.float32)
        each = 1.0 / WIDTH
        share = seen / (k + 1)
    else:
        inside = at < count - first
        f = tl.load(f_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + first + at, mask=inside, other=0.0).to(tl.float32)
        here = tl.minimum(tl.maximum(count - first - tl.arange(0, ROWS) * WIDTH, 0), WIDTH).to(tl.float32)
        each = 1.0 / tl.maximum(here, 1.0)
        share = here * seen / tl.maximum(here + seen, 1.0)
    new_f = _merge(f, inside, sums[0], sums[1], sums[2], each, before, share)
    new_t = _merge(t, inside, sums[3], sums[4], sums[5], each, before, share)
    new_d = _merge(f - t, inside, sums[6], sums[7], sums[8], each, before, share)
    return new_f + new_t + new_d


@triton.jit
def _merged(of_rows, square, weight, mean, n):
    """The mean in float32, what rounding left of it, and the mean square about it, of rows with means of their own."""
    whole = mean.to(tl.float32)
    rest = (mean - whole).to(tl.float32)
    off = of_rows - whole - rest
    return whole, rest, tl.sum(square + off * off * weight) / n


@triton.jit(do_not_specialize=["all_channels", "table"])
def _dists_fwd_kernel(
    features,  # columns, see layers.py: a pointer a layer, (samples * channels, pixels)
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
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    AHEAD: tl.constexpr,
):
    program = tl.program_id(0)
    layer = layer_of(program, starts, DTYPE)
    plane = program - start_of(layer, starts, DTYPE).to(tl.int32)
    count = number_of(units, layer, starts, DTYPE).to(tl.int32) * UNIT
    f_ptr = pointer_of(features, layer, starts, DTYPE, ALIGNED) + plane.to(tl.int64) * count
    t_ptr = pointer_of(targets, layer, starts, DTYPE, ALIGNED) + plane.to(tl.int64) * count
    sums = zeros(9, ROWS)
    whole = count // (ROWS * WIDTH)
    for k in tl.range(0, whole, loop_unroll_factor=AHEAD):
        sums = _step(f_ptr, t_ptr, k, count, sums, True, ROWS, WIDTH)
    if whole * (ROWS * WIDTH) < count:
        sums = _step(f_ptr, t_ptr, whole, count, sums, False, ROWS, WIDTH)
    total_f, lost_f, square_f, total_t, lost_t, square_t, total_d, lost_d, square_d = sums
    n = count.to(tl.float32)
    last = count - whole * (ROWS * WIDTH) - tl.arange(0, ROWS) * WIDTH
    weight = (whole * WIDTH + tl.minimum(tl.maximum(last, 0), WIDTH)).to(tl.float32)  # how many pixels a row has read
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
    PART: tl.constexpr,  # pixels of a plane that a program does, whole BLOCKs
    AHEAD: tl.constexpr,
):
    program = tl.program_id(0)
    layer = layer_of(program, starts, DTYPE)
    within = program - start_of(layer, starts, DTYPE).to(tl.int32)
    count = number_of(units, layer, starts, DTYPE).to(tl.int32) * UNIT
    parts = (count - 1) // PART + 1  # of a plane
    plane = within // parts
    begin = within % parts * PART
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
    blocks = (tl.minimum(count - begin, PART) + BLOCK - 1) // BLOCK
    for k in tl.range(0, blocks, loop_unroll_factor=AHEAD):
        offsets = begin + k * BLOCK + lanes
        mask = lanes < count - begin - k * BLOCK
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


def _threads(model: Tensor) -> int:
    threads_of_warp = warp_size()
    return STREAM_OPTIONS["num_warps"] * threads_of_warp


def _launches(
    features: Sequence[Tensor], sides: Sequence[Sequence[Tensor] | None], part: int | None = None
) -> Iterator[tuple[int, list, tuple]]:
    """(programs, columns of pointers, further arguments) of each launch for the layers' tensors of all sides; of
    programs each plane has one, or one for `part` pixels."""
    samples, columns = features[0].shape[0], [0, *itertools.accumulate(f.shape[1] for f in features)]
    for at in range(0, len(features), MOST):
        group = slice(at, at + MOST)
        channels = [f.shape[1] for f in features[group]]
        pixels = [f.shape[2] * f.shape[3] for f in features[group]]
        unit = UNIT if all(n % UNIT == 0 for n in pixels) else 1
        programs = (samples * c * triton.cdiv(n, part or n) for c, n in zip(channels, pixels, strict=True))
        starts = list(itertools.accumulate(programs, initial=0))
        numbers = (starts[:-1], channels, columns[at : at + len(channels)], [n // unit for n in pixels])
        of = columns_of(numbers, [None if side is None else side[group] for side in sides])
        further = (*of.numbers, columns[-1], samples * columns[-1], of.dtype, of.aligned, unit)
        yield starts[-1], of.pointers, further


def dists_fwd(features: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    stats = features[0].new_empty((5, features[0].shape[0], sum(f.shape[1] for f in features)), dtype=torch.float32)
    rest = torch.empty_like(stats[:3])
    features, targets = [f.contiguous() for f in features], [t.contiguous() for t in targets]
    width = 16 // features[0].element_size()
    shape = (max(PIXELS // width, 1) * _threads(stats), width, AHEAD)
    with on_device(stats):
        for programs, pointers, plan in _launches(features, (features, targets)) if stats.numel() > 0 else ():
            _dists_fwd_kernel[(programs,)](*pointers, stats, rest, *plan, *shape, **STREAM_OPTIONS)
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
    block = PIXELS * _threads(stats)
    part, sides = PART * block, (features, targets, *made)
    with on_device(grad):
        for programs, pointers, plan in _launches(features, sides, part) if stats.numel() > 0 else ():
            shape = (block, part, BACKWARD_AHEAD)
            _dists_bwd_kernel[(programs,)](grad, stats, rest, *pointers, *plan, *shape, **STREAM_OPTIONS)
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
