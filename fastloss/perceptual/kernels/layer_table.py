"""Lists of layers for kernels that serve a whole list in one launch.

Such a kernel takes columns: of every layer a pointer, a number or a factor. For up to DIRECT layers they are tuples
among its arguments. For longer lists, of up to MOST layers, `_write_table_kernel` writes them to a table in device
memory first, and the kernel takes the table and the columns' places in it. What is written are arguments too: nothing
is copied from the host, which a captured graph could not do, and nothing is waited for.

Triton compiles anew whenever a whole number in a tuple becomes 1 or a multiple of 16 (for tuples it knows no
`do_not_specialize`), so numbers n go as 2 n + 3, and pointers to the table as 2^62 + 2 p + 3, which is 64 bits wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import odd_address

DIRECT = 8  # layers as arguments; with 16, gfx942 runs out of scalar registers
MOST = 64  # layers of a table: five columns of pointers and four of numbers are 3.5 KiB, of 4 KiB of arguments
BUCKETS = (16, MOST)  # layers that the writing kernel is compiled for
UNIT = 16  # elements; where all rows of all layers have whole units, every access can be 128 bits wide
LANES = tl.constexpr(MOST)
FAR = tl.constexpr(2**29)  # programs: where layers start that are not there; 2 n + 3 of it has 32 bits, too
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _halves(table):
    return table.to(tl.pointer_type(tl.int32))


@triton.jit
def layer_of(program, starts, DTYPE: tl.constexpr):
    """What the layer is found by whose programs begin with the last start not past this one: its row in the table."""
    if DTYPE is None:
        return program
    else:
        return tl.sum((tl.load(_halves(starts) + 2 * tl.arange(0, LANES)) <= program).to(tl.int32)) - 1


@triton.jit
def _entry(values, layer, starts, DTYPE: tl.constexpr):
    if DTYPE is None:
        found = values[0]
        for i in tl.static_range(len(values)):  # from 0 on: a tensor comes out also of a single number
            found = tl.where(layer >= (starts[i] - 3) >> 1, values[i], found)
        return found
    else:
        return tl.load(starts + values * LANES + layer)


@triton.jit
def pointer_of(values, layer, starts, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The layer's pointer in a column. DTYPE is that of the elements if there is a table, else None."""
    found = _entry(values, layer, starts, DTYPE)
    if DTYPE is None:
        return found
    else:
        pointer = found.to(tl.pointer_type(DTYPE))
        return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def start_of(layer, starts, DTYPE: tl.constexpr):
    if DTYPE is None:
        return number_of(starts, layer, starts, DTYPE)
    else:
        return small_number_of(0, layer, starts)


@triton.jit
def number_of(values, layer, starts, DTYPE: tl.constexpr):
    found = _entry(values, layer, starts, DTYPE)
    return (found - 3) >> 1 if DTYPE is None else found


@triton.jit
def small_number_of(values, layer, table):
    """A number below 2^31 of a table: its lower half is all that is read."""
    return tl.load(_halves(table) + 2 * (values * LANES + layer))


@triton.jit
def factor_of(values, layer, starts, DTYPE: tl.constexpr):
    found = _entry(values, layer, starts, DTYPE)
    return found if DTYPE is None else found.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _write_table_kernel(
    table_ptr,  # (columns, MOST) int64: the numbers, then the pointers, then the factors
    numbers,  # WIDTH of each column, one column after the other
    pointers,
    factors,
    WIDTH: tl.constexpr,
):
    lanes = tl.arange(0, LANES)
    tl.store(table_ptr + lanes, tl.full((LANES,), FAR, tl.int64), mask=lanes >= WIDTH)  # the starts' column
    for i in tl.static_range(len(numbers)):
        tl.store(table_ptr + i // WIDTH * LANES + i % WIDTH, (numbers[i].to(tl.int64) - 3) >> 1)
    table_ptr += len(numbers) // WIDTH * LANES
    for i in tl.static_range(len(pointers)):
        tl.store(table_ptr + i // WIDTH * LANES + i % WIDTH, (pointers[i] - ((1 << 62) + 3)) >> 1)
    table_ptr += len(pointers) // WIDTH * LANES
    for i in tl.static_range(len(factors)):
        bits = tl.full((), factors[i], tl.float32).to(tl.int32, bitcast=True)
        tl.store(table_ptr + i // WIDTH * LANES + i % WIDTH, bits.to(tl.int64))


@dataclass
class Columns:
    """The columns of a launch as its kernel takes them; `starts` are the first of the numbers."""

    numbers: list[Any]
    pointers: list[Any]
    factors: list[Any]
    dtype: tl.dtype | None
    aligned: bool


def columns_of(
    numbers: Sequence[Sequence[int]],
    pointers: Sequence[Sequence[Tensor] | None],
    factors: Sequence[Sequence[float]] = (),
) -> Columns:
    """Kernel arguments for up to MOST layers, written to a table if they are more than DIRECT. None stays None."""
    count = len(numbers[0])
    if count <= DIRECT:
        odd = [tuple(2 * n + 3 for n in column) for column in numbers]
        tuples = [None if column is None else tuple(column) for column in pointers]
        return Columns(odd, tuples, [tuple(column) for column in factors], None, False)
    model = next(column for column in pointers if column is not None)[0]
    width = next(width for width in BUCKETS if count <= width)
    addresses = [None if column is None else [t.data_ptr() for t in column] for column in pointers]
    there = [column for column in addresses if column is not None]
    table = model.new_empty((len(numbers) + len(there) + len(factors), MOST), dtype=torch.int64)
    rest = width - count
    _write_table_kernel[(1,)](
        table,
        tuple(2 * n + 3 for column in numbers for n in (*column, *[FAR.value] * rest)),
        tuple(odd_address(p) for column in there for p in (*column, *[0] * rest)),
        tuple(f for column in factors for f in (*column, *[0.0] * rest)),
        width, num_warps=1,
    )  # fmt: skip
    places = iter(range(len(numbers) + len(there) + len(factors)))
    numbered: list[Any] = [next(places) for _ in numbers]
    numbered[0] = table
    pointed = [None if column is None else next(places) for column in addresses]
    aligned = all(p % 16 == 0 for column in there for p in column)
    return Columns(numbered, pointed, [next(places) for _ in factors], ELEMENTS[model.dtype], aligned)
