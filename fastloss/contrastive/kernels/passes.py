"""What the launchers share: statistics of all logits, blocks of their gradient, and products with those blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...core.kernels.launch import STREAM_OPTIONS
from ...core.kernels.matmul import add_product
from ...core.kernels.tile_table import line_of
from .arguments import (
    NOTHING_SAVED,
    Area,
    BackwardInputs,
    BackwardResults,
    Block,
    Operands,
    ProductsBlock,
    SavedExps,
)
from .blocking import walk_plan
from .embedding_gradients import EmbeddingGradient
from .logit_gradients import CHECKED, FLAGGED, FROM_EXPS, RECOMPUTE, _softmax_stats_bwd_kernel
from .logit_matrix import HALF_TILE, LogitMatrix, Workspace
from .online_softmax import Slots, _softmax_stats_fwd_kernel, _softmax_stats_merge_kernel
from .tile_configs import TABLE, Tile, with_all_registers

SLOT_ROWS = 16  # the slots have a multiple of so many rows, so that they are read in whole vectors
MERGE_BLOCK = 32  # rows per program of the merging kernel
LEAST_SLOTS = 32  # that it is compiled for: fewer would save it nothing, and be compiled anew for smaller batches
# Warps of the kernel that recomputes flagged tiles, which holds most: a lane of AMD has 512 registers with four; on
# sm_100 a lane has a whole row of the products' columns with four, and a part of them with more.
FLAGGED_WARPS = {"gfx942": 4, "sm_100": 16}
MOST_FLAGGED_WARPS = 8  # with listed pairs, whose words a lane holds beside a row of its own
SAVED_ROWS = 32  # rows of a tile of saved exponentials that is read; its columns are those it was written with
ZEROED_ELEMENTS = 2**16  # see new_exps


def make_statistics(call: LogitMatrix, stats: Tensor, saved: SavedExps, workspace: Workspace | None = None) -> None:
    """Fill `stats` (directions, states, M), and what is saved of the exponentials.

    `workspace` holds all products of the call, if a library makes them and the caller needs them after. Without it the
    library's products go block by block to memory of their own.
    """
    rows, columns, tile = call.sizes.rows, call.sizes.columns, call.tile
    block_rows, block_columns = rows, columns
    if call.by_library and workspace is None:
        block_rows, block_columns = call.products_plan()
    walk = walk_plan(triton.cdiv(block_rows, tile.rows), triton.cdiv(block_columns, tile.columns), call.programs)
    pitch = triton.cdiv(rows, SLOT_ROWS) * SLOT_ROWS
    slots = Slots(stats.new_empty((walk.splits + walk.groups * call.both_sides, call.states, pitch)), pitch)
    if workspace is None and call.by_library:
        workspace = Workspace(stats.new_empty(block_rows * block_columns), block_columns)
    sizes, walked, exps = call.sizes.odd(), walk.odd(), call.descriptor_of(saved)
    for row in range(0, rows, block_rows):
        first_column = row // tile.columns * tile.columns if call.self_similarity else 0
        for column in range(first_column, columns, block_columns):
            if workspace is None:
                operands, area = call.operands(), None
            else:
                end_row, end_column = min(row + block_rows, rows), min(column + block_columns, columns)
                area = Area(row, end_row, column, end_column, first_column)
                operands = call.make_products(workspace, area)
            _softmax_stats_fwd_kernel[(walk.groups * walk.splits,)](
                *operands, exps, call.rows, call.columns, slots, saved, sizes, walked,
                None if area is None else area.odd(), call.beta, call.form, tile.constants, **tile.options,
            )  # fmt: skip
    self_tile, slots_merged = (tile.constants, sum(walk)) if call.self_similarity else (None, max(walk))
    _softmax_stats_merge_kernel[(triton.cdiv(rows, MERGE_BLOCK), call.directions)](
        slots, stats, rows, walk.odd(), call.beta, call.form.moments, self_tile,
        max(LEAST_SLOTS, triton.next_power_of_2(slots_merged)), MERGE_BLOCK, **STREAM_OPTIONS,
    )  # fmt: skip


def new_exps(like: Tensor, elements: int) -> Tensor:
    """Memory for exponentials. Some of it is never written nor read; small ones are zeros all the same, since torch's
    opcheck compares whole results."""
    return like.new_zeros(elements) if elements <= ZEROED_ELEMENTS else like.new_empty(elements)


def saved_exps(memory: Tensor, rows: int, pitch: int) -> SavedExps:
    """The exponentials that lie in `memory`, and behind them their exponents; none if it is empty."""
    if not memory.numel():
        return NOTHING_SAVED
    return SavedExps(memory[: rows * pitch], memory[rows * pitch :].view(torch.float32), pitch)


class ChunkMemory(NamedTuple):
    """What the memory of a chunk of rows holds."""

    saved: SavedExps  # exponentials, unless a library makes the products
    grad_block: Tensor  # [rows * pitch]: G, in the place of exponentials or products
    products: Workspace | None  # a library's products


def chunk_memory(call: LogitMatrix, memory: Tensor, rows: int, pitch: int) -> ChunkMemory:
    if call.by_library:
        return ChunkMemory(NOTHING_SAVED, memory[: rows * pitch], Workspace(memory, pitch))
    saved = saved_exps(memory, rows, pitch)
    return ChunkMemory(saved, memory[: rows * pitch], None)


def fp16_scale_of(stats_grad: Tensor, call: LogitMatrix) -> Tensor:
    """A power of two (1,) that takes the largest |G| r c near 2^14: float16's range would lose the small ones."""
    weight = [1.0, 0.0] + [1.0, 0.0] * call.form.moments + ([1.0 + call.beta, call.beta] if call.beta else [])
    sums = torch.stack([w * stats_grad[:, i].abs() for i, w in enumerate(weight) if w]).sum(0)
    row_scale, column_scale = call.rows.row_scale, call.columns.column_scale
    max_column_scale = 1.0 if column_scale is None else column_scale.abs().amax()
    bound = (sums[0] * row_scale.abs()).amax() * max_column_scale
    if call.both_sides:
        bound = bound + sums[-1].amax() * row_scale.abs().amax() * max_column_scale
    power = torch.floor(14.0 - torch.log2(bound))
    return torch.exp2(torch.where(power.isfinite(), power, 0.0).clamp(-60.0, 60.0)).reshape(1)


