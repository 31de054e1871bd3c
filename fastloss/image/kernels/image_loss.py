"""Triton kernels for the image loss: the sums of the pixel loss, of the smoothness along each axis, and of SSIM.

The formulas are those of pixel.py, smoothness.py and ssim.py beside it, whose functions these kernels call. One launch
goes over the image pair in each direction, whatever is on; the second stage of the sums is one more, tiny. Without SSIM
it streams in memory order (here); with SSIM the losses ride along in its sweeps (image_loss_ssim.py).

    out = [pixel, smoothness along z, y and x (or one number if isotropic), SSIM]; 0 for what is off

Where every gradient is a sign (l1 of both, without guide and weight), the forward keeps a byte per element,
    (s + 1) + a ((t_x + n) + b (t_y + n)),    s = sign(d), t the gradient along an axis, |t| <= n = 2 order

with a, b = 4, 8 for first differences, which shifts take apart, and 3, 9 for second ones. The backward reads nothing
else. Bytes per element of size s (k partials of SSIM):

    both l1, images     forward 2 s + 1     backward 1 + s
    other               forward 2 s         backward 3 s
    with SSIM           forward 2 s + 4 k   backward 4 k + 3 s
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import added, sign, weighted, zeros
from ...core.kernels.launch import REDUCE_PROGRAMS, STREAM_OPTIONS, AotCase, on_device, vector_block
from ...core.kernels.memory_order import laid_out_as, needs_int64
from ..image_loss import Grads, Inputs, Needs, Saved
from .image_loss_ssim import Grid, Parts, Target, image_ssim_bwd_kernel, image_ssim_fwd_kernel
from .pixel import distance, slope
from .smoothness import block_of, steps_of, tile_at, tiles_of
from .smoothness_arguments import Image, guide_args, in_order, odd_weight, size_of, weight_args
from .smoothness_terms import smoothness_grad, smoothness_terms, start_of, tile_of, weight_at
from .ssim import BLOCK, OPTIONS, one_pixel, pixel_stride, strided, taps_of
from .ssim import size_of as map_size_of
from .ssim_lanes import Strided, Window
from .ssim_sweep import Constants, Form

SIGNS_BLOCK = 1024


@triton.jit
def first_radix_of(ORDER: tl.constexpr):
    """Of the sign of d in a byte of signs: a power of two where there is room for it."""
    return 4 if ORDER == 1 else 3


@triton.jit
def radix_of(ORDER: tl.constexpr):
    """Of the gradient along an axis in a byte of signs."""
    return 8 if ORDER == 1 else 9


@triton.jit(do_not_specialize=["splits", "tiles_per_row"], do_not_specialize_on_alignment=["steps"])
def _image_loss_fwd_kernel(
    target_ptr,  # (planes, count)
    pixel_weight,  # Weight, see smoothness_arguments.py
    parameter,  # of the pixel loss
    pred,  # Image, see smoothness_arguments.py
    out_ptr,  # (sums, programs) float32
    signs_ptr,  # (planes, count) uint8, or None
    splits,  # programs of a plane
    tiles_per_row,
    steps,  # tiles of a program, one below the other
    PARTS: tl.constexpr,  # Parts, see image_loss_ssim.py
    WIDE: tl.constexpr,
    TILE: tl.constexpr,  # Block, see smoothness.py
):
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    ORDER: tl.constexpr = PARTS.order
    AXES: tl.constexpr = PARTS.axes
    OUTS: tl.constexpr = PARTS.smoothness_sums
    PIXEL: tl.constexpr = PARTS.pixel
    SMOOTHNESS: tl.constexpr = PARTS.smoothness
    size = pred.size
    program = tl.program_id(0)
    plane = (program.to(tl.int64) if WIDE else program) // splits
    first, column = tile_at(program % splits, tiles_per_row, TILE)
    pixel_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    sums = zeros(OUTS, ROWS, COLUMNS)
    for step in range(steps):
        row = (first * steps + step * ROWS) + tl.arange(0, ROWS)
        pixels, inside = tile_of(plane, row, column, size, AXES, WIDE)
        x = tl.load(target_ptr + start_of(plane, size) + pixels.offset, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(pred.ptr + start_of(plane, size) + pixels.offset, mask=inside, other=0.0).to(tl.float32)
        if PIXEL != "":
            loss = distance(y - x, parameter, PIXEL)
            if pixel_weight.ptr is not None:
                loss = weighted(loss, weight_at(pixel_weight, plane, pixels, size, inside, 0, 0))
            pixel_sum += tl.where(inside, loss, 0.0)
        if SMOOTHNESS != "":
            sums = added(sums, smoothness_terms(pred, plane, pixels, inside, SMOOTHNESS, ORDER, AXES))
        if signs_ptr is not None:
            code = tl.zeros((ROWS, COLUMNS), tl.float32)
            for axis in tl.static_range(AXES - 1, -1, -1):
                code = code * radix_of(ORDER) + 2 * ORDER
                code += smoothness_grad(pred, plane, pixels, inside, axis, "l1", ORDER, AXES)
            code = code * first_radix_of(ORDER) + 1 + sign(y - x)
            sign_ptr = signs_ptr + start_of(plane, size) + pixels.offset
            tl.store(sign_ptr, code.to(tl.int32).to(tl.uint8), mask=inside)
    out_ptr += program
    programs = tl.num_programs(0)
    tl.store(out_ptr, tl.sum(pixel_sum))
    for axis in tl.static_range(OUTS):
        tl.store(out_ptr + (OUTS - axis) * programs, tl.sum(sums[axis]))
    tl.store(out_ptr + (OUTS + 1) * programs, 0.0)


@triton.jit(do_not_specialize=["splits", "tiles_per_row"])
def _image_loss_bwd_kernel(
    grad_ptr,  # (sums,) float32
    target_ptr,  # (planes, count)
    pixel_weight,  # Weight, see smoothness_arguments.py
    parameter,  # of the pixel loss
    pred,  # Image, see smoothness_arguments.py
    image_grad_ptr,  # (planes, count) or None
    pred_grad_ptr,  # (planes, count) or None
    splits,  # tiles of a plane
    tiles_per_row,
    PARTS: tl.constexpr,  # Parts, see image_loss_ssim.py
    WIDE: tl.constexpr,
    TILE: tl.constexpr,  # Block, see smoothness.py
):
    ROWS: tl.constexpr = TILE.rows
    COLUMNS: tl.constexpr = TILE.columns
    AXES: tl.constexpr = PARTS.axes
    OUTS: tl.constexpr = PARTS.smoothness_sums
    PIXEL: tl.constexpr = PARTS.pixel
    SMOOTHNESS: tl.constexpr = PARTS.smoothness
    size = pred.size
    program = tl.program_id(0)
    plane = (program.to(tl.int64) if WIDE else program) // splits
    first, column = tile_at(program % splits, tiles_per_row, TILE)
    pixels, inside = tile_of(plane, first + tl.arange(0, ROWS), column, size, AXES, WIDE)
    smoothness = tl.zeros((ROWS, COLUMNS), tl.float32)
    if SMOOTHNESS != "" and pred_grad_ptr is not None:
        for axis in tl.static_range(AXES):
            up = tl.load(grad_ptr + (1 if OUTS == 1 else AXES - axis))
            smoothness += up * smoothness_grad(pred, plane, pixels, inside, axis, SMOOTHNESS, PARTS.order, AXES)
    grad = tl.zeros((ROWS, COLUMNS), tl.float32)
    if PIXEL != "":
        x = tl.load(target_ptr + start_of(plane, size) + pixels.offset, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(pred.ptr + start_of(plane, size) + pixels.offset, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr) * slope(y - x, parameter, PIXEL)
        if pixel_weight.ptr is not None:
            grad = weighted(grad, weight_at(pixel_weight, plane, pixels, size, inside, 0, 0))
    if image_grad_ptr is not None:
        to_ptr = image_grad_ptr + start_of(plane, size) + pixels.offset
        tl.store(to_ptr, (-grad).to(image_grad_ptr.dtype.element_ty), mask=inside)
    if pred_grad_ptr is not None:
        to_ptr = pred_grad_ptr + start_of(plane, size) + pixels.offset
        tl.store(to_ptr, (grad + smoothness).to(pred_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _image_loss_signs_bwd_kernel(
    grad_ptr,  # (sums,) float32
    signs_ptr,  # (count,) uint8
    image_grad_ptr,  # (count,) or None
    pred_grad_ptr,  # (count,) or None
    count,
    ORDER: tl.constexpr,
    AXES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    code = tl.load(signs_ptr + offsets, mask=inside, other=0).to(tl.int32)
    grad = tl.load(grad_ptr) * (code % first_radix_of(ORDER) - 1).to(tl.float32)
    if image_grad_ptr is not None:
        tl.store(image_grad_ptr + offsets, (-grad).to(image_grad_ptr.dtype.element_ty), mask=inside)
    if pred_grad_ptr is not None:
        code = code // first_radix_of(ORDER)
        for axis in tl.static_range(AXES):
            grad += tl.load(grad_ptr + AXES - axis) * (code % radix_of(ORDER) - 2 * ORDER).to(tl.float32)
            code = code // radix_of(ORDER)
        tl.store(pred_grad_ptr + offsets, grad.to(pred_grad_ptr.dtype.element_ty), mask=inside)


class _Call(NamedTuple):
    """What both directions need, and every kernel: the images in one memory order, and what is on."""

    target: Target
    pred: Image
    parts: Parts
    wide: bool

    @property
    def planes(self) -> int:
        return self.pred.ptr.shape[0] * self.pred.size.planes


def _strided(weight: Tensor | None) -> Strided:
    return strided(weight) or Strided(None, None, None, None, None)


def _call(x: Inputs) -> _Call:
    pred = in_order(x.image_pred)
    axes = pred.ndim - 2
    parts = Parts(x.pixel_kind, x.smoothness_kind, x.order, axes, 1 if x.smoothness_kind == "isotropic" else axes)
    weight: Any = _strided if x.window else weight_args
    unit, guide = 16 // pred.element_size(), guide_args(x.guide)
    return _Call(
        Target(laid_out_as(x.image, pred), odd_weight(weight(x.pixel_weight), unit), x.pixel_parameter),
        Image(pred, guide, weight(x.smoothness_weight), size_of(pred)),
        parts, needs_int64(pred, x.pixel_weight, guide.ptr, x.smoothness_weight),
    )  # fmt: skip


def _elements(x: Inputs, forward: bool, signs: bool = False) -> int:
    """Of a program: as many as of the smoothness; less where a second image and signs beside it take registers.

    Of a loss that streams no less than what gives each lane 16 bytes.
    """
    elements = block_of(x.guide, x.smoothness_weight, x.smoothness_kind, x.order, forward)
    streams = elements >= 1024 and x.smoothness_kind != "isotropic"
    return max(min(elements, 512 if signs else 1024), vector_block(x.image_pred.element_size()) if streams else 0)


class _Sweep(NamedTuple):
    """With SSIM: the kernels' arguments, and the grid of their programs."""

    grid: Grid
    constants: Constants
    form: Form
    programs: tuple[int, int]


