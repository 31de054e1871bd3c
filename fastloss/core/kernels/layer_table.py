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
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from ...core.kernels.launch import odd_address

DIRECT = 8  # layers as arguments; with 16, gfx942 runs out of scalar registers
MOST = 64  # layers of a table: five columns of pointers and four of numbers are 3.5 KiB, of 4 KiB of arguments
BUCKETS = (16, MOST)  # layers that the writing kernel is compiled for
UNIT = 16  # elements; where all rows of all layers have whole units, every access can be 128 bits wide
LANES = tl.constexpr(MOST)
FAR = tl.constexpr(2**29)  # programs: where layers start that are not there; 2 n + 3 of it has 32 bits, too
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Table(NamedTuple):
    """How a kernel reads columns, as a constant of it."""

    dtype: tl.dtype | None  # of what the pointers of a table point to; None: the columns are tuples among the arguments
    aligned: bool  # every pointer of a table is a multiple of 16
    unit: int  # elements that lengths are counted in


@triton.jit
def _halves(table):
    return table.to(tl.pointer_type(tl.int32))


@triton.jit
def layer_of(program, starts, TABLE: tl.constexpr):
    """The program's layer, by its row in the table: the last one whose first program is not past this one."""
    if TABLE.dtype is None:
        return program
    else:
        return tl.sum((tl.load(_halves(starts) + 2 * tl.arange(0, LANES)) <= program).to(tl.int32)) - 1


@triton.jit
def _entry(values, layer, starts, TABLE: tl.constexpr):
    if TABLE.dtype is None:
        for i in tl.static_range(len(values)):
            if i == 0:
                found = values[i]
            found = tl.where(layer >= (starts[i] - 3) >> 1, values[i], found)  # of a single number too, as a tensor
        return found
    else:
        return tl.load(starts + values * LANES + layer)


@triton.jit
def pointer_of(values, layer, starts, TABLE: tl.constexpr):
    """The layer's pointer in a column."""
    found = _entry(values, layer, starts, TABLE)
    if TABLE.dtype is None:
        return found
    else:
        pointer = found.to(tl.pointer_type(TABLE.dtype))
        return tl.multiple_of(pointer, 16) if TABLE.aligned else pointer


@triton.jit
def float32_pointer_of(values, layer, starts, TABLE: tl.constexpr):
    """The same of a column of pointers to float32 in a table, whatever the other columns point to."""
    return _entry(values, layer, starts, TABLE).to(tl.pointer_type(tl.float32))


@triton.jit
def pointer_to(values, layer, starts, DTYPE: tl.constexpr, TABLE: tl.constexpr):
    """The layer's pointer in a column of pointers to elements of another type than the first column's."""
    found = _entry(values, layer, starts, TABLE)
    return found if TABLE.dtype is None else found.to(tl.pointer_type(DTYPE))


@triton.jit
def start_of(layer, starts, TABLE: tl.constexpr):
    if TABLE.dtype is None:
        return number_of(starts, layer, starts, TABLE)
    else:
        return small_number_of(0, layer, starts)


@triton.jit
def number_of(values, layer, starts, TABLE: tl.constexpr):
    found = _entry(values, layer, starts, TABLE)
    return (found - 3) >> 1 if TABLE.dtype is None else found


@triton.jit
def small_number_of(values, layer, table):
    """A number below 2^31 of a table: its lower half is all that is read."""
    return tl.load(_halves(table) + 2 * (values * LANES + layer))


@triton.jit
def factor_of(values, layer, starts, TABLE: tl.constexpr):
    found = _entry(values, layer, starts, TABLE)
    return found if TABLE.dtype is None else found.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _write_table_kernel(
    table_ptr,  # (columns, MOST) int64: the numbers, then the pointers, then the factors
    numbers,  # WIDTH of each column, one column after the other
    pointers,  # the same
    factors,  # the same
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


Numbers = TypeVar("Numbers", bound=tuple)
Pointers = TypeVar("Pointers", bound=tuple)


def columns_of(
    numbers: Numbers, pointers: Pointers, factors: Sequence[float] | None = None, unit: int = 1
) -> tuple[Numbers, Pointers, Any, Table]:
    """Columns as a kernel takes them, for up to MOST layers, written to a table if they are more than DIRECT.

    `numbers` and `pointers` are named tuples of columns, each a sequence with an entry a layer, and come back as such;
    the first of the numbers are the layers' first programs. A column that is None stays None. Then the column of
    factors, and how the kernel reads them all.
    """
    starts, *_ = numbers
    count = len(starts)
    kinds: Any = type(numbers), type(pointers)
    number_struct, pointer_struct = kinds
    if count <= DIRECT:
        odd = [None if column is None else tuple(2 * n + 3 for n in column) for column in numbers]
        tuples = [None if column is None else tuple(column) for column in pointers]
        direct = None if factors is None else tuple(factors)
        return number_struct(*odd), pointer_struct(*tuples), direct, Table(None, False, unit)
    model = next(tensor for column in pointers if column is not None for tensor in column)
    width = next(width for width in BUCKETS if count <= width)
    addresses = [None if column is None else [t.data_ptr() for t in column] for column in pointers]
    given, there = ([column for column in columns if column is not None] for columns in (numbers, addresses))
    table = model.new_empty((len(given) + len(there) + (factors is not None), MOST), dtype=torch.int64)
    rest = width - count
    _write_table_kernel[(1,)](
        table,
        tuple(2 * n + 3 for column in given for n in (*column, *[FAR.value] * rest)),
        tuple(odd_address(p) for column in there for p in (*column, *[0] * rest)),
        () if factors is None else (*factors, *[0.0] * rest),
        width, num_warps=1,
    )  # fmt: skip
    rows = iter(range(table.shape[0]))
    numbered = [None if column is None else next(rows) for column in numbers]
    pointed = [None if column is None else next(rows) for column in addresses]
    aligned = all(p % 16 == 0 for column in there for p in column)
    _, *others = numbered  # in the place of the starts, which are the first row, stands the table
    last = None if factors is None else next(rows)
    how = Table(ELEMENTS[model.dtype], aligned, unit)
    return number_struct(table, *others), pointer_struct(*pointed), last, how
