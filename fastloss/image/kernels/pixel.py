"""Triton kernels for the pixel loss. One program handles blocks of 2048 elements, in memory order.

With d = image_pred - image, w the weight (1 without) and g the gradient of the sum or of the element:

    kind          loss / w                                   d loss / d image_pred / (g w) = - d loss / d image / (g w)
    l1            |d|                                        sign(d)
    l2            d^2                                        2 d
    lp            |d|^p                                      p |d|^(p-1) sign(d)
    charbonnier   sqrt(d^2 + p^2)                            d / sqrt(d^2 + p^2), 0 at d = 0
    huber         d^2 / 2 if |d| <= p else p (|d| - p / 2)   d if |d| <= p else p sign(d)

A weight of 0 excludes its element: loss and slope are selected, not multiplied, so that even NaN has no effect.

Bytes per element of size s: forward 2 s (+ 4 for a map), backward 3 s with one gradient and 4 s with both
(+ 4 for the gradient of a map).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import sign, weighted
from ...core.kernels.launch import STREAM_BLOCK, STREAM_OPTIONS, AotCase, on_device, stream_grid, total
from ...core.kernels.memory_order import broadcast_args, dense, laid_out_as, load_broadcast, needs_int64, runs
from ...core.kernels.scaled_sum import total_of
from ..pixel import Grads, Inputs, Needs

KINDS = ("l1", "l2", "lp", "charbonnier", "huber")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _power(a, p):
    """a^p for a >= 0, p > 0, to about 2 ulp where exp2(p * log2(a)) loses |p log2(a)| ulp.

    a = m 2^e with m in [sqrt(1/2), sqrt(2)); p e is split so that its integer part n leaves the exponent exactly.
    """
    bits = a.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    p = tl.full(a.shape, p, tl.float32)
    p_high = (p.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)  # 12 bits: p_high * e is exact
    high = p_high * e.to(tl.float32)
    n = tl.minimum(tl.maximum(tl.floor(high), -126.0), 127.0)
    rest = (high - n) + (p - p_high) * e.to(tl.float32) + p * tl.log2(m)
    power = tl.exp2(rest) * tl.exp2(n)
    return tl.where(a == 0, 0.0, tl.where(a < float("inf"), power, a))


@triton.jit
def distance(d, p, KIND: tl.constexpr):
    if KIND == "l1":
        return tl.abs(d)
    elif KIND == "l2":
        return d * d
    elif KIND == "lp":
        return _power(tl.abs(d), p)
    elif KIND == "charbonnier":
        return tl.sqrt(d * d + p * p)
    else:
        a = tl.abs(d)
        return tl.where(a <= p, 0.5 * d * d, p * (a - 0.5 * p))


@triton.jit
def slope(d, p, KIND: tl.constexpr):
    if KIND == "l1":
        return sign(d)
    elif KIND == "l2":
        return 2.0 * d
    elif KIND == "lp":
        return p * _power(tl.abs(d), p - 1.0) * sign(d)
    elif KIND == "charbonnier":
        t = d * (1.0 / tl.maximum(p, 1.1754944e-38))  # its square is never too small, nor too large
        t = tl.where(t > 16777216.0, 16777216.0, tl.where(t < -16777216.0, -16777216.0, t))  # from there on it is 1
        return t * tl.rsqrt(t * t + 1.0) + (d - d)  # NaN for infinities, as sqrt(d^2 + p^2) has
    else:
        return tl.where(tl.abs(d) > p, p * sign(d), d)


@triton.jit
def _pixel_fwd_kernel(
    image_ptr,  # (count,)
    pred_ptr,  # (count,)
    weight,  # Broadcast, see memory_order.py: (count,), or of no tensor
    out_ptr,  # (programs,) float32 if REDUCE, else (count,) float32
    count,
    p,
    KIND: tl.constexpr,
    REDUCE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) if WIDE else program
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(first * BLOCK, count, tl.num_programs(0) * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < count
        factor = 1.0
        if weight.ptr is not None:  # loaded first: loaded last, ptxas for sm_80 keeps a register of sums in memory
            factor = load_broadcast(weight, offsets, mask)
        image = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        pred = tl.load(pred_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        loss = distance(pred - image, p, KIND)
        if weight.ptr is not None:
            loss = weighted(loss, factor)
        if REDUCE:
            if weight.ptr is None:
                loss = tl.where(mask, loss, 0.0)  # charbonnier(0) is not 0
            acc += loss
        else:
            tl.store(out_ptr + offsets, loss, mask=mask)
    if REDUCE:
        tl.store(out_ptr + program, tl.sum(acc))


@triton.jit
def _pixel_bwd_kernel(
    grad_ptr,  # one element with `factor`, else (count,) float32
    image_ptr,  # (count,)
    pred_ptr,  # (count,)
    weight,  # Broadcast, see memory_order.py: (count,), or of no tensor
    factor,  # of the one element, or None
    pred_grad_ptr,  # (count,)
    image_grad_ptr,  # (count,) or None
    count,
    p,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the forward's last blocks are still in the L2 cache
    first = program.to(tl.int64) if WIDE else program
    offsets = first * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    image = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    pred = tl.load(pred_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if factor is None:
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    else:
        grad = tl.load(grad_ptr) * factor
    grad *= slope(pred - image, p, KIND)
    if weight.ptr is not None:
        grad = weighted(grad, load_broadcast(weight, offsets, mask))
    tl.store(pred_grad_ptr + offsets, grad.to(pred_grad_ptr.dtype.element_ty), mask=mask)
    if image_grad_ptr is not None:
        tl.store(image_grad_ptr + offsets, (-grad).to(image_grad_ptr.dtype.element_ty), mask=mask)


def _first_stage(x: Inputs) -> Tensor:
    """The map of distances, or a sum of them per program."""
    count = x.image.numel()
    if count == 0 and x.reduce:
        return x.image.new_zeros((), dtype=torch.float32)
    if count == 0:
        return torch.zeros_like(x.image, dtype=torch.float32)
    image = dense(x.image)
    image_pred = laid_out_as(x.image_pred, image)
    weight = broadcast_args(x.weight, image)
    grid = stream_grid(count, x.reduce)
    out = image.new_empty(grid, dtype=torch.float32) if x.reduce else torch.empty_like(image, dtype=torch.float32)
    with on_device(image):
        _pixel_fwd_kernel[grid](
            image, image_pred, weight, out, count, x.parameter, x.kind, x.reduce, needs_int64(image, x.weight),
            STREAM_BLOCK, **STREAM_OPTIONS,
        )  # fmt: skip
    return out


def pixel_fwd(x: Inputs) -> Tensor:
    out = _first_stage(x)
    return total(out) if x.reduce else out


def pixel_total_fwd(x: Inputs, factors: list[float]) -> Tensor:
    return total_of(_first_stage(x)[None], factors)


def pixel_bwd(grad: Tensor, x: Inputs, needs: Needs) -> Grads:
    return pixel_total_bwd(grad, x, needs, [1.0])


def pixel_total_bwd(grad: Tensor, x: Inputs, needs: Needs, factors: list[float]) -> Grads:
    count = x.image.numel()
    if count == 0 or not any(needs):
        return Grads(
            image=torch.empty_like(x.image) if needs.image else x.image.new_empty(0),
            image_pred=torch.empty_like(x.image_pred) if needs.image_pred else x.image_pred.new_empty(0),
        )
    image = dense(x.image)
    pred = laid_out_as(x.image_pred, image)
    is_map = not x.reduce and runs(grad, image) != [(count, 0)]  # sum().backward() gives one value for all elements
    if is_map:
        grad = laid_out_as(grad, image)
    # The gradients differ in sign only: with the images swapped, the first gradient is that of `image`.
    start, end = (image, pred) if needs.image_pred else (pred, image)
    end_grad = torch.empty_like(image)
    start_grad = torch.empty_like(image) if all(needs) else None
    (factor,) = [None] if is_map else factors
    with on_device(image):
        _pixel_bwd_kernel[stream_grid(count, False)](
            grad, start, end, broadcast_args(x.weight, image), factor, end_grad,
            start_grad, count, x.parameter, x.kind, needs_int64(image, x.weight), STREAM_BLOCK,
            **STREAM_OPTIONS,
        )  # fmt: skip
    if not needs.image_pred:
        return Grads(end_grad, x.image_pred.new_empty(0))
    if pred is not x.image_pred:  # copied to the layout of image
        end_grad = torch.empty_like(x.image_pred).copy_(end_grad)
    return Grads(image.new_empty(0) if start_grad is None else start_grad, end_grad)


def aot_cases() -> Iterator[AotCase]:
    """Every kind, dtype, reduction, sort of weight and set of gradients; then what varies less."""
    shape = (2, 3, 64, 64)
    weights = {"": None, "dense weight": shape, "broadcast weight": (2, 1, 64, 64)}
    for dtype, kind, reduce, sort in itertools.product(HALF_AND_SINGLE, KINDS, (True, False), weights):
        size = weights[sort]
        weight = None if size is None else torch.empty(size, device="meta").expand(shape)
        yield from _aot_calls(sort, torch.empty(shape, dtype=dtype, device="meta"), weight, kind, reduce)
    image = torch.empty(shape, device="meta")
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.bool):
        weight = torch.empty(2, 1, 64, 64, dtype=dtype, device="meta").expand(shape)
        yield from _aot_calls(f"{dtype} weight", image, weight, "l2", True)
    large = torch.empty(2, 3, 32768, 16384, dtype=torch.bfloat16, device="meta")  # offsets pass 2**31
    for weight in (None, large[:, :1].expand(large.shape)):
        yield from _aot_calls("int64", large, weight, "l2", True)
    odd = torch.empty(1, 3, 33, 65, device="meta")
    yield from _aot_calls("odd", odd, None, "l2", True, vector=False)


def _aot_calls(
    label: str, image: Tensor, weight: Tensor | None, kind: str, reduce: bool, vector: bool = True
) -> Iterator[AotCase]:
    label = f"{kind} {str(image.dtype).removeprefix('torch.')} {'sum' if reduce else 'map'} {label}".rstrip()
    wide = ("_pixel_fwd_kernel", "_pixel_bwd_kernel") if vector else ()
    grad = torch.empty(() if reduce else image.shape, device="meta")
    x = Inputs(image, image, weight, kind, 0.5, reduce)
    yield AotCase(f"forward {label}", pixel_fwd, (x,), wide)
    for needs in (Needs(False, True), Needs(True, True)):  # (True, False) is the first with the images swapped
        name = f"backward {label}{' both' if all(needs) else ''}"
        yield AotCase(name, pixel_bwd, (grad, x, needs), wide)
