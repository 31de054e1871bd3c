"""What the contrastive launchers share: launches of the statistics, blocks of gradients, products."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from ...core.kernels.launch import STREAM_OPTIONS
from ...core.kernels.matmul import add_product
from .blocking import walk_plan
from .embedding_gradients import EmbeddingGradient
from .logit_gradients import AGAIN, FLAGGED, KEPT, _softmax_stats_bwd_kernel
from .logit_matrix import HALF_TILE, LogitMatrix
from .online_softmax import _softmax_stats_fwd_kernel, _softmax_stats_merge_kernel
from .tile_configs import Tile

MERGE_BLOCK = 32  # rows per program of the merging kernel
GROUP = 8
KEPT_ROWS = 32  # rows of a tile of kept exponentials that is read; its columns are those it was written with
DEFINED = 2**16  # elements: see new_stash


def make_statistics(call: LogitMatrix, stats: Tensor, keep: tuple, room: tuple[Tensor, int] | None = None) -> None:
    """Fill `stats` (directions, states, M), and what is kept of the exponentials.

    `room`: (memory, row pitch) for all products of the call, if a library makes them and the caller needs them after.
    Without it the library's products go block by block to memory of their own.
    """
    (count, columns, _), tile = call.sizes, call.tile
    high, wide = call.products_plan() if call.by_library and room is None else (count, columns)
    plan = walk_plan(triton.cdiv(high, tile.rows), triton.cdiv(wide, tile.columns), call.programs)
    groups, splits = plan
    slots = stats.new_empty((splits + groups * call.symmetric, call.states, count))
    if room is None and call.by_library:
        room = stats.new_empty(high * wide), wide
    for row in range(0, count, high):
        first = row // tile.columns * tile.columns if call.upper else 0
        for column in range(first, columns, wide):
            end, stop = min(row + high, count), min(column + wide, columns)
            if room is None:
                operands, part = call.operands(), plan
            else:
                operands = call.make_products(room[0], (row, column, end, stop), room[1])
                part = (*plan, row, end, column, stop, first)  # type: ignore[assignment]
            _softmax_stats_fwd_kernel[(groups * splits,)](
                *operands, call.rows, call.columns, slots, keep, call.sizes, part, call.beta, call.form, tile.constants,
                **tile.options,
            )  # fmt: skip
    upper, most = ((tile.rows, tile.columns), groups + splits) if call.upper else (None, max(plan))
    _softmax_stats_merge_kernel[(triton.cdiv(count, MERGE_BLOCK), call.directions)](
        slots, stats, count, plan, call.beta, call.moments, upper, triton.next_power_of_2(most), MERGE_BLOCK,
        **STREAM_OPTIONS,
    )  # fmt: skip


def new_stash(like: Tensor, elements: int) -> Tensor:
    """Memory for exponentials. Some of it is never written nor read; small ones are zeros all the same, since torch's
    opcheck compares whole results."""
    return like.new_zeros(elements) if elements <= DEFINED else like.new_empty(elements)


def kept(stash: Tensor, rows: int, pitch: int) -> tuple[Tensor, Tensor, int] | tuple[None, None, None]:
    """The exponentials, their references and the pitch of `stash`, as the kernels take them."""
    if not stash.numel():
        return None, None, None
    return stash[: rows * pitch], stash[rows * pitch :].view(torch.float32), pitch


def chunk_memory(
    call: LogitMatrix, stash: Tensor, rows: int, pitch: int
) -> tuple[tuple, Tensor, tuple[Tensor, int] | None]:
    """Of a chunk of rows in `stash`: what is kept of its exponentials, where G comes, where products are, if any."""
    if call.by_library:
        return (None, None, None), stash[: rows * pitch], (stash, pitch)
    keep = kept(stash, rows, pitch)
    return keep, keep[0], None  # type: ignore[return-value]


def half_range(grad: Tensor, call: LogitMatrix) -> Tensor:
    """A power of two (1,) that takes the largest |G| r c near 2^14: float16's range would lose the small ones."""
    weight = [1.0, 0.0] + [1.0, 0.0] * call.moments + ([1.0 + call.beta, call.beta] if call.beta else [])
    pulls = torch.stack([w * grad[:, i].abs() for i, w in enumerate(weight) if w]).sum(0)
    largest = call.rows[0].abs().amax()
    across = 1.0 if call.columns[0] is None else call.columns[0].abs().amax()
    bound = (pulls[0] * call.rows[0].abs()).amax() * across
    if call.symmetric:
        bound = bound + pulls[-1].amax() * largest * across
    power = torch.floor(14.0 - torch.log2(bound))
    return torch.exp2(torch.where(power.isfinite(), power, 0.0).clamp(-60.0, 60.0)).reshape(1)