def _sweep(pred: Tensor, x: Inputs, **more: bool) -> _Sweep:
    margin, taps = 0 if x.same else x.window // 2, taps_of(x.window, x.sigma)
    size = map_size_of(pred, margin)
    rows = 64
    while rows > 16 and triton.cdiv(size.lanes, BLOCK) * triton.cdiv(size.height, rows) < REDUCE_PROGRAMS:
        rows //= 2
    window = Window(x.window // 2, margin, 1, pixel_stride(pred))
    form = Form(window, one_pixel=one_pixel(taps), keep=x.keep, weighted=x.ssim_weight is not None, **more)
    programs = (triton.cdiv(size.lanes, BLOCK), triton.cdiv(size.height, rows))
    grid = Grid(size.channels, size.lanes, size.map_lanes, rows)
    return _Sweep(grid, Constants(taps, x.c1, x.c2, x.low or None), form, programs)


def _with_ssim(call: _Call, x: Inputs) -> tuple[Tensor, Saved]:
    pred = call.pred.ptr
    sweep = _sweep(pred, x)
    columns, rows = sweep.programs
    map_height = call.pred.size.height - 2 * sweep.form.window.margin
    shape = (3 + (x.keep == 3), map_height, sweep.grid.map_lanes) if x.keep else (0,)
    kept = pred.new_empty(shape, dtype=torch.float32)
    out = pred.new_empty((call.parts.smoothness_sums + 2, columns * rows), dtype=torch.float32)
    with on_device(pred):
        image_ssim_fwd_kernel[sweep.programs](
            call.target, call.pred.odd(False), strided(x.ssim_weight), out, kept, sweep.grid.odd(), sweep.constants,
            sweep.form, call.parts, call.wide, BLOCK, **OPTIONS,
        )  # fmt: skip
    return out.sum(1), Saved(kept)


def image_loss_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    call = _call(x)
    if x.window:
        return _with_ssim(call, x)
    pred, signs = call.pred.ptr, x.keep > 0
    kept = pred.new_empty(pred.numel() if signs else 0, dtype=torch.uint8 if signs else torch.float32)
    tiles = tiles_of(call.pred.size, _elements(x, True, signs))
    steps = steps_of(call.planes, tiles)
    splits = tiles.per_row * triton.cdiv(tiles.per_column, steps)
    out = pred.new_empty((call.parts.smoothness_sums + 2, call.planes * splits), dtype=torch.float32)
    with on_device(pred):
        _image_loss_fwd_kernel[(call.planes * splits,)](
            *call.target, call.pred.odd(), out, kept if signs else None, splits, tiles.per_row, steps, call.parts,
            call.wide, tiles.block, **STREAM_OPTIONS,
        )  # fmt: skip
    return out.sum(1), Saved(kept)


def image_loss_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> Grads:
    call, grad = _call(x), grad.contiguous()
    pred = call.pred.ptr
    first, second = (torch.empty_like(pred) if needed else None for needed in needs)
    if x.window:
        if not x.keep:  # nobody asked for a gradient when the forward ran
            x = x._replace(keep=needs.image + 2 * needs.image_pred)
            _, saved = image_loss_fwd(x)
        sweep = _sweep(pred, x, needs_x=needs.image, needs_y=needs.image_pred)
        with on_device(pred):
            image_ssim_bwd_kernel[sweep.programs](
                grad, call.target, call.pred.odd(False), first, second, saved.kept, sweep.grid.odd(), sweep.constants,
                sweep.form, call.parts, call.wide, BLOCK, **OPTIONS,
            )  # fmt: skip
    elif x.keep:
        with on_device(pred):
            _image_loss_signs_bwd_kernel[(triton.cdiv(saved.kept.numel(), SIGNS_BLOCK),)](
                grad, saved.kept, first, second, saved.kept.numel(), x.order, x.image_pred.ndim - 2, call.wide,
                SIGNS_BLOCK, **(STREAM_OPTIONS | {"num_warps": 2}),
            )  # fmt: skip
    else:
        tiles = tiles_of(call.pred.size, _elements(x, False))
        splits = tiles.per_row * tiles.per_column
        with on_device(pred):
            _image_loss_bwd_kernel[(call.planes * splits,)](
                grad, *call.target, call.pred.odd(), first, second, splits, tiles.per_row, call.parts, call.wide,
                tiles.block, **STREAM_OPTIONS,
            )  # fmt: skip
    none = x.image.new_empty(0)
    return Grads(
        image=none if first is None else laid_out_as(first, torch.empty_like(x.image)),
        image_pred=none if second is None else laid_out_as(second, torch.empty_like(x.image_pred)),
    )


def aot_cases() -> Iterator[AotCase]:
    """Every pixel and smoothness distance with and without SSIM, every dtype; each option; volumes; memory formats."""
    plain: dict[str, Any] = {"pixel": "l1", "smoothness": "l1"}
    ssim: dict[str, Any] = {"window": 11}
    for dtype, more in itertools.product((torch.float32, torch.bfloat16, torch.float16), ({}, ssim)):
        for smoothness in ("l1", "l2", "isotropic"):
            yield from _aot_calls("", plain | more | {"smoothness": smoothness}, dtype)
    for more in ({}, ssim):
        for pixel in ("l2", "lp", "charbonnier", "huber"):
            yield from _aot_calls("", plain | more | {"pixel": pixel})
        for label, option in {"order": 2, "guide": True, "weights": True, "keep": 3, "last": True}.items():
            yield from _aot_calls(label, plain | more | {label: option})
        yield from _aot_calls("int64", plain | more | {"shape": (1, 1, 65536, 32768)}, torch.bfloat16)
    everything: dict[str, Any] = {"order": 2, "guide": True, "weights": True, "keep": 3}
    yield from _aot_calls("all", plain | everything)
    yield from _aot_calls("all, channels_last", plain | everything | {"last": True}, torch.bfloat16)
    yield from _aot_calls("all but guide", plain | everything | {"smoothness": "isotropic", "guide": False})
    for label, option in {"order": 2, "weights": True}.items():  # more goes to the parts, see image/image_loss.py
        yield from _aot_calls(f"isotropic {label}", plain | ssim | {"smoothness": "isotropic", label: option})
    for alone in ({"pixel": "l1"}, {"smoothness": "isotropic"}):
        yield from _aot_calls("alone", ssim | alone)
    yield from _aot_calls("low", plain | ssim | {"low": -1.0})
    yield from _aot_calls("valid, odd", plain | ssim | {"same": False, "shape": (1, 3, 33, 65)})
    yield from _aot_calls("volume", plain | {"shape": (1, 2, 16, 32, 64)})


def _aot_calls(label: str, o: dict[str, Any], dtype: torch.dtype = torch.float32) -> Iterator[AotCase]:
    shape, axes = o.get("shape", (2, 3, 64, 64)), len(o.get("shape", (2, 3, 64, 64))) - 2
    pixel, smoothness, window = o.get("pixel", ""), o.get("smoothness", ""), o.get("window", 0)
    cut = 0 if o.get("same", True) else window - 1
    last = torch.channels_last if o.get("last") else torch.contiguous_format
    image = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=last)
    guide = torch.empty((shape[0], 3, *shape[2:]), dtype=dtype, device="meta") if o.get("guide") else None
    weight = torch.empty((shape[0], 1, *shape[2:]), device="meta").expand(shape) if o.get("weights") else None
    on_map = None if weight is None or not window else weight[..., cut // 2 : shape[2] - cut // 2, :]
    signs = pixel == smoothness == "l1" and not (guide is not None or weight is not None or window) and axes == 2
    keep = o.get("keep", 2) if window else 4 * signs
    partials = (3 + (keep == 3), shape[2] - cut, shape[0] * shape[1] * (shape[3] - cut)) if window else (image.numel(),)
    kept = torch.empty(partials, dtype=torch.float32 if window else torch.uint8, device="meta")
    grad = torch.empty(3 if smoothness == "isotropic" else axes + 2, device="meta")
    maps = (weight, guide, weight if smoothness else None, on_map)
    numbers = (o.get("order", 1), window, 1.5, o.get("same", True), 1e-4, 9e-4, o.get("low", 0.0))
    x = Inputs(image, image, *maps, pixel, 0.5, smoothness, *numbers, keep)  # type: ignore[arg-type]
    label = f"{pixel},{smoothness} {'ssim ' * bool(window)}{str(dtype).removeprefix('torch.')} {label}".rstrip()
    streams = not window and smoothness != "isotropic" and label.endswith(("16", "32", "int64"))
    yield AotCase(f"forward {label}", image_loss_fwd, (x,), ("_image_loss_fwd_kernel",) if streams else ())
    wide = ("_image_loss_bwd_kernel", "_image_loss_signs_bwd_kernel") if streams else ()
    needs = Needs(o.get("keep", 2) == 3, True)
    yield AotCase(f"backward {label}", image_loss_bwd, (grad, Saved(kept), x, needs), wide)
