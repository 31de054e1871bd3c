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
from ...core.kernels.launch import STREAM_OPTIONS, AotCase, on_device, vector_block
from ...core.kernels.memory_order import laid_out_as, needs_int64
from ..image_loss import Grads, Inputs, Needs, Saved
from .image_loss_ssim import image_ssim_bwd_kernel, image_ssim_fwd_kernel
from .pixel import distance, slope
from .smoothness import aside_of, block_of, guide_args, in_order, sizes, steps_of, tile, tile_at, weight_args
from .smoothness_terms import smoothness_pulled, smoothness_terms, start_of, tile_of, weight_at
from .ssim import BLOCK, OPTIONS, layout, one_pixel, strided, taps_of

SIGNS_BLOCK = 1024


@triton.jit
def first_radix_of(ORDER: tl.constexpr):
    """Of the sign of d in a byte of signs: a power of two where there is room for it."""
    return 4 if ORDER == 1 else 3


@triton.jit
def radix_of(ORDER: tl.constexpr):
    """Of the gradient along an axis in a byte of signs."""
    return 8 if ORDER == 1 else 9


@triton.jit
def _image_loss_fwd_kernel(
    image_ptr,  # (units, count)
    pred_ptr,  # (units, count)
    pixel_weight,  # None or a tuple, see smoothness_terms.py
    guide,  # None or a tuple, see smoothness_terms.py
    weight,  # of the smoothness: None or a tuple, see smoothness_terms.py
    out_ptr,  # (sums, programs) float32
    signs_ptr,  # (units, count) uint8, or None
    size,  # of a unit, see smoothness_terms.py
    splits,
    across,  # tiles beside each other
    steps,  # tiles of a program, one below the other
    p,
    PIXEL: tl.constexpr,
    SMOOTHNESS: tl.constexpr,
    ORDER: tl.constexpr,
    AXES: tl.constexpr,
    OUTS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0)
    unit = (program.to(tl.int64) if WIDE else program) // splits
    first, column = tile_at(program % splits, across, ROWS, COLS)
    of_pixels = tl.zeros((ROWS, COLS), tl.float32)
    sums = zeros(OUTS, ROWS, COLS)
    for step in range(steps):
        row = (first * steps + step * ROWS) + tl.arange(0, ROWS)
        spot, inside = tile_of(unit, row, column, size, AXES, WIDE)
        image = tl.load(image_ptr + start_of(unit, size) + spot[0], mask=inside, other=0.0).to(tl.float32)
        pred = tl.load(pred_ptr + start_of(unit, size) + spot[0], mask=inside, other=0.0).to(tl.float32)
        if PIXEL != "":
            loss = distance(pred - image, p, PIXEL)
            if pixel_weight is not None:
                loss = weighted(loss, weight_at(pixel_weight, unit, spot, size, inside, 0, 0))
            of_pixels += tl.where(inside, loss, 0.0)
        if SMOOTHNESS != "":
            sums = added(
                sums, smoothness_terms(pred_ptr, guide, weight, unit, spot, size, inside, SMOOTHNESS, ORDER, AXES)
            )
        if signs_ptr is not None:
            code = tl.zeros((ROWS, COLS), tl.float32)
            for axis in tl.static_range(AXES - 1, -1, -1):
                code = code * radix_of(ORDER) + 2 * ORDER
                code += smoothness_pulled(pred_ptr, None, None, unit, spot, size, inside, axis, "l1", ORDER, AXES)
            code = code * first_radix_of(ORDER) + 1 + sign(pred - image)
            tl.store(signs_ptr + start_of(unit, size) + spot[0], code.to(tl.int32).to(tl.uint8), mask=inside)
    out_ptr += program
    programs = tl.num_programs(0)
    tl.store(out_ptr, tl.sum(of_pixels))
    for axis in tl.static_range(OUTS):
        tl.store(out_ptr + (OUTS - axis) * programs, tl.sum(sums[axis]))
    tl.store(out_ptr + (OUTS + 1) * programs, 0.0)


