"""Triton kernels of the distance from a whole bank: [N, P] generated rows against [M, P], soft-min or mean.

Forward: distances of 64 bank rows at a time from a tile of generated rows become the least of them and a sum of powers
(mean: their sum), 2 N M / 64 numbers that a second kernel puts together. l1 by a kernel of its own; l2 and cosine from
a matrix product, and by direct differences where rows are so near that a product would lose digits.
Backward: the same distances become weights [N, m] of so many bank rows as fit 8 MiB; then each program sums weighted
signs or differences of some columns, and a last kernel makes the gradient of the sums.

Bytes: the bank is read once for each 64 generated rows, in the backward twice.
FLOP: l1 2 N M P additions forward, 5 N M P more backward; l2 and cosine 2 N M P in the products, in tf32 three times
that, and twice that backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.launch import AotCase, on_device, registers
from ..bank_distance import Grads, Inputs, Needs, Saved
from .bank_distance_gradients import bank_distance_bwd_kernel, bank_distance_sums_kernel
from .bank_tile import (
    COLUMNS,
    OPTIONS,
    TILE,
    BankTiles,
    bank_tiles,
    difference_sums,
    precision,
    products,
    rows_of_tile,
    scores_options,
)

CHUNK = 64  # elements of an inner sum: fewer round less, and all distances count here, not the nearest alone
WEIGHTS = 8 * 2**20  # bytes of weights that exist at a time
SPLITS = 8  # parts of the bank rows that programs of the same columns share, at most
PROGRAMS = 264  # two for each multiprocessor of a 132-SM device
GRADIENTS = 1024  # elements of the gradient in a program
NEAR = tl.constexpr(1 / 32)  # of the squares' sum: a smaller distance lost five bits or more to the product
LEAST_SQUARE = tl.constexpr(1e-30)  # rows of a smaller one count as zeros for cosine


@triton.jit
def _factors(squares):
    """1 / |x|, of zeros 0."""
    return tl.where(squares < LEAST_SQUARE, 0.0, tl.rsqrt(squares))


@triton.jit
def _distances(generated_ptr, rows, bank, bank_rows, size, METRIC: tl.constexpr, CHUNK: tl.constexpr,
               COLUMNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(the distances, whether two rows are near, factors of the rows, of the bank's): l1 has none near."""
    if METRIC == "l1":
        d = difference_sums(generated_ptr, rows, 1.0, bank, bank_rows, 1.0, size, False, CHUNK) / size
        return d, d < 0, tl.full(rows.shape, 1.0, tl.float32), tl.full(bank_rows.shape, 1.0, tl.float32)
    dot, squares, bank_squares = products(
        generated_ptr, rows, bank, bank_rows, size, CHUNK, COLUMNS, PRECISION, METRIC == "l2"
    )  # fmt: skip
    if METRIC == "l2":
        both = squares[:, None] + bank_squares[None, :]
        d = both - 2.0 * dot
        near = d < both * NEAR
        factor, bank_factor = tl.full(rows.shape, 1.0, tl.float32), tl.full(bank_rows.shape, 1.0, tl.float32)
        mean = 1.0 / size
    else:
        factor, bank_factor = _factors(squares), _factors(bank_squares)
        d = 2.0 - 2.0 * (dot * (factor[:, None] * bank_factor[None, :]))
        near = d * 0.5 < NEAR
        mean = 0.5
    if tl.max(near.to(tl.int32)) != 0:
        exact = difference_sums(generated_ptr, rows, factor, bank, bank_rows, bank_factor, size, True, CHUNK)
        d = tl.where(near, exact, d)
    return d * mean, near, factor, bank_factor


@triton.jit
def _origin(least):
    """What exponents are relative to: of infinitely far rows nothing."""
    return tl.where(least == float("inf"), 0.0, least)


