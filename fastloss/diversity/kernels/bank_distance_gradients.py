"""The gradient of the distance from a whole bank: sums of weighted signs or differences, and what becomes of them."""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.kernels.device_math import sign
from .bank_tile import BankTiles, centre_of, load_bank, scaled


@triton.jit
def _weighted_differences(generated_ptr, rows, factor, bank, weights_ptr, bank_factor_ptr, columns, first, last, size,
                          METRIC: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """[rows, columns]: sum of weight (a - b) over bank rows first .. last, those of rows that are near one by one."""
    inside = columns < size
    a_ptrs = generated_ptr + rows.to(tl.int64)[:, None] * size + columns[None, :]
    a = tl.load(a_ptrs, mask=inside[None, :], other=0.0) * factor[:, None]
    if METRIC == "l2":
        centre = centre_of(generated_ptr, bank, columns, inside)[None, :]
    else:
        centre = tl.zeros((1, columns.shape[0]), tl.float32)
    weights_ptrs = weights_ptr + rows.to(tl.int64) * bank.rows
    total = tl.zeros((rows.shape[0],), tl.float32)
    product = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    found = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for j in range(first, last, TILE):
        bank_row = j + tl.arange(0, TILE)
        bank_rows = tl.minimum(bank_row, bank.rows - 1)
        weight = tl.load(weights_ptrs[:, None] + bank_row[None, :], mask=(bank_row < last)[None, :], other=0.0)
        b = load_bank(bank, bank_rows, columns, inside)
        if METRIC == "cosine":
            b = b * tl.load(bank_factor_ptr + bank_rows)[:, None]
        far = tl.where(weight < 0, 0.0, weight)
        product = tl.dot(far, b - centre, product, input_precision=PRECISION)
        total += tl.sum(far, 1)
        if tl.min(weight) < 0:
            for i in range(j, tl.minimum(j + TILE, last)):
                near = tl.load(weights_ptrs + i)
                one = i + tl.arange(0, 1)
                row = tl.sum(load_bank(bank, one, columns, inside), 0)
                if METRIC == "cosine":
                    row = row * tl.load(bank_factor_ptr + i)
                found += tl.where(near < 0, -near, 0.0)[:, None] * (a - row[None, :])
    return found + (total[:, None] * (a - centre) - product)


@triton.jit
def _weighted_signs(generated_ptr, rows, bank, weights_ptr, columns, first, last, size):
    """[rows, columns]: sum of weight sign(a - b) over bank rows first .. last; without weights each counts once."""
    inside = columns < size
    a_ptrs = generated_ptr + rows.to(tl.int64)[:, None] * size + columns[None, :]
    a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
    found = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    column_ptrs = bank.ptr + columns.to(tl.int64) * bank.stride_column
    for chunk in range(first, last, 64):  # sums of sums round less
        part = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
        for i in range(chunk, tl.minimum(chunk + 64, last)):
            b = scaled(tl.load(column_ptrs + tl.cast(i, tl.int64) * bank.stride_row, mask=inside, other=0), bank)
            one = sign(a - b[None, :])
            if weights_ptr is None:
                part += one
            else:
                part += tl.load(weights_ptr + rows.to(tl.int64) * bank.rows + i)[:, None] * one
        found += part
    return found


@triton.jit
def bank_distance_sums_kernel(
    generated_ptr,  # (count, size) float32
    bank: BankTiles,
    weights_ptr,  # (count, bank.rows) float32, or None: the mean
    factor_ptr,  # (count,) float32
    bank_factor_ptr,  # (bank.rows,) float32
    sums_ptr,  # (splits, count, size) float32: to which those of this piece are added
    count,
    size,
    rows_of_split,
    IS_FIRST: tl.constexpr,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(row, count - 1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    first, last = split * rows_of_split, tl.minimum((split + 1) * rows_of_split, bank.rows)
    if METRIC == "l1":
        found = _weighted_signs(generated_ptr, rows, bank, weights_ptr, columns, first, last, size)
    else:
        if METRIC == "cosine":
            factor = tl.load(factor_ptr + rows)
        else:
            factor = tl.full((ROWS,), 1.0, tl.float32)
        found = _weighted_differences(
            generated_ptr, rows, factor, bank, weights_ptr, bank_factor_ptr, columns, first, last, size, METRIC, TILE,
            PRECISION,
        )  # fmt: skip
    at = sums_ptr + (split.to(tl.int64) * count + row)[:, None] * size + columns[None, :]
    inside = (row < count)[:, None] & (columns < size)[None, :]
    if not IS_FIRST:
        found += tl.load(at, mask=inside, other=0.0)
    tl.store(at, found, mask=inside)


@triton.jit
def _sum_of_splits(sums_ptr, row, columns, count, size, splits):
    inside, total = columns < size, tl.zeros(columns.shape, tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + (tl.cast(split, tl.int64) * count + row) * size + columns, mask=inside, other=0.0)
    return total


@triton.jit
def bank_distance_bwd_kernel(
    grad_ptr,  # (count,) float32
    generated_ptr,  # (count, size) float32
    factor_ptr,  # (count,) float32
    sums_ptr,  # (splits, count, size) float32
    out_ptr,  # (count, size) float32
    count,
    size,
    splits,
    mean,  # what a sum is multiplied with
    METRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    grad = tl.load(grad_ptr + row) * mean
    if METRIC == "cosine":  # of u = g / |g|: without the part along u, over |g|
        factor = tl.load(factor_ptr + row)
        along = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, size, BLOCK):
            columns = k + tl.arange(0, BLOCK)
            u = tl.load(generated_ptr + row * size + columns, mask=columns < size, other=0.0) * factor
            along += u * _sum_of_splits(sums_ptr, row, columns, count, size, splits)
        part = tl.sum(along, 0)
        grad *= factor
    for k in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        columns = k + tl.arange(0, BLOCK)
        out = _sum_of_splits(sums_ptr, row, columns, count, size, splits)
        if METRIC == "cosine":
            u = tl.load(generated_ptr + row * size + columns, mask=columns < size, other=0.0) * factor
            out -= part * u
        tl.store(out_ptr + row * size + columns, grad * out, mask=columns < size)