@triton.jit
def _image_loss_bwd_kernel(
    grad_ptr,  # (sums,) float32
    image_ptr,  # (units, count)
    pred_ptr,  # (units, count)
    pixel_weight,  # None or a tuple, see smoothness_terms.py
    guide,  # None or a tuple, see smoothness_terms.py
    weight,  # of the smoothness: None or a tuple, see smoothness_terms.py
    image_grad_ptr,  # (units, count) or None
    pred_grad_ptr,  # (units, count) or None
    size,  # of a unit, see smoothness_terms.py
    splits,
    across,  # tiles beside each other
    p,
    PIXEL: tl.constexpr,
    SMOOTHNESS: tl.constexpr,
    ORDER: tl.constexpr,
    AXES: tl.constexpr,
    OUTS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0)
    unit = (program.to(tl.int64) if WIDE else program) // splits
    first, column = tile_at(program % splits, across, ROWS, COLS)
    spot, inside = tile_of(unit, first + tl.arange(0, ROWS), column, size, AXES, WIDE)
    offsets = spot[0]
    pulled = tl.zeros((ROWS, COLS), tl.float32)
    if SMOOTHNESS != "" and pred_grad_ptr is not None:
        for axis in tl.static_range(AXES):
            up = tl.load(grad_ptr + (1 if OUTS == 1 else AXES - axis))
            pulled += up * smoothness_pulled(
                pred_ptr, guide, weight, unit, spot, size, inside, axis, SMOOTHNESS, ORDER, AXES
            )
    grad = tl.zeros((ROWS, COLS), tl.float32)
    if PIXEL != "":
        image = tl.load(image_ptr + start_of(unit, size) + offsets, mask=inside, other=0.0).to(tl.float32)
        pred = tl.load(pred_ptr + start_of(unit, size) + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr) * slope(pred - image, p, PIXEL)
        if pixel_weight is not None:
            grad = weighted(grad, weight_at(pixel_weight, unit, spot, size, inside, 0, 0))
    if image_grad_ptr is not None:
        to = image_grad_ptr + start_of(unit, size) + offsets
        tl.store(to, (-grad).to(image_grad_ptr.dtype.element_ty), mask=inside)
    if pred_grad_ptr is not None:
        to = pred_grad_ptr + start_of(unit, size) + offsets
        tl.store(to, (grad + pulled).to(pred_grad_ptr.dtype.element_ty), mask=inside)


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
    """What both directions need: the images in one memory order, and the losses as the kernels name them."""

    image: Tensor
    pred: Tensor
    pixel_weight: Tensor | None
    guide: Tensor | None
    weight: Tensor | None
    pixel: str
    smoothness: str
    p: float
    order: int
    outs: int  # sums of the smoothness
    wide: bool
    size: tuple[int, ...]

    @property
    def weights(self) -> tuple:
        return weight_args(self.pixel_weight), guide_args(self.guide), weight_args(self.weight)

    @property
    def strided_weights(self) -> tuple:
        pixel, own = (None if w is None else strided(w) for w in (self.pixel_weight, self.weight))
        return pixel, guide_args(self.guide), own

    @property
    def units(self) -> int:
        return self.pred.shape[0] * self.size[3]

    def block(self, forward: bool, signs: bool = False) -> int:
        """That of the smoothness; less where a second image and signs beside it take registers.

        Of a loss that streams no less than what gives each lane 16 bytes.
        """
        block = block_of(self.guide, self.weight, self.smoothness, self.order, forward)
        streams = block >= 1024 and self.smoothness != "isotropic"
        return max(min(block, 512 if signs else 1024), vector_block(self.pred.element_size()) if streams else 0)


