"""Triton kernels of mode seeking: distances of two images and of their noises, and what the losses make of them.

1. sums: |a - b| of images and noises in one launch, some programs for each sample.
2. loss: one program makes of these the loss and its derivatives by a difference, of a sample or of all.
Backward: the four gradients in one launch, as signs times these.

Bytes of s an element: forward 2 s, backward 4 s with both gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import sign
from ...core.kernels.launch import REDUCE_PROGRAMS, STREAM_OPTIONS, AotCase, on_device
from ..mode_seeking import Grads, Inputs, Needs, Saved

BLOCK = 1024  # elements of a sample at a time
MOST_PARTS = 256  # programs that sum one sample's
SUMS = 2048  # sums of programs that are added at a time


class Pair(NamedTuple):
    """Two tensors of samples, and the programs that each sample has."""

    a: Any  # (samples, size)
    b: Any  # (samples, size)
    size: Any
    parts: Any


@triton.jit
def _sum(pair, program, BLOCK: tl.constexpr):
    """sum |a - b| of the blocks that a program has of its sample."""
    sample, part = (program // pair.parts).to(tl.int64), program % pair.parts
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(part * BLOCK, pair.size, pair.parts * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        at, inside = sample * pair.size + offsets, offsets < pair.size
        a = tl.load(pair.a + at, mask=inside, other=0.0).to(tl.float32)
        acc += tl.abs(a - tl.load(pair.b + at, mask=inside, other=0.0).to(tl.float32))
    return tl.sum(acc, 0)


@triton.jit
def _mode_seeking_sums_kernel(
    images: Pair,
    noises: Pair,
    sums_ptr,  # (samples, images.parts) float32, then (samples, noises.parts)
    samples,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    of_images = samples * images.parts
    if program < of_images:
        total = _sum(images, program, BLOCK)
    else:
        total = _sum(noises, program - of_images, BLOCK)
    tl.store(sums_ptr + program, total)


@triton.jit
def _distances(sums_ptr, first, samples, pair, SAMPLES: tl.constexpr, PARTS: tl.constexpr):
    """Mean |a - b| of SAMPLES samples, 0 of those that there are not."""
    sample, part = first + tl.arange(0, SAMPLES), tl.arange(0, PARTS)
    inside = (sample < samples)[:, None] & (part < pair.parts)[None, :]
    sums = tl.load(sums_ptr + sample[:, None] * pair.parts + part[None, :], mask=inside, other=0.0)
    return tl.sum(sums, 1) / pair.size


@triton.jit
def _mode_seeking_loss_kernel(
    images: Pair,
    noises: Pair,
    sums_ptr,  # (samples, images.parts) float32, then (samples, noises.parts)
    loss_ptr,  # (1,) float32
    of_images_ptr,  # (samples,) float32, or (1,)
    of_noises_ptr,  # (samples,) float32, or (1,)
    samples,
    eps,
    margin,  # or infinity
    PER_SAMPLE: tl.constexpr,
    SAMPLES: tl.constexpr,
    PARTS: tl.constexpr,
):
    noises_ptr = sums_ptr + samples * images.parts
    losses, others = tl.zeros((SAMPLES,), tl.float32), tl.zeros((SAMPLES,), tl.float32)
    for first in range(0, samples, SAMPLES):
        d_image = _distances(sums_ptr, first, samples, images, SAMPLES, PARTS)
        d_z = _distances(noises_ptr, first, samples, noises, SAMPLES, PARTS)
        if PER_SAMPLE:
            sample = first + tl.arange(0, SAMPLES)
            ratio = tl.where(d_z == 0, 0.0, d_image) / (d_z + eps)
            losses -= tl.where(ratio > margin, margin, ratio)
            counts = ~((d_z == 0) | (ratio > margin))  # NaN too
            slope = tl.where(counts, 1.0 / (d_z + eps) / samples, 0.0)
            tl.store(of_images_ptr + sample, -slope / images.size, mask=sample < samples)
            of_noises = tl.where(counts, slope * ratio / noises.size, 0.0)
            tl.store(of_noises_ptr + sample, of_noises, mask=sample < samples)
        else:
            losses += d_image
            others += d_z
    loss = tl.sum(losses, 0) / samples
    if not PER_SAMPLE:
        d_z = tl.sum(others, 0) / samples
        ratio = loss / tl.where(d_z == 0, 1.0, d_z)
        loss = tl.where(d_z == 0, 0.0, 1.0 / (ratio + eps))
        slope = tl.where(d_z == 0, 0.0, loss * loss / d_z / samples)
        tl.store(of_images_ptr, -slope / images.size)
        tl.store(of_noises_ptr, tl.where(d_z == 0, 0.0, slope * ratio / noises.size))
    tl.store(loss_ptr, loss)


@triton.jit
def _write(pair, program, factor_ptr, grad, of_a_ptr, of_b_ptr, PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of one block of a sample; the number of elements in it."""
    sample = (program // pair.parts).to(tl.int64)
    offsets = program % pair.parts * BLOCK + tl.arange(0, BLOCK)
    at, inside = sample * pair.size + offsets, offsets < pair.size
    a = tl.load(pair.a + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(pair.b + at, mask=inside, other=0.0).to(tl.float32)
    if PER_SAMPLE:
        factor = tl.load(factor_ptr + sample)
    else:
        factor = tl.load(factor_ptr)
    found = grad * factor * sign(a - b)
    if of_a_ptr is not None:
        tl.store(of_a_ptr + at, found.to(of_a_ptr.dtype.element_ty), mask=inside)
    if of_b_ptr is not None:
        tl.store(of_b_ptr + at, (-found).to(of_b_ptr.dtype.element_ty), mask=inside)
    return pair.size


@triton.jit
def _mode_seeking_bwd_kernel(
    grad_ptr,  # (1,) float32
    images: Pair,
    noises: Pair,
    of_images_ptr,  # (samples,) float32, or (1,)
    of_noises_ptr,  # (samples,) float32, or (1,)
    images_a_ptr,  # (samples, images.size), or None: not needed
    images_b_ptr,  # (samples, images.size), or None
    z_a_ptr,  # (samples, noises.size), or None
    z_b_ptr,  # (samples, noises.size), or None
    of_images,  # programs that write gradients of images
    PER_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, grad = tl.program_id(0), tl.load(grad_ptr)
    if program < of_images:
        _write(images, program, of_images_ptr, grad, images_a_ptr, images_b_ptr, PER_SAMPLE, BLOCK)
    else:
        _write(noises, program - of_images, of_noises_ptr, grad, z_a_ptr, z_b_ptr, PER_SAMPLE, BLOCK)


def _pair(a: Tensor, b: Tensor, most: int) -> Pair:
    return Pair(a.contiguous(), b.contiguous(), a.shape[1], min(triton.cdiv(a.shape[1], BLOCK), most))


def mode_seeking_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    samples, per_sample = x.images_a.shape[0], x.form == "dsgan"
    most = min(max(REDUCE_PROGRAMS // samples, 1), MOST_PARTS)
    images, noises = _pair(x.images_a, x.images_b, most), _pair(x.z_a, x.z_b, most)
    parts = max(images.parts, noises.parts)
    sums = x.images_a.new_empty(samples * (images.parts + noises.parts), dtype=torch.float32)
    loss = sums.new_empty(())
    saved = Saved(*(sums.new_empty(samples if per_sample else 1) for _ in range(2)))
    block = triton.next_power_of_2(parts)
    with on_device(sums):
        _mode_seeking_sums_kernel[(samples * (images.parts + noises.parts),)](
            images, noises, sums, samples, BLOCK, **STREAM_OPTIONS
        )
        _mode_seeking_loss_kernel[(1,)](
            images, noises, sums, loss, *saved, samples, x.eps, x.margin, per_sample, max(SUMS // block, 1), block,
            **STREAM_OPTIONS,
        )  # fmt: skip
    return loss, saved


def mode_seeking_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    def gradient(t: Tensor, needed: bool) -> Tensor | None:
        return t.new_empty(t.shape) if needed else None

    samples = x.images_a.shape[0]
    images, noises = _pair(x.images_a, x.images_b, 2**31), _pair(x.z_a, x.z_b, 2**31)
    found = [gradient(t, needed) for t, needed in zip((x.images_a, x.images_b, x.z_a, x.z_b), needs, strict=True)]
    of_images = samples * images.parts if needs.images_a or needs.images_b else 0
    of_noises = samples * noises.parts if needs.z_a or needs.z_b else 0
    if of_images + of_noises:
        with on_device(grad):
            _mode_seeking_bwd_kernel[(of_images + of_noises,)](
                grad, images, noises, *saved, *found, of_images, x.form == "dsgan", BLOCK, **STREAM_OPTIONS
            )
    return Grads(*(t.new_empty(0) if g is None else g for g, t in zip(found, x[:4], strict=True)))


def aot_cases() -> Iterator[AotCase]:
    """Either form, every dtype, all gradients and those that GANs take, sizes that are no multiple of 16."""
    for form, dtype, size in itertools.product(
        ("msgan", "dsgan"), (torch.float32, torch.bfloat16, torch.float16), (3072, 1573)
    ):
        image, noise = torch.empty(8, size, dtype=dtype, device="meta"), torch.empty(8, 128, device="meta")
        x = Inputs(image, image, noise, noise, form, 1e-5, 0.5)
        label = f"{form} {str(dtype).removeprefix('torch.')} {size}"
        vector = size % 16 == 0
        yield AotCase(f"forward {label}", mode_seeking_fwd, (x,), ("_mode_seeking_sums_kernel",) if vector else ())
        factor = torch.empty(8 if form == "dsgan" else 1, device="meta")
        for needs in (Needs(True, True, True, True), Needs(True, True, False, False), Needs(False, False, True, True)):
            yield AotCase(
                f"backward {label} {sum(needs)} gradients", mode_seeking_bwd,
                (torch.empty((), device="meta"), x, Saved(factor, factor), needs),
                ("_mode_seeking_bwd_kernel",) if vector else (),
            )  # fmt: skip
