"""Triton kernels of the search for the nearest bank row: [N, P] generated rows against [M, P] of the bank.

1. scores: distances of 64 bank rows at a time from a tile of generated rows, made fast (l1: by a kernel of its own; l2,
   cosine: from a matrix product), with a bound of their error. Of each 64 only the least that they may be and the least
   that they surely are stay: 2 N M / 64 numbers.
2. rescan: of each generated row those 64 that may hold the nearest, by direct differences.
3. winner: the first of the nearest, beside that of the pieces of the bank before.

Bytes: N P s + M P s' of a bank of s' bytes an element, once for each 64 generated rows; backward 12 N P or less.
FLOP: l1 2 N M P additions; l2 and cosine 2 N M P in the products, in tf32 three times that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.kernels.device_math import sign
from ...core.kernels.launch import AotCase, on_device, registers
from ..nearest import Grads, Inputs, Nearest, Needs, Row
from .bank_tile import (
    CHUNK,
    COLUMNS,
    OPTIONS,
    TILE,
    BankTiles,
    bank_tiles,
    difference_sums,
    exact_distances,
    inverse_norms,
    load_bank,
    precision,
    products,
    rows_of_tile,
    scores_options,
)

SEARCHERS = 64  # programs that rescan for one generated row, at most
GRADIENTS = 1024  # elements of the gradient in a program
SMALLEST_SQUARE, LARGEST_SQUARE = tl.constexpr(1e-12), tl.constexpr(1e30)  # products beyond may lose digits


@triton.jit
def _nearest_scores_kernel(
    generated_ptr,  # (count, size) float32
    bank: BankTiles,
    lower_ptr,  # (count, tiles) float32: the least distance that a bank row of the tile may have
    upper_ptr,  # (count, tiles) float32: what its least distance surely does not exceed
    count,
    size,
    tiles,
    error,  # of a score, relative (l1), to the squares (l2) or absolute (cosine), at most
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
    bank_rows = tl.minimum(tile * TILE + tl.arange(0, TILE), bank.rows - 1)
    if METRIC == "l1":
        score = difference_sums(generated_ptr, rows, 1.0, bank, bank_rows, 1.0, size, False, CHUNK) / size
        wrong = error * score
    else:
        dot, squares, bank_squares = products(
            generated_ptr, rows, bank, bank_rows, size, CHUNK, COLUMNS, PRECISION, False
        )  # fmt: skip
        if METRIC == "l2":
            both = squares[:, None] + bank_squares[None, :]
            score = (both - 2.0 * dot) / size
            wrong = error * both / size
        else:
            least = tl.minimum(squares[:, None], bank_squares[None, :])
            most = tl.maximum(squares[:, None], bank_squares[None, :])
            score = 1.0 - dot * (tl.rsqrt(squares)[:, None] * tl.rsqrt(bank_squares)[None, :])
            known = (least > SMALLEST_SQUARE) & (most < LARGEST_SQUARE)
            score = tl.where(known, score, float("nan"))
            wrong = error
    lower, upper = score - wrong, score + wrong
    lower = tl.where(lower == lower, lower, float("-inf"))  # NaN: anything
    upper = tl.where(upper == upper, upper, float("inf"))
    at = row.to(tl.int64) * tiles + tile
    tl.store(lower_ptr + at, tl.min(lower, 1), mask=row < count)
    tl.store(upper_ptr + at, tl.min(upper, 1), mask=row < count)


@triton.jit
def _nearest_rescan_kernel(
    generated_ptr,  # (count, size) float32
    bank: BankTiles,
    lower_ptr,  # (count, tiles) float32
    upper_ptr,  # (count, tiles) float32
    distance_ptr,  # (count, searchers) float32: the least found, -1 for NaN, infinity where nothing was looked at
    found_ptr,  # (count, searchers) int64: where
    size,
    tiles,
    METRIC: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, searcher = tl.program_id(0).to(tl.int64), tl.program_id(1)
    searchers = tl.num_programs(1)
    limits = tl.full((BLOCK,), float("inf"), tl.float32)
    for first in range(0, tiles, BLOCK):
        at = first + tl.arange(0, BLOCK)
        limits = tl.minimum(limits, tl.load(upper_ptr + row * tiles + at, mask=at < tiles, other=float("inf")))
    limit = tl.min(limits, 0)
    best, found = float("inf"), tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for tile in range(searcher, tiles, searchers):
        if tl.load(lower_ptr + row * tiles + tile) <= tl.minimum(limit, best):
            bank_rows = tl.minimum(tile * TILE + tl.arange(0, TILE), bank.rows - 1)
            d = exact_distances(generated_ptr + row * size, bank, bank_rows, size, METRIC, TILE, COLUMNS)
            d = tl.where(d == d, d, -1.0)
            least = tl.min(d, 0)
            first_row = tl.min(tl.where(d == least, bank_rows, 0x7FFFFFFF), 0).to(tl.int64) + bank.first
            nearer = (least < best) | ((least == best) & (first_row < found))
            best, found = tl.where(nearer, least, best), tl.where(nearer, first_row, found)
    tl.store(distance_ptr + row * searchers + searcher, best)
    tl.store(found_ptr + row * searchers + searcher, found)


@triton.jit
def _nearest_winner_kernel(
    distances_ptr,  # (count, searchers) float32
    founds_ptr,  # (count, searchers) int64
    distance_ptr,  # (count,) float32: of the pieces before, then of this one too
    found_ptr,  # (count,) int64
    searchers,
    IS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    d = tl.load(distances_ptr + row * searchers + at, mask=at < searchers, other=float("inf"))
    rows = tl.load(founds_ptr + row * searchers + at, mask=at < searchers, other=0x7FFFFFFFFFFFFFFF)
    least = tl.min(d, 0)
    found = tl.min(tl.where(d == least, rows, 0x7FFFFFFFFFFFFFFF), 0)
    distance = tl.where(least < 0, float("nan"), least)
    if not IS_FIRST:  # rows of pieces before come first
        before = tl.load(distance_ptr + row)
        later = (before == before) & ((least < 0) | (least < before))
        distance, found = tl.where(later, distance, before), tl.where(later, found, tl.load(found_ptr + row))
    tl.store(distance_ptr + row, distance)
    tl.store(found_ptr + row, found)


@triton.jit
def _nearest_bwd_kernel(
    grad_ptr,  # (count,) float32
    generated_ptr,  # (count, size) float32
    bank: BankTiles,
    row_ptr,  # (count,) int64
    out_ptr,  # (count, size) float32
    size,
    METRIC: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a_ptr, out_ptr = generated_ptr + row * size, out_ptr + row * size
    grad, winner = tl.load(grad_ptr + row), tl.load(row_ptr + row) + tl.arange(0, 1)
    if METRIC == "cosine":
        scale, root, bank_scale, bank_root = inverse_norms(a_ptr, bank, winner, size, 1, COLUMNS)
        distance = tl.sum(exact_distances(a_ptr, bank, winner, size, METRIC, 1, COLUMNS), 0)
        bank_scale, bank_root = tl.sum(bank_scale, 0), tl.sum(bank_root, 0)
        factor = tl.where(root * bank_root == 0, 0.0, -grad)  # zeros
    else:
        factor = grad / size
    for k in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        columns = k + tl.arange(0, BLOCK)
        inside = columns < size
        a = tl.load(a_ptr + columns, mask=inside, other=0.0)
        b = tl.sum(load_bank(bank, winner, columns, inside), 0)
        if METRIC == "l1":
            out = factor * sign(a - b)
        elif METRIC == "l2":
            out = 2.0 * factor * (a - b)
        else:  # -(v - cos u) / |a|, cos = 1 - distance
            u = a * scale * root
            out = factor * (((b * bank_scale * bank_root - u) + distance * u) * scale * root)
        tl.store(out_ptr + columns, out, mask=inside)


def _error(metric: str, size: int) -> float:
    """By how much a score may be wrong: see the kernel."""
    of_sums = 2**-24 * CHUNK + 2**-23 * (size / CHUNK + 16)
    if metric == "l1":
        return of_sums
    return 3 * (of_sums + 2**-18)  # of the product, of three of tf32, and of the squares


def _pieces(x: Inputs) -> Iterator[tuple[int, Tensor]]:
    """Rows of the bank of which the bounds fit a quarter of the workspace."""
    most = int(x.workspace_mib * 2**20 / 4) // (8 * x.generated.shape[0])
    size = max(most, 1) * TILE
    for first in range(0, x.bank.shape[0], size):
        yield first, x.bank[first : first + size]


def nearest_fwd(x: Inputs) -> Nearest:
    generated = x.generated.contiguous()
    count, size = generated.shape
    distance = generated.new_empty(count)
    row = generated.new_empty(count, dtype=torch.int64)
    if count == 0:
        return Nearest(distance, row)
    rows = rows_of_tile(count)
    for first, piece in _pieces(x):
        bank = bank_tiles(piece, x.scale, x.shift, first)
        tiles = triton.cdiv(piece.shape[0], TILE)
        lower, upper = generated.new_empty(count, tiles), generated.new_empty(count, tiles)
        searchers = min(tiles, SEARCHERS)
        distances = generated.new_empty(count, searchers)
        founds = generated.new_empty(count, searchers, dtype=torch.int64)
        with on_device(generated):
            _nearest_scores_kernel[(triton.cdiv(count, rows) * tiles,)](
                generated, bank, lower, upper, count, size, tiles, _error(x.metric, size), x.metric, rows, TILE, CHUNK,
                COLUMNS // 2 if rows == 64 else COLUMNS, precision(), **scores_options(x.metric, rows),
            )  # fmt: skip
            _nearest_rescan_kernel[(count, searchers)](
                generated, bank, lower, upper, distances, founds, size, tiles, x.metric, TILE, COLUMNS, 128, **OPTIONS
            )
            _nearest_winner_kernel[(count,)](
                distances, founds, distance, row, searchers, first == 0, SEARCHERS, num_warps=1
            )
    return Nearest(distance, row)


def nearest_bwd(grad: Tensor, x: Inputs, nearest: Row, needs: Needs) -> Grads:
    if not needs.generated:
        return Grads(x.generated.new_empty(0))
    generated, grad = x.generated.contiguous(), grad.contiguous()
    count, size = generated.shape
    out = torch.empty_like(generated)
    if count == 0:
        return Grads(out)
    blocks = 1 if x.metric == "cosine" else triton.cdiv(size, GRADIENTS)  # whose program needs the norms of all of it
    with on_device(generated):
        _nearest_bwd_kernel[(count, blocks)](
            grad, generated, bank_tiles(x.bank, x.scale, x.shift), nearest.row.contiguous(), out, size, x.metric,
            GRADIENTS, GRADIENTS, **OPTIONS, **registers(128),
        )  # fmt: skip
    return Grads(out)


def aot_cases() -> Iterator[AotCase]:
    """Every metric, dtype of the bank and number of rows in a tile."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
    for metric, dtype, count in itertools.product(("l1", "l2", "cosine"), dtypes, (3, 32, 64)):
        bank = torch.empty(4096, 3072, dtype=dtype, device="meta")
        x = Inputs(torch.empty(count, 3072, device="meta"), bank, metric, 1 / 255, 0.0, 256.0)
        matrix = () if metric == "l1" else ("_nearest_scores_kernel",)
        label = f"{metric} {str(dtype).removeprefix('torch.')} {count} rows"
        yield AotCase(f"forward {label}", nearest_fwd, (x,), matrix=matrix)
        row = torch.empty(count, dtype=torch.int64, device="meta")
        yield AotCase(
            f"backward {label}", nearest_bwd, (torch.empty(count, device="meta"), x, Row(row), Needs(True)), ()
        )