def half(tile: Tile) -> Tile:
    """With half the rows: for a kernel with branches that hold more registers."""
    return tile if tile.rows <= HALF_TILE else replace(tile, rows=tile.rows // 2)


def make_block(
    call: LogitMatrix,
    work: Tensor | None,
    sums: Tensor | None,
    given: tuple,
    area: tuple[int, int, int, int],
    pitch: int,
    made: bool = False,
) -> Tensor:
    """G r c of rows area[0] .. area[2] and columns area[1] .. area[3] in `work`, and its columns' sums by row blocks.

    `given` is what the kernel takes of the forward and from upstream. `made`: the library's products are in `work`.
    """
    (row, column, end, stop), tile = area, call.tile
    again = tile if given[3] is None else replace(tile, warps=8) if sums is not None else half(tile)
    operands = call.operands(again.rows)
    if made:
        operands = work, (pitch, row, column, end)
    elif call.by_library:  # G, float32 too, takes the place of the products
        room = given[0].new_empty((end - row) * pitch) if work is None else work
        operands = call.make_products(room, area, pitch)
    launches = [(AGAIN, again)]
    if given[3] is not None:  # kernels of their own: with room for products few programs would run at a time
        rows = min(KEPT_ROWS, tile.rows) if sums is None else tile.rows
        launches = [(KEPT, replace(tile, rows=rows, warps=4)), (FLAGGED, again)][: 1 + call.symmetric]
    for part, tile in launches:
        tiles = triton.cdiv(end - row, tile.rows), triton.cdiv(stop - column, tile.columns)
        _softmax_stats_bwd_kernel[(tiles[0] * tiles[1],)](
            *operands, call.rows, call.columns, (work, sums), given, call.sizes, (row, column, end, *tiles, pitch),
            call.beta, call.form, tile.constants, part.value, GROUP, **tile.options,
        )  # fmt: skip
    return call.query.new_empty(0) if work is None else work.view(-1, pitch)[: end - row, : stop - column]


def make_gradients(
    call: LogitMatrix,
    given: tuple,
    blocks: tuple[int, int],
    q: EmbeddingGradient,
    k: EmbeddingGradient,
    bias_grad: Tensor,
) -> None:
    """Fill the gradients block by block."""
    (m, n, _), (high, wide), tile = call.sizes, blocks, call.tile
    starts = [(row, row // tile.columns * tile.columns if call.upper else 0) for row in range(0, m, high)]
    work = call.query.new_empty((high, wide)) if q.needed or k.needed else None
    sums = bias_grad.new_empty((triton.cdiv(high, tile.rows), wide)) if bias_grad.numel() else None
    if work is None and sums is None:
        return
    for row, start, column in ((r, first, c) for r, first in starts for c in range(first, n, wide)):
        end, stop = min(row + high, m), min(column + wide, n)
        block = make_block(call, work, sums, given, (row, column, end, stop), wide)
        if sums is not None:
            bias_grad[column:stop] += sums[: triton.cdiv(end - row, tile.rows), : stop - column].sum(0)
        if q.needed:
            add_product(q.part(row, end), block, call.key[column:stop, : q.sums.shape[1]], column == start)
            if stop == n:
                q.finish(row, end)
        if k.needed:
            add_product(k.part(column, stop), block.T, call.query[row:end, : k.sums.shape[1]], row == 0)
    if k.needed:
        k.finish(0, n)
