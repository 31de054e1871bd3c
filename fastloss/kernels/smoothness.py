"""Triton kernels for the smoothness loss: first differences of [N, C, H, W], without guide and weight.

A program handles blocks of 2048 pixels of one plane (an image's channel). With d_y, d_x the differences towards the
next pixel (0 where that would leave the image) and m = sqrt(d_y^2 + d_x^2):

    kind        sums [N, C, directions]     what a difference pulls at: its end with +, its start with -
    l1          |d_y|, |d_x|                sign(d)
    l2          d_y^2, d_x^2                2 d
    isotropic   m                           d / m, 0 where m is 0

The backward gathers: a pixel adds up what the differences that touch it pull, so that it is written once, without
atomics. Bytes per element of size s: forward s, backward 2 s; the neighbours come from the caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import REDUCE_PROGRAMS, STREAM_BLOCK, STREAM_OPTIONS, AotCase, on_device, sign

KINDS = ("l1", "l2", "isotropic")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _read(image_ptr, offsets, mask):
    return tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _slope(d, KIND: tl.constexpr):
    if KIND == "l1":
        return sign(d)
    else:
        return 2.0 * d


@triton.jit
def _inverse_length(dy, dx):
    squares = dy * dy + dx * dx
    return tl.where(squares < 1.1754944e-38, 0.0, tl.rsqrt(squares))  # rsqrt takes subnormals for 0


@triton.jit
def _smoothness_fwd_kernel(
    image_ptr,  # (planes, count)
    out_ptr,  # (planes, splits, directions) float32
    count,
    width,
    splits,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    image_ptr += (program // splits).to(tl.int64) * count
    split = program % splits
    if WIDE:
        split = split.to(tl.int64)
    down_sum = tl.zeros((BLOCK,), tl.float32)
    right_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(split * BLOCK, count, splits * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < count
        has_down = offsets < count - width
        has_right = inside & (offsets % width != width - 1)
        pixel = _read(image_ptr, offsets, inside)
        dy = tl.where(has_down, _read(image_ptr, offsets + width, has_down) - pixel, 0.0)
        dx = tl.where(has_right, _read(image_ptr, offsets + 1, has_right) - pixel, 0.0)
        if KIND == "l1":
            down_sum += tl.abs(dy)
            right_sum += tl.abs(dx)
        elif KIND == "l2":
            down_sum += dy * dy
            right_sum += dx * dx
        else:
            down_sum += tl.sqrt(dy * dy + dx * dx)
    if KIND == "isotropic":
        tl.store(out_ptr + program, tl.sum(down_sum))
    else:
        out_ptr += program.to(tl.int64) * 2
        tl.store(out_ptr, tl.sum(down_sum))
        tl.store(out_ptr + 1, tl.sum(right_sum))


@triton.jit
def _smoothness_bwd_kernel(
    grad_ptr,  # (planes, directions) float32
    image_ptr,  # (planes, count)
    image_grad_ptr,  # (planes, count)
    count,
    width,
    splits,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    plane = (program // splits).to(tl.int64)
    image_ptr += plane * count
    split = program % splits
    if WIDE:
        split = split.to(tl.int64)
    offsets = split * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    column = offsets % width
    has_up = inside & (offsets >= width)
    has_down = offsets < count - width
    has_left = inside & (column != 0)
    has_right = inside & (column != width - 1)
    pixel = _read(image_ptr, offsets, inside)
    from_up = tl.where(has_up, pixel - _read(image_ptr, offsets - width, has_up), 0.0)
    to_down = tl.where(has_down, _read(image_ptr, offsets + width, has_down) - pixel, 0.0)
    from_left = tl.where(has_left, pixel - _read(image_ptr, offsets - 1, has_left), 0.0)
    to_right = tl.where(has_right, _read(image_ptr, offsets + 1, has_right) - pixel, 0.0)
    if KIND == "isotropic":
        # the difference that starts in the pixel above has a component along x, that of the left pixel one along y
        above, before = has_up & has_right, has_left & has_down
        aside = _read(image_ptr, offsets - width + 1, above) - (pixel - from_up)
        below = _read(image_ptr, offsets + width - 1, before) - (pixel - from_left)
        own = (to_down + to_right) * _inverse_length(to_down, to_right)
        of_up = from_up * _inverse_length(from_up, tl.where(above, aside, 0.0))
        of_left = from_left * _inverse_length(tl.where(before, below, 0.0), from_left)
        grad = tl.load(grad_ptr + plane) * (of_up + of_left - own)
    else:
        along_y = _slope(from_up, KIND) - _slope(to_down, KIND)
        along_x = _slope(from_left, KIND) - _slope(to_right, KIND)
        grad = tl.load(grad_ptr + 2 * plane) * along_y + tl.load(grad_ptr + 2 * plane + 1) * along_x
    image_grad_ptr += plane * count
    tl.store(image_grad_ptr + offsets, grad.to(image_grad_ptr.dtype.element_ty), mask=inside)


def _wide(image: Tensor) -> bool:
    """Whether an offset within a plane, or one block or row past its end, does not fit 32 bits."""
    return image.shape[2] * image.shape[3] + image.shape[3] >= 2**31 - REDUCE_PROGRAMS * STREAM_BLOCK


def smoothness_fwd(
    image_pred: Tensor, guide: Tensor | None, weight: Tensor | None, kind: str, order: int
) -> Tensor:
    images, channels, height, width = image_pred.shape
    planes, count = images * channels, height * width
    directions = 1 if kind == "isotropic" else 2
    if planes * count == 0:
        return image_pred.new_zeros((images, channels, directions), dtype=torch.float32)
    image = image_pred.contiguous()
    splits = min(triton.cdiv(count, STREAM_BLOCK), triton.cdiv(REDUCE_PROGRAMS, planes))
    out = image.new_empty((images, channels, splits, directions), dtype=torch.float32)
    with on_device(image):
        _smoothness_fwd_kernel[(planes * splits,)](
            image, out, count, width, splits, kind, _wide(image), STREAM_BLOCK, **STREAM_OPTIONS
        )
    return out.sum(2) if splits > 1 else out[:, :, 0]


def smoothness_bwd(
    grad: Tensor, image_pred: Tensor, guide: Tensor | None, weight: Tensor | None, kind: str, order: int
) -> Tensor:
    out = torch.empty_like(image_pred)
    if out.numel() == 0:
        return out
    image = image_pred.contiguous()
    written = out if out.is_contiguous() else torch.empty_like(image)
    count, width = image.shape[2] * image.shape[3], image.shape[3]
    splits = triton.cdiv(count, STREAM_BLOCK)
    with on_device(image):
        _smoothness_bwd_kernel[(image.shape[0] * image.shape[1] * splits,)](
            grad.contiguous(), image, written, count, width, splits, kind, _wide(image), STREAM_BLOCK,
            **STREAM_OPTIONS,
        )  # fmt: skip
    return out if written is out else out.copy_(written)


def aot_cases() -> Iterator[AotCase]:
    """Every kind and dtype, at even and odd sizes, and planes whose offsets pass 32 bits."""
    sizes = {"": (2, 3, 64, 64), "odd": (1, 3, 33, 65), "int64": (1, 1, 65536, 32768)}
    for dtype, kind, (size, shape) in itertools.product(HALF_AND_SINGLE, KINDS, sizes.items()):
        image = torch.empty(shape, dtype=dtype, device="meta")
        grad = torch.empty((*shape[:2], 1 if kind == "isotropic" else 2), device="meta")
        label = f"{kind} {str(dtype).removeprefix('torch.')} {size}".rstrip()
        forward = () if size == "odd" else ("_smoothness_fwd_kernel",)
        # isotropic: four of the seven loads are one element off, hence narrow, whatever the size
        backward = () if size == "odd" or kind == "isotropic" else ("_smoothness_bwd_kernel",)
        yield AotCase(f"forward {label}", smoothness_fwd, (image, None, None, kind, 1), forward)
        yield AotCase(f"backward {label}", smoothness_bwd, (grad, image, None, None, kind, 1), backward)