@triton.jit
def _bank_distance_fwd_kernel(
    generated_ptr,  # (count, size) float32
    bank: BankTiles,
    least_ptr,  # (count, tiles) float32, or None: the mean
    sum_ptr,  # (count, tiles) float32: of powers relative to the least, or of distances
    count,
    size,
    tiles,
    temperature,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(count, ROWS)
    tile = tl.program_id(0) // row_tiles  # neighbours share a tile of the bank
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(row, count - 1)
    bank_row = tile * TILE + tl.arange(0, TILE)
    bank_rows = tl.minimum(bank_row, bank.rows - 1)
    there = (bank_row < bank.rows)[None, :]
    d, _, _, _ = _distances(generated_ptr, rows, bank, bank_rows, size, METRIC, CHUNK, COLUMNS, PRECISION)
    at = row.to(tl.int64) * tiles + tile
    if least_ptr is None:
        found = tl.sum(tl.where(there, d, 0.0), 1)
    else:
        least = tl.min(tl.where(there, d, float("inf")), 1)
        power = tl.exp((_origin(least)[:, None] - d) / temperature)
        found = tl.sum(tl.where(there, power, 0.0), 1)
        tl.store(least_ptr + at, least, mask=row < count)
    tl.store(sum_ptr + at, found, mask=row < count)


@triton.jit
def _bank_distance_merge_kernel(
    leasts_ptr,  # (count, tiles) float32, or None: the mean
    sums_ptr,  # (count, tiles) float32
    distance_ptr,  # (count,) float32: of the pieces up to this one
    least_ptr,  # (count,) float32, or None
    sum_ptr,  # (count,) float32
    tiles,
    temperature,
    bank_rows,  # of all pieces
    IS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    if leasts_ptr is None:
        for first in range(0, tiles, BLOCK):
            at = first + tl.arange(0, BLOCK)
            sums += tl.load(sums_ptr + row * tiles + at, mask=at < tiles, other=0.0)
        total = tl.sum(sums, 0)
        if not IS_FIRST:
            total += tl.load(sum_ptr + row)
        tl.store(distance_ptr + row, total / bank_rows)
    else:
        leasts = tl.full((BLOCK,), float("inf"), tl.float32)
        for first in range(0, tiles, BLOCK):
            at = first + tl.arange(0, BLOCK)
            of_tile = tl.load(leasts_ptr + row * tiles + at, mask=at < tiles, other=float("inf"))
            leasts = tl.where(of_tile < leasts, of_tile, leasts)  # NaN: its sum is NaN too
        least = tl.min(leasts, 0)
        if not IS_FIRST:
            before = tl.load(least_ptr + row)
            least = tl.where(before < least, before, least)
        for first in range(0, tiles, BLOCK):
            at = first + tl.arange(0, BLOCK)
            of_tile = tl.load(leasts_ptr + row * tiles + at, mask=at < tiles, other=float("inf"))
            powers = tl.load(sums_ptr + row * tiles + at, mask=at < tiles, other=0.0)
            sums += tl.where(powers == 0, 0.0, powers * tl.exp((_origin(least) - of_tile) / temperature))
        total = tl.sum(sums, 0)
        if not IS_FIRST:
            powers = tl.load(sum_ptr + row)
            total += tl.where(powers == 0, 0.0, powers * tl.exp((_origin(least) - before) / temperature))
        tl.store(least_ptr + row, least)
        tl.store(distance_ptr + row, least - temperature * tl.log(total / bank_rows))
    tl.store(sum_ptr + row, total)


@triton.jit
def _bank_distance_weights_kernel(
    generated_ptr,  # (count, size) float32
    bank: BankTiles,
    least_ptr,  # (count,) float32
    powers_ptr,  # (count,) float32
    weights_ptr,  # (count, bank.rows) float32: shares of the powers, negative where the two rows are near
    factor_ptr,  # (count,) float32: 1 / |row| for cosine
    bank_factor_ptr,  # (bank.rows,) float32
    count,
    size,
    temperature,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(count, ROWS)
    tile = tl.program_id(0) // row_tiles
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(row, count - 1)
    bank_row = tile * TILE + tl.arange(0, TILE)
    bank_rows = tl.minimum(bank_row, bank.rows - 1)
    d, near, factor, bank_factor = _distances(
        generated_ptr, rows, bank, bank_rows, size, METRIC, CHUNK, COLUMNS, PRECISION
    )  # fmt: skip
    origin, powers = _origin(tl.load(least_ptr + rows)), tl.load(powers_ptr + rows)
    weight = tl.exp((origin[:, None] - d) / temperature) / powers[:, None]
    inside = (row < count)[:, None] & (bank_row < bank.rows)[None, :]
    at = row.to(tl.int64)[:, None] * bank.rows + bank_row[None, :]
    tl.store(weights_ptr + at, tl.where(near, -weight, weight), mask=inside)
    if METRIC == "cosine":
        tl.store(factor_ptr + row, factor, mask=row < count)  # by each program of the rows, the same
        tl.store(bank_factor_ptr + bank_row, bank_factor, mask=bank_row < bank.rows)


def _pieces(x: Inputs, most: int, row_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows of the bank): as many tiles as have `most` bytes or a quarter of the workspace, and one."""
    tiles = min(most, int(x.workspace_mib * 2**20 / 4)) // max(row_bytes, 1)
    size = max(tiles, 1) * TILE
    for first in range(0, x.bank.shape[0], size):
        yield first, x.bank[first : first + size]


def bank_distance_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    generated = x.generated.contiguous()
    count, size = generated.shape
    is_mean = x.mode == "mean"
    distance, total = generated.new_empty(count), generated.new_empty(count)
    least = generated.new_empty(0 if is_mean else count)
    saved = Saved(least, generated.new_empty(0) if is_mean else total, generated.new_empty(0, 0))  # it makes them again
    if count == 0:
        return distance, saved
    rows = rows_of_tile(count)
    for first, piece in _pieces(x, 2**62, 8 * count):
        bank, tiles = bank_tiles(piece, x.scale, x.shift), triton.cdiv(piece.shape[0], TILE)
        leasts, sums = None if is_mean else generated.new_empty(count, tiles), generated.new_empty(count, tiles)
        with on_device(generated):
            _bank_distance_fwd_kernel[(triton.cdiv(count, rows) * tiles,)](
                generated, bank, leasts, sums, count, size, tiles, x.temperature, x.metric, rows, TILE, CHUNK,
                _columns(rows), precision(), **scores_options(x.metric, rows),
            )  # fmt: skip
            _bank_distance_merge_kernel[(count,)](
                leasts, sums, distance, None if is_mean else least, total, tiles, x.temperature,
                float(x.bank.shape[0]), first == 0, 128, num_warps=1,
            )  # fmt: skip
    return distance, saved


def _columns(rows: int) -> int:
    """Elements that are multiplied at a time."""
    return COLUMNS // 2 if rows == 64 else COLUMNS


def bank_distance_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    if not needs.generated:
        return Grads(x.generated.new_empty(0))
    generated, grad = x.generated.contiguous(), grad.contiguous()
    count, size = generated.shape
    out = torch.empty_like(generated)
    if count == 0:
        return Grads(out)
    rows, columns = rows_of_tile(count), 32 if x.metric == "l1" else 64
    row_tiles, column_tiles = triton.cdiv(count, rows), triton.cdiv(size, columns)
    splits = min(max(PROGRAMS // (row_tiles * column_tiles), 1), SPLITS, triton.cdiv(x.bank.shape[0], TILE))
    sums, factor = generated.new_empty(splits, count, size), generated.new_empty(count)
    is_mean = x.mode == "mean"
    for first, piece in _pieces(x, 2**62 if is_mean else WEIGHTS, TILE * 4 * count):
        bank, found = bank_tiles(piece, x.scale, x.shift), piece.shape[0]
        weights = None if is_mean else generated.new_empty(count, found)
        bank_factor = generated.new_empty(found)
        tiles = triton.cdiv(found, TILE)
        with on_device(generated):
            if weights is not None:
                _bank_distance_weights_kernel[(row_tiles * tiles,)](
                    generated, bank, saved.least, saved.powers, weights, factor, bank_factor, count, size,
                    x.temperature, x.metric, rows, TILE, CHUNK, _columns(rows), precision(),
                    **scores_options(x.metric, rows),
                )  # fmt: skip
            bank_distance_sums_kernel[(column_tiles, row_tiles, splits)](
                generated, bank, weights, factor, bank_factor, sums, count, size, triton.cdiv(tiles, splits) * TILE,
                first == 0, x.metric, rows, _columns(rows), columns, precision(), **scores_options(x.metric, rows),
            )  # fmt: skip
    mean = {"l1": 1.0, "l2": 2.0, "cosine": 1.0}[x.metric] / (1 if x.metric == "cosine" else size)
    blocks = 1 if x.metric == "cosine" else triton.cdiv(size, GRADIENTS)
    with on_device(generated):
        bank_distance_bwd_kernel[(count, blocks)](
            grad, generated, factor, sums, out, count, size, splits, mean / (x.bank.shape[0] if is_mean else 1),
            x.metric, GRADIENTS, **OPTIONS, **registers(128),
        )  # fmt: skip
    return Grads(out)


def aot_cases() -> Iterator[AotCase]:
    """Every metric of the soft-min and the mean of l1, dtype of the bank and number of rows in a tile."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
    ways = (("softmin", "l1"), ("softmin", "l2"), ("softmin", "cosine"), ("mean", "l1"))
    for (mode, metric), dtype, count in itertools.product(ways, dtypes, (3, 32, 64)):
        bank = torch.empty(4096, 3072, dtype=dtype, device="meta")
        x = Inputs(torch.empty(count, 3072, device="meta"), bank, mode, metric, 0.01, 1 / 255, 0.0, 256.0, False)
        label = f"{mode} {metric} {str(dtype).removeprefix('torch.')} {count} rows"
        of_products = metric != "l1"
        yield AotCase(
            f"forward {label}", bank_distance_fwd, (x,), matrix=("_bank_distance_fwd_kernel",) if of_products else ()
        )
        row = torch.empty(count, device="meta")
        matrix = ("_bank_distance_weights_kernel", "bank_distance_sums_kernel") if of_products else ()
        args = (row, x, Saved(row, row, row[:0, None]), Needs(True))
        yield AotCase(f"backward {label}", bank_distance_bwd, args, matrix=matrix)
