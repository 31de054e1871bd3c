"""The second stage of the sums of a loss, with the factors of a mean: one tiny launch (core/scaled_sum.py is its op).

The first stage leaves a partial sum of each kind per program. One program adds them up in a fixed order, hence
deterministically: total = sum_k factors[k] * sums[k].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def total_of(partials: Tensor, factors: list[float]) -> Tensor:
    """From the partial sums ``[sums, programs]``."""
    if partials.shape[1] > MOST:
        partials = partials.sum(1, keepdim=True)
    out = partials.new_empty(())
    with on_device(partials):
        _total_kernel[(1,)](partials, out, tuple(factors), partials.shape[1], *partials.stride(), BLOCK, **OPTIONS)
    return out


def aot_cases() -> Iterator[AotCase]:
    for sums in (1, 2, 3):
        partials = torch.empty((1056, sums), device="meta").T
        yield AotCase(f"{sums} sums", total_of, (partials, [0.5] * sums))