def _call(x: Inputs) -> _Call:
    pixel, smoothness = x.kinds.split(",")
    p, order, *_ = x.numbers
    pred = in_order(x.image_pred)
    outs = 1 if smoothness == "isotropic" else pred.ndim - 2
    weight = x.smoothness_weight
    return _Call(
        laid_out_as(x.image, pred), pred, x.pixel_weight, x.guide, weight, pixel, smoothness, p, int(order), outs,
        needs_int64(pred, x.pixel_weight, x.guide, weight), sizes(pred),
    )  # fmt: skip


class _Sweep(NamedTuple):
    """With SSIM: the map's margin, lanes of image and map, rows of a program, and the grid."""

    margin: int
    lanes: tuple[int, int]
    rows: int
    grid: tuple[int, int]

    def shape(self, call: _Call, keep: int) -> tuple[int, ...]:
        """Of the partials: `keep` says which gradients they are for, 1 image, 2 image_pred, 3 both."""
        return (3 + (keep == 3), call.pred.shape[2] - 2 * self.margin, self.lanes[1]) if keep else (0,)


def _sweep(call: _Call, numbers: list[float]) -> _Sweep:
    _, _, window, _, same, *_ = numbers
    margin = 0 if same else int(window) // 2
    (*_, lanes, map_lanes), _, rows = layout(call.pred, margin)
    grid = (triton.cdiv(lanes, BLOCK), triton.cdiv(call.pred.shape[2], rows))
    return _Sweep(margin, (lanes, map_lanes), rows, grid)


def image_loss_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    call, keep = _call(x), x.keep
    _, _, window, sigma, _, c1, c2, low = x.numbers
    if window:
        sweep, taps = _sweep(call, x.numbers), taps_of(int(window), sigma)
        kept = call.pred.new_empty(sweep.shape(call, keep), dtype=torch.float32)
        out = call.pred.new_empty((call.outs + 2, sweep.grid[0] * sweep.grid[1]), dtype=torch.float32)
        with on_device(call.pred):
            image_ssim_fwd_kernel[sweep.grid](
                call.image, call.pred, *call.strided_weights, strided(x.ssim_weight), out, kept,
                taps, call.size, sweep.lanes, call.pred.shape[1], sweep.rows, call.p, c1, c2, low or None, call.pixel,
                call.smoothness, call.order, call.outs, sweep.margin, aside_of(call.size), int(window) // 2,
                one_pixel(taps), keep, call.wide, BLOCK, **OPTIONS,
            )  # fmt: skip
        return out.sum(1), Saved(kept)
    kept = call.pred.new_empty(call.pred.numel() if keep else 0, dtype=torch.uint8 if keep else torch.float32)
    block = call.block(True, keep > 0)
    rows, columns, across, below = tile(call.size, block)
    steps = steps_of(call.units * across * below, below)
    splits = across * triton.cdiv(below, steps)
    out = call.pred.new_empty((call.outs + 2, call.units * splits), dtype=torch.float32)
    with on_device(call.pred):
        _image_loss_fwd_kernel[(call.units * splits,)](
            call.image, call.pred, *call.weights, out, kept if keep else None, call.size, splits, across, steps,
            call.p, call.pixel, call.smoothness, call.order, x.image_pred.ndim - 2, call.outs, call.wide, rows, columns,
            **STREAM_OPTIONS,
        )  # fmt: skip
    return out.sum(1), Saved(kept)


