"""The second stage of the sums of a loss, with the factors of a mean: one tiny launch (core/scaled_sum.py is its op),
and the weighted sum of numbers that are there already (core/weighted_sum.py).

The first stage leaves a partial sum of each kind per program. One program adds them up in a fixed order, hence
deterministically: total = sum_k factors[k] * sums[k].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..weighted_sum import Grads, Inputs
from .device_math import zeros
from .launch import AotCase, on_device

BLOCK = 1024
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
MOST = 64 * BLOCK  # more partials than this go through a sum of torch's first, which many programs make


@triton.jit(do_not_specialize=["programs", "stride_sum"])
def _total_kernel(
    partials_ptr,  # (sums, programs) float32, any strides
    total_ptr,  # one float32
    factors,  # of each sum
    programs,
    stride_sum,
    stride_program,
    BLOCK: tl.constexpr,
):
    sums = zeros(len(factors), BLOCK)
    for start in range(0, programs, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        new = ()
        for k in tl.static_range(len(factors)):
            partial_ptr = partials_ptr + k * stride_sum + lanes * stride_program
            new = new + (sums[k] + tl.load(partial_ptr, mask=lanes < programs, other=0.0),)  # type: ignore[assignment]
        sums = new
    total = 0.0
    for k in tl.static_range(len(factors)):
        total += tl.sum(sums[k]) * factors[k]
    tl.store(total_ptr, total)


@triton.jit(
    do_not_specialize=[
        "programs", "weight_programs", "stride_sum", "stride_weight_sum", "stride_program", "stride_weight_program",
    ],
    do_not_specialize_on_alignment=["partials_ptr", "weights_ptr"],
)  # fmt: skip
def _weighted_total_kernel(
    partials_ptr,  # (sums, programs) float32, any strides
    weights_ptr,  # (sums, weight_programs) float32, any strides
    total_ptr,  # one float32
    scales_ptr,  # (sums,) float32
    programs,
    weight_programs,
    stride_sum,
    stride_weight_sum,
    stride_program,
    stride_weight_program,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = 0.0
    for k in tl.static_range(SUMS):
        sums, weights = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, programs, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            sums += tl.load(partials_ptr + k * stride_sum + lanes * stride_program, mask=lanes < programs, other=0.0)
        for start in range(0, weight_programs, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            weight_ptr = weights_ptr + k * stride_weight_sum + lanes * stride_weight_program
            weights += tl.load(weight_ptr, mask=lanes < weight_programs, other=0.0)
        weight = tl.sum(weights)
        divisor = tl.where(weight == float("inf"), float("nan"), tl.where(weight == 0, 1.0, weight))
        total += tl.div_rn(tl.sum(sums), divisor)  # one over a small weight may be too large a number
        tl.store(scales_ptr + k, tl.div_rn(1.0, divisor))
    tl.store(total_ptr, total)


@triton.jit
def _weights_kernel(grad_ptr, weights, out_ptr):
    """out[k] = grad * weights[k]"""
    grad = tl.load(grad_ptr)
    for k in tl.static_range(len(weights)):
        tl.store(out_ptr + k, grad * weights[k])


def total_of(partials: Tensor, factors: list[float]) -> Tensor:
    """From the partial sums ``[sums, programs]``."""
    if partials.shape[1] > MOST:
        partials = partials.sum(1, keepdim=True)
    out = partials.new_empty(())
    with on_device(partials):
        _total_kernel[(1,)](partials, out, tuple(factors), partials.shape[1], *partials.stride(), BLOCK, **OPTIONS)
    return out


def weighted_total_of(partials: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum_k sums[k] / weights[k] from partial sums of both, ``[sums, programs]``, and the 1 / weights[k].

    Of weights that are 0 the quotient is 1 / 1, for then the sum is 0; of infinite ones NaN, never a wrong number.
    """
    if max(partials.shape[1], weights.shape[1]) > MOST:
        partials, weights = partials.sum(1, keepdim=True), weights.sum(1, keepdim=True)
    out, scales = partials.new_empty(()), partials.new_empty(partials.shape[0])
    strides = (partials.stride(0), weights.stride(0), partials.stride(1), weights.stride(1))
    with on_device(partials):
        _weighted_total_kernel[(1,)](
            partials, weights, out, scales, partials.shape[1], weights.shape[1], *strides, partials.shape[0], BLOCK,
            **OPTIONS,
        )  # fmt: skip
    return out, scales


def weighted_sum_fwd(x: Inputs) -> Tensor:
    return total_of(x.values[:, None], x.weights)


def weighted_sum_bwd(grad: Tensor, x: Inputs) -> Grads:
    out = grad.new_empty(len(x.weights))
    with on_device(grad):
        _weights_kernel[(1,)](grad, tuple(x.weights), out, num_warps=1)
    return Grads(out)


def aot_cases() -> Iterator[AotCase]:
    for sums in (1, 2, 3):
        partials = torch.empty((1056, sums), device="meta").T
        yield AotCase(f"{sums} sums", total_of, (partials, [0.5] * sums))
        both = torch.empty((1056, 2 * sums), device="meta").T
        yield AotCase(f"{sums} weighted sums", weighted_total_of, tuple(both.chunk(2)))
    x = Inputs(torch.empty(4, device="meta"), [0.5, 0.25, 0.25, 1.0])
    yield AotCase("4 numbers, backward", weighted_sum_bwd, (torch.empty((), device="meta"), x))
