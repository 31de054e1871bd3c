"""Triton kernels of the distances of a batch's rows from one another: [N, P] to [N, N], by direct differences.

Forward: a program for one row against 16 of them. Backward: one for some columns of one row, over all others. Batches
are small: the rows stay in the L2 cache, from which forward and backward each read N^2 P elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import sign
from ...core.kernels.launch import AotCase, on_device
from ..pair_distances import Grads, Inputs, Needs
from .bank_tile import OPTIONS, BankTiles, bank_tiles, exact_distances, load_bank

ROWS = 16  # that a program compares with its own at a time
COLUMNS = 128  # elements of them


@triton.jit
def _pair_distances_fwd_kernel(
    x_ptr,  # (count, size) float32
    bank: BankTiles,  # the same
    out_ptr,  # (count, count) float32
    count,
    size,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, other = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    others = tl.minimum(other, count - 1)
    found = exact_distances(x_ptr + row * size, bank, others, size, METRIC, ROWS, COLUMNS)
    tl.store(out_ptr + row * count + other, found, mask=other < count)


@triton.jit
def _pair_distances_bwd_kernel(
    grad_ptr,  # (count, count) float32
    x_ptr,  # (count, size) float32
    bank: BankTiles,  # the same
    out_ptr,  # (count, size) float32
    count,
    size,
    mean,  # what a sum is multiplied with
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < size
    a = tl.load(x_ptr + row * size + columns, mask=inside, other=0.0)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        other = first + tl.arange(0, ROWS)
        others = tl.minimum(other, count - 1)
        weight = tl.load(grad_ptr + row * count + others) + tl.load(grad_ptr + others.to(tl.int64) * count + row)
        weight = tl.where(other < count, weight, 0.0)[:, None]
        d = a - load_bank(bank, others, columns, inside)
        if METRIC == "l1":
            d = sign(d)
        sums += tl.where(weight == 0, 0.0, weight * d)
    tl.store(out_ptr + row * size + columns, mean * tl.sum(sums, 0), mask=inside)


def pair_distances_fwd(x: Inputs) -> Tensor:
    rows = x.x.contiguous()
    count, size = rows.shape
    out = rows.new_empty(count, count)
    with on_device(rows):
        _pair_distances_fwd_kernel[(count, triton.cdiv(count, ROWS))](
            rows, bank_tiles(rows, 1.0, 0.0), out, count, size, x.metric, ROWS, COLUMNS, **OPTIONS
        )
    return out


def pair_distances_bwd(grad: Tensor, x: Inputs, needs: Needs) -> Grads:
    if not needs.x:
        return Grads(x.x.new_empty(0))
    rows, grad = x.x.contiguous(), grad.contiguous()
    count, size = rows.shape
    out = torch.empty_like(rows)
    with on_device(rows):
        _pair_distances_bwd_kernel[(count, triton.cdiv(size, COLUMNS))](
            grad, rows, bank_tiles(rows, 1.0, 0.0), out, count, size, (2.0 if x.metric == "l2" else 1.0) / size,
            x.metric, ROWS, COLUMNS, **OPTIONS,
        )  # fmt: skip
    return Grads(out)


def aot_cases() -> Iterator[AotCase]:
    for metric, (count, size) in itertools.product(("l1", "l2"), ((64, 3072), (5, 17))):
        x, label = Inputs(torch.empty(count, size, device="meta"), metric), f"{metric} {count} x {size}"
        yield AotCase(f"forward {label}", pair_distances_fwd, (x,))
        yield AotCase(
            f"backward {label}", pair_distances_bwd, (torch.empty(count, count, device="meta"), x, Needs(True))
        )
