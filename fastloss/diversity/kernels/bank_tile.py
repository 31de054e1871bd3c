"""A tile of the bank as the kernels read it: converted, scaled and shifted on the way; distances of its rows from one
generated row, by direct differences, which lose no digits however near they are; sums and products with many of them.

Cosine: 1 - cos(a, b) = |u - v|^2 / 2 of the unit rows u and v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from ...core.kernels.launch import registers

TILE = 64  # bank rows that are compared at a time
COLUMNS = 32  # elements of a row that are multiplied at a time (of 64 rows half as many), or that exact distances take
CHUNK = 512  # elements of an inner sum
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


class BankTiles(NamedTuple):
    """scale * bank + shift, from `first` on."""

    ptr: Any  # (rows, size), any strides
    rows: Any
    stride_row: Any
    stride_column: Any
    scale: Any
    shift: Any
    first: Any  # the number that the first of these rows has in the whole bank


def bank_tiles(bank: Tensor, scale: float, shift: float, first: int = 0) -> BankTiles:
    return BankTiles(bank, bank.shape[0], bank.stride(0), bank.stride(1), float(scale), float(shift), first)


@triton.jit
def scaled(raw, bank):
    return raw.to(tl.float32) * bank.scale + bank.shift


@triton.jit
def load_bank(bank, rows, columns, inside):
    """[rows, columns] of the bank, 0 outside."""
    at = rows.to(tl.int64)[:, None] * bank.stride_row + columns.to(tl.int64)[None, :] * bank.stride_column
    return tl.where(inside[None, :], scaled(tl.load(bank.ptr + at, mask=inside[None, :], other=0), bank), 0.0)


@triton.jit
def _largest(generated_ptr, bank, rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(largest |element| of the generated row, of each bank row); 1 for zeros."""
    of_generated, of_bank = tl.zeros((COLUMNS,), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, size, COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        inside = columns < size
        of_generated = tl.maximum(of_generated, tl.abs(tl.load(generated_ptr + columns, mask=inside, other=0.0)))
        of_bank = tl.maximum(of_bank, tl.abs(load_bank(bank, rows, columns, inside)))
    return tl.max(of_generated, 0), tl.max(of_bank, 1)


@triton.jit
def inverse_norms(generated_ptr, bank, rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(1 / |a|, 1 / |b| of each bank row) in two factors each, for no square overflows or underflows: of zeros 0."""
    most, bank_most = _largest(generated_ptr, bank, rows, size, ROWS, COLUMNS)
    scale = tl.where(most == 0, 1.0, 1.0 / most)
    bank_scale = tl.where(bank_most == 0, 1.0, 1.0 / bank_most)
    squares, bank_squares = tl.zeros((COLUMNS,), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, size, COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        inside = columns < size
        a = tl.load(generated_ptr + columns, mask=inside, other=0.0) * scale
        b = load_bank(bank, rows, columns, inside) * bank_scale[:, None]
        squares += a * a
        bank_squares += b * b
    square, bank_square = tl.sum(squares, 0), tl.sum(bank_squares, 1)
    root = tl.where(square == 0, 0.0, 1.0 / tl.sqrt(square))
    bank_root = tl.where(bank_square == 0, 0.0, 1.0 / tl.sqrt(bank_square))
    return scale, root, bank_scale, bank_root


@triton.jit
def exact_distances(
    generated_ptr, bank, rows, size, METRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Of one generated row from bank rows."""
    if METRIC == "cosine":
        scale, root, bank_scale, bank_root = inverse_norms(generated_ptr, bank, rows, size, ROWS, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, size, COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        inside = columns < size
        a = tl.load(generated_ptr + columns, mask=inside, other=0.0)[None, :]
        b = load_bank(bank, rows, columns, inside)
        if METRIC == "cosine":
            a = a * scale * root
            b = b * bank_scale[:, None] * bank_root[:, None]
        d = a - b
        if METRIC == "l1":
            sums += tl.abs(d)
        else:
            sums += d * d
    total = tl.sum(sums, 1)
    if METRIC == "cosine":
        return tl.where(root * bank_root == 0, 1.0, 0.5 * total) + 0.0 * total  # zeros: 1; NaN stays NaN
    else:
        return total / size


@triton.jit
def difference_sums(generated_ptr, rows, factor, bank, bank_rows, bank_factor, size, SQUARES: tl.constexpr,
                    CHUNK: tl.constexpr):  # fmt: skip
    """[rows, bank_rows]: sum |a - b|, or that of squares, in sums of CHUNK elements; both rows times their factors."""
    generated_ptrs = generated_ptr + rows.to(tl.int64) * size
    bank_ptrs = bank.ptr + bank_rows.to(tl.int64) * bank.stride_row
    total = tl.zeros((rows.shape[0], bank_rows.shape[0]), tl.float32)
    for first in range(0, size, CHUNK):
        part = tl.zeros((rows.shape[0], bank_rows.shape[0]), tl.float32)
        for k in range(first, tl.minimum(first + CHUNK, size)):
            b = scaled(tl.load(bank_ptrs + tl.cast(k, tl.int64) * bank.stride_column), bank) * bank_factor
            d = (tl.load(generated_ptrs + k) * factor)[:, None] - b[None, :]
            if SQUARES:
                part += d * d
            else:
                part += tl.abs(d)
        total += part
    return total


@triton.jit
def centre_of(generated_ptr, bank, columns, inside):
    """[columns]: the mean of the first row of either, where that is finite; 0 outside."""
    one = scaled(tl.load(bank.ptr + columns.to(tl.int64) * bank.stride_column, mask=inside, other=0), bank)
    centre = 0.5 * (tl.load(generated_ptr + columns, mask=inside, other=0.0) + one)
    return tl.where(inside & (tl.abs(centre) < float("inf")), centre, 0.0)


@triton.jit
def products(generated_ptr, rows, bank, bank_rows, size, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
             PRECISION: tl.constexpr, CENTRED: tl.constexpr):  # fmt: skip
    """(<a, b>, |a|^2, |b|^2), in sums of CHUNK elements; CENTRED: about the mean of the first row of either, so that
    the squares are about as large as that of a difference."""
    generated_ptrs = generated_ptr + rows.to(tl.int64)[:, None] * size
    dot = tl.zeros((rows.shape[0], bank_rows.shape[0]), tl.float32)
    squares, bank_squares = tl.zeros((rows.shape[0],), tl.float32), tl.zeros((bank_rows.shape[0],), tl.float32)
    for first in range(0, size, CHUNK):
        part = tl.zeros((rows.shape[0], bank_rows.shape[0]), tl.float32)
        for k in range(first, tl.minimum(first + CHUNK, size), COLUMNS):
            columns = k + tl.arange(0, COLUMNS)
            inside = columns < size
            a = tl.load(generated_ptrs + columns[None, :], mask=inside[None, :], other=0.0)
            b = load_bank(bank, bank_rows, columns, inside)
            if CENTRED:
                centre = centre_of(generated_ptr, bank, columns, inside)[None, :]
                a, b = a - centre, b - centre  # all 0 outside
            part = tl.dot(a, tl.trans(b), part, input_precision=PRECISION)
            squares += tl.sum(a * a, 1)
            bank_squares += tl.sum(b * b, 1)
        dot += part
    return dot, squares, bank_squares


def rows_of_tile(count: int) -> int:
    return min(max(triton.next_power_of_2(count), 16), 64)


def precision() -> str:
    """Of products of float32: three of tf32 where there are matrix instructions for these."""
    if triton.knobs.runtime.interpret or driver.active.get_current_target().backend != "cuda":
        return "ieee"
    return "tf32x3"


def scores_options(metric: str, rows: int) -> dict[str, int | bool]:
    """Three products of a tile of 64 by 64 need the registers of eight warps."""
    warps = 8 if metric != "l1" and rows == 64 else 4
    return OPTIONS | {"num_warps": warps} | registers(255)