def image_loss_bwd(grad: Tensor, saved: Saved, x: Inputs, needs: Needs) -> Grads:
    call, grad = _call(x), grad.contiguous()
    _, _, window, *_ = x.numbers
    first, second = (torch.empty_like(call.pred) if needed else None for needed in needs)
    if window:
        if not x.keep:  # nobody asked for a gradient when the forward ran
            x = x._replace(keep=needs.image + 2 * needs.image_pred)
            _, saved = image_loss_fwd(x)
        _ssim_bwd(grad, saved, call, x, first, second)
    elif x.keep:
        with on_device(call.pred):
            _image_loss_signs_bwd_kernel[(triton.cdiv(saved.kept.numel(), SIGNS_BLOCK),)](
                grad, saved.kept, first, second, saved.kept.numel(), call.order, x.image_pred.ndim - 2, call.wide,
                SIGNS_BLOCK, **(STREAM_OPTIONS | {"num_warps": 2}),
            )  # fmt: skip
    else:
        rows, columns, across, below = tile(call.size, call.block(False))
        splits = across * below
        with on_device(call.pred):
            _image_loss_bwd_kernel[(call.units * splits,)](
                grad, call.image, call.pred, *call.weights, first, second, call.size, splits, across, call.p,
                call.pixel, call.smoothness, call.order, x.image_pred.ndim - 2, call.outs, call.wide, rows, columns,
                **STREAM_OPTIONS,
            )  # fmt: skip
    none = x.image.new_empty(0)
    return Grads(
        image=none if first is None else laid_out_as(first, torch.empty_like(x.image)),
        image_pred=none if second is None else laid_out_as(second, torch.empty_like(x.image_pred)),
    )


def _ssim_bwd(grad: Tensor, saved: Saved, call: _Call, x: Inputs, first: Tensor | None, second: Tensor | None) -> None:
    _, _, window, sigma, _, _, c2, _ = x.numbers
    sweep = _sweep(call, x.numbers)
    with on_device(call.pred):
        image_ssim_bwd_kernel[sweep.grid](
            grad, call.image, call.pred, (first,), (second,), *call.strided_weights, saved.kept,
            taps_of(int(window), sigma), call.size, sweep.lanes, call.pred.shape[1], sweep.rows, call.p, c2, call.pixel,
            call.smoothness, call.order, call.outs, sweep.margin, aside_of(call.size), int(window) // 2,
            x.ssim_weight is not None, x.keep, call.wide, BLOCK, **OPTIONS,
        )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """Every pixel and smoothness distance with and without SSIM, every dtype; each option; volumes; memory formats."""
    plain: dict[str, Any] = {"pixel": "l1", "smoothness": "l1"}
    ssim: dict[str, Any] = {"window": 11.0}
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
    yield from _aot_calls("valid, odd", plain | ssim | {"same": 0.0, "shape": (1, 3, 33, 65)})
    yield from _aot_calls("volume", plain | {"shape": (1, 2, 16, 32, 64)})


def _aot_calls(label: str, o: dict[str, Any], dtype: torch.dtype = torch.float32) -> Iterator[AotCase]:
    shape, axes = o.get("shape", (2, 3, 64, 64)), len(o.get("shape", (2, 3, 64, 64))) - 2
    pixel, smoothness, window = o.get("pixel", ""), o.get("smoothness", ""), o.get("window", 0.0)
    cut = 0 if o.get("same", 1.0) else int(window) - 1
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
    numbers = [0.5, float(o.get("order", 1)), window, 1.5, o.get("same", 1.0), 1e-4, 9e-4, o.get("low", 0.0)]
    kinds, own = f"{pixel},{smoothness}", weight if smoothness else None
    x = Inputs(image, image, weight, guide, own, on_map, kinds, numbers, keep)
    label = f"{kinds} {'ssim ' * bool(window)}{str(dtype).removeprefix('torch.')} {label}".rstrip()
    streams = not window and smoothness != "isotropic" and label.endswith(("16", "32", "int64"))
    yield AotCase(f"forward {label}", image_loss_fwd, (x,), ("_image_loss_fwd_kernel",) if streams else ())
    wide = ("_image_loss_bwd_kernel", "_image_loss_signs_bwd_kernel") if streams else ()
    needs = Needs(o.get("keep", 2) == 3, True)
    yield AotCase(f"backward {label}", image_loss_bwd, (grad, Saved(kept), x, needs), wide)