def half_rows(tile: Tile) -> Tile:
    """With half the rows: for a kernel with branches that hold more registers."""
    return tile if tile.rows <= HALF_TILE else replace(tile, rows=tile.rows // 2)


def make_block(
    call: LogitMatrix,
    results: BackwardResults,
    inputs: BackwardInputs,
    area: Area,
    pitch: int,
    has_products: bool = False,
) -> Tensor:
    """G r c of an area in `results.grad_block`, and its columns' sums by row tiles; returns the former.

    `has_products`: the library's products lie in `results.grad_block` already.
    """
    (row, end_row, column, end_column, _), tile = area, call.tile
    grad_block, recompute = results.grad_block, call.tile
    if inputs.exps is not None:
        recompute = half_rows(tile) if results.column_sums is None else replace(tile, warps=8)
        warps = FLAGGED_WARPS.get(line_of(call.query.device, TABLE), recompute.warps)
        if call.rows.pair_spans is not None:
            warps = min(warps, MOST_FLAGGED_WARPS)
        recompute = replace(recompute, warps=warps)
        if tile.registers is not None:
            recompute = with_all_registers(recompute)
    operands = call.operands(recompute.rows)
    if has_products:
        operands = Operands(grad_block, ProductsBlock(pitch, row, column, end_row).odd())
    elif call.by_library:  # G, float32 too, takes the place of the products
        memory = inputs.stats.new_empty((end_row - row) * pitch) if grad_block is None else grad_block
        operands = call.make_products(Workspace(memory, pitch), area)
    launches = [(RECOMPUTE, recompute)]
    if (
        inputs.exps is not None
    ):  # launches of their own: the registers of both ways in one kernel would leave few programs at a time
        rows = min(SAVED_ROWS, tile.rows) if results.column_sums is None else tile.rows
        launches = [(FROM_EXPS, replace(tile, rows=rows, warps=4)), (FLAGGED, recompute)][: 1 + call.both_sides]
    for tiles, tile in launches:
        block = Block(
            row, column, end_row, triton.cdiv(end_row - row, tile.rows), triton.cdiv(end_column - column, tile.columns),
            pitch,
        )  # fmt: skip
        tiles_each = CHECKED.value if tiles is FLAGGED else 1
        _softmax_stats_bwd_kernel[(block.row_tiles * triton.cdiv(block.column_tiles, tiles_each),)](
            *operands, call.rows, call.columns, results, inputs, call.sizes.odd(), block.odd(), call.beta, call.form,
            tile.constants, tiles.value, **tile.options,
        )  # fmt: skip
    if grad_block is None:
        return call.query.new_empty(0)
    return grad_block.view(-1, pitch)[: end_row - row, : end_column - column]


def make_gradients(
    call: LogitMatrix,
    inputs: BackwardInputs,
    block_size: tuple[int, int],
    q: EmbeddingGradient,
    k: EmbeddingGradient,
    bias_grad: Tensor,
) -> None:
    """Fill the gradients block by block."""
    (block_rows, block_columns), tile = block_size, call.tile
    m, n = call.sizes.rows, call.sizes.columns
    starts = [
        (row, row // tile.columns * tile.columns if call.self_similarity else 0) for row in range(0, m, block_rows)
    ]
    grad_block = call.query.new_empty((block_rows, block_columns)) if q.needed or k.needed else None
    column_sums = None
    if bias_grad.numel():
        column_sums = bias_grad.new_empty((triton.cdiv(block_rows, tile.rows), block_columns))
    if grad_block is None and column_sums is None:
        return
    results = BackwardResults(grad_block, column_sums)
    for row, start, column in ((r, first, c) for r, first in starts for c in range(first, n, block_columns)):
        end_row, end_column = min(row + block_rows, m), min(column + block_columns, n)
        block = make_block(call, results, inputs, Area(row, end_row, column, end_column), block_columns)
        if column_sums is not None:
            tiles = triton.cdiv(end_row - row, tile.rows)
            bias_grad[column:end_column] += column_sums[:tiles, : end_column - column].sum(0)
        if q.needed:
            keys = call.key[column:end_column, : q.sums.shape[1]]
            add_product(q.part(row, end_row), block, keys, column == start)
            if end_column == n:
                q.from_sums(row, end_row)
        if k.needed:
            queries = call.query[row:end_row, : k.sums.shape[1]]
            add_product(k.part(column, end_column), block.T, queries, row == 0)
    if k.needed:
        k.from_sums(0, n)
