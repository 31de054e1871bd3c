"""What the contrastive launchers share: operands, launches of the statistics, blocks of gradients, products."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core.kernels.launch import STREAM_BLOCK, STREAM_OPTIONS
from ...kernels.contrastive_grads import (
    AGAIN,
    FLAGGED,
    KEPT,
    _contrastive_bwd_kernel,
    _contrastive_finish_kernel,
    _contrastive_scale_kernel,
)
from ...kernels.contrastive_states import _contrastive_fwd_kernel, _contrastive_merge_kernel
from ...kernels.contrastive_table import DESCRIPTORS, PRODUCTS, Tile, best_tile, products_kind, walk_plan
from ...losses.contrastive_softmax import exponentials

MERGE_BLOCK = 32  # rows per program of the merging kernel
FINISH_BLOCK = (8, 256)
STRIPS, LOWEST = 16, 1024  # blocks of rows of a triangle, a fraction 1 / STRIPS of which lies below it; least rows
GROUP = 8
KEPT_ROWS = 32  # of a tile that is read, whose columns are those of the tiles kept
HALF_TILE = 64  # columns, or rows
DEFINED = 2**16  # elements
CHUNK = 128  # rows of a chunk are a multiple, where the workspace holds as many


def embeddings(x: Tensor) -> Tensor:
    """`x` contiguous, aligned, and its rows padded with zeros to a multiple of 16 elements."""
    if x.shape[1] % 16:
        return F.pad(x, (0, -x.shape[1] % 16))
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


class Call:
    """What both directions give their kernels: operands, vectors, form, tile."""

    def __init__(
        self, query: Tensor, key: Tensor, rows: tuple, columns: tuple, kind: str, hardness: float,
        backward: bool = False, keeps: bool = False, workspace_mib: float = 0.0,
    ) -> None:  # fmt: skip
        self.query, self.key = embeddings(query), embeddings(key)
        self.rows: tuple[Any, ...] = tuple(None if v is None else v.contiguous() for v in rows)
        self.columns: tuple[Any, ...] = tuple(None if v is None else v.contiguous() for v in columns)
        if self.rows[2] is None or self.columns[2] is None:  # ids count only in pairs
            self.rows, self.columns = (*self.rows[:2], None, self.rows[3]), (*self.columns[:2], None)
        self.upper, self.moments = "upper" in kind, "moments" in kind
        self.symmetric, self.directions = self.upper or "symmetric" in kind, 1 + ("symmetric" in kind)
        self.form = (2 if self.upper else int("diagonal" in kind), self.symmetric, self.moments)
        self.beta = hardness if hardness > 0 else None
        self.states = 2 + 2 * self.moments + 2 * (hardness > 0)
        self.sizes = (query.shape[0], key.shape[0], self.query.shape[1])
        self.products = products_kind(query.dtype)
        ids, limited, biased = (v is not None for v in (*self.rows[2:], self.columns[1]))
        options = ids + limited + biased + self.moments
        hard = hardness > 0
        excludes = keeps and not self.symmetric and self.rows[1] is not None
        if hard or options + excludes > (0 if self.symmetric else 2):
            burden = 3 if (hard and self.symmetric) or self.upper else 2
        else:  # what spills a little with four warps
            burden = int(options > 0 or excludes)
        self.tile, self.programs = best_tile(query.device, self.products, *self.sizes, burden)
        self.by_library, self.elements = self.tile.operands == PRODUCTS, int(workspace_mib * 2**18)
        # the triangle's tiles have a mask, float16's backward a factor more, and sm_80 keeps products in registers
        kept_there = keeps and self.tile.operands != DESCRIPTORS
        narrow = self.upper or kept_there or (backward and (query.dtype == torch.float16 or self.sizes[2] <= 32))
        if narrow and self.symmetric and self.tile.columns > HALF_TILE:
            self.tile = replace(self.tile, columns=HALF_TILE, stages=self.tile.stages + 1)

    def operands(self, rows: int = 0) -> tuple:
        """As the kernels take them, with `rows` those of a tile if not as many as of this call's."""
        if self.tile.operands != DESCRIPTORS:
            return self.query, self.key
        blocks = (rows or self.tile.rows, self.tile.columns)
        pairs = zip((self.query, self.key), blocks, strict=True)
        return tuple(TensorDescriptor.from_tensor(x, [block, self.tile.width]) for x, block in pairs)

    def products_plan(self) -> tuple[int, int]:
        """(rows, columns) of the blocks of products that the workspace holds: whole tiles, or all rows."""
        count, columns, _ = self.sizes
        high, wide = block_plan(count, columns, self.elements, self.tile, self.upper)
        return high if high == count else max(high, self.tile.rows), wide

    def make_products(self, work: Tensor, area: tuple[int, int, int, int], pitch: int) -> tuple:
        """<q_i, k_j> of rows area[0] .. area[2] and columns area[1] .. area[3] in `work`; the kernels' operands."""
        row, column, end, stop = area
        block = work.view(-1)[: (end - row) * pitch].view(-1, pitch)[:, : stop - column]
        add_product(block, self.query[row:end], self.key[column:stop].T, True)
        return work, (pitch, row, column, end)


def make_statistics(call: Call, stats: Tensor, keep: tuple, room: tuple[Tensor, int] | None = None) -> None:
    """Fill `stats` (directions, states, M), and what is kept of the exponentials.

    `room`, if a library makes the products: memory and pitch for all of them, in which they stay.
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
            _contrastive_fwd_kernel[(groups * splits,)](
                *operands, call.rows, call.columns, slots, keep, call.sizes, part, call.beta, call.form, tile.constants,
                **tile.options,
            )  # fmt: skip
    upper, most = ((tile.rows, tile.columns), groups + splits) if call.upper else (None, max(plan))
    _contrastive_merge_kernel[(triton.cdiv(count, MERGE_BLOCK), call.directions)](
        slots, stats, count, plan, call.beta, call.moments, upper, triton.next_power_of_2(most), MERGE_BLOCK,
        **STREAM_OPTIONS,
    )  # fmt: skip


def new_stash(like: Tensor, elements: int) -> Tensor:
    """Memory for exponentials, parts of which nobody writes or reads: defined where checks of the op compare it."""
    return like.new_zeros(elements) if elements <= DEFINED else like.new_empty(elements)


def kept(stash: Tensor, rows: int, pitch: int) -> tuple[Tensor, Tensor, int] | tuple[None, None, None]:
    """The exponentials, their references and the pitch of `stash`, as the kernels take them."""
    if not stash.numel():
        return None, None, None
    return stash[: rows * pitch], stash[rows * pitch :].view(torch.float32), pitch


def chunk_memory(call: Call, stash: Tensor, rows: int, pitch: int) -> tuple[tuple, Tensor, tuple[Tensor, int] | None]:
    """Of a chunk of rows in `stash`: what is kept of its exponentials, where G comes, where products are, if any."""
    if call.by_library:
        return (None, None, None), stash[: rows * pitch], (stash, pitch)
    keep = kept(stash, rows, pitch)
    return keep, keep[0], None  # type: ignore[return-value]


def chunk_plan(rows: int, columns: int, itemsize: int, workspace_mib: float) -> tuple[int, int, int]:
    """(rows, elements, pitch) of exponentials: as many whole rows as the workspace holds, one at least."""
    one, pitch = exponentials(1, columns, itemsize)
    height = int(workspace_mib * 2**20) // (one * itemsize)
    height = min(rows, max(height // CHUNK * CHUNK or height, 1))
    return height, exponentials(height, columns, itemsize)[0], pitch


def block_plan(rows: int, columns: int, elements: int, tile: Tile, upper: bool = False) -> tuple[int, int]:
    """(rows, columns) of the blocks of G that `elements` hold, whole tiles of columns: square where not all fits.

    Each block reads and writes the gradients' sums once, so that a square has the least of that per product. `upper`:
    blocks begin at the diagonal, below which they have the more in vain the higher they are.
    """
    if upper and rows > LOWEST:
        rows = _even(rows, max(LOWEST, rows // STRIPS), max(tile.rows, tile.columns))
    padded = triton.cdiv(columns, tile.columns) * tile.columns
    if rows * padded <= elements:
        return rows, padded
    wide = min(padded, max(math.isqrt(elements), elements // rows)) // tile.columns * tile.columns
    wide = _even(columns, max(wide, tile.columns), tile.columns)
    high = elements // wide
    return min(rows, _even(rows, high // tile.rows * tile.rows, tile.rows) if high >= tile.rows else max(high, 1)), wide


def _even(total: int, most: int, unit: int) -> int:
    """The size, at most `most` and a multiple of `unit`, of the fewest pieces of `total`, alike in size."""
    pieces = triton.cdiv(total, most)
    return triton.cdiv(triton.cdiv(total, pieces), unit) * unit


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out (+)= a @ b; float32 sums of half-precision products."""
    if not a.is_cuda:  # the interpreter
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    elif first:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def half_range(grad: Tensor, call: Call) -> Tensor:
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


def finish(
    sums: Tensor, x: Tensor, grad: Tensor | None, scale: Tensor | None, dot: Tensor | None, factor: Tensor | None,
    normalize: bool = False,
) -> None:  # fmt: skip
    """The gradients of embeddings `x` (of their lengths' directions only, with `normalize`) and scales from `sums`."""
    _contrastive_finish_kernel[(triton.cdiv(sums.shape[0], FINISH_BLOCK[0]),)](
        sums, x, grad, scale, dot, factor, (*sums.shape, x.stride(0)), normalize, *FINISH_BLOCK, **STREAM_OPTIONS
    )


def scaled(made: Tensor, grad: Tensor, like: Tensor, needed: bool) -> Tensor:
    """`made`, which the forward has made in float32, times the upstream gradient, in the dtype of `like`."""
    if not needed:
        return like.new_empty(0)
    out = like.new_empty(like.shape)
    if grad.numel() != 1 or made.numel() < STREAM_BLOCK:
        return torch.mul(made, grad, out=out)
    count = made.numel()
    _contrastive_scale_kernel[(triton.cdiv(count, STREAM_BLOCK),)](
        made, grad, out, count, STREAM_BLOCK, **STREAM_OPTIONS
    )
    return out


class Side:
    """The gradient of one of the embeddings, made of blocks, and of its scale (or all scales, where none is given)."""

    def __init__(
        self, x: Tensor, width: int, scale: Tensor | None, needs: tuple[bool, bool], height: int, single: bool,
        factor: Tensor | None, normalize: bool = False,
    ) -> None:  # fmt: skip
        self.x, self.scale, self.factor, self.height, self.normalize = x, scale, factor, height, normalize
        rows, (needs_x, needs_scale) = x.shape[0], needs
        self.grad = x.new_empty((rows, width) if needs_x else 0)
        self.dot = x.new_empty(rows if needs_scale else 0, dtype=torch.float32)
        self.needed = needs_x or needs_scale
        # sums in the gradient itself, where it is float32 or one rounded product is all
        once = single and not needs_scale and not normalize
        self.direct = needs_x and factor is None and (x.dtype == torch.float32 or once)
        self.finishes = self.needed and (needs_scale or normalize or not self.direct)
        kept = height if self.needed else 0
        self.sums = self.grad if self.direct else x.new_empty((kept, width), dtype=torch.float32)

    def part(self, start: int, stop: int) -> Tensor:
        """The sums of these rows, which are those of one block when sums are kept for one only."""
        return self.sums[start:stop] if self.direct or self.height == self.x.shape[0] else self.sums[: stop - start]

    def finish(self, start: int, stop: int) -> None:
        if not self.finishes:
            return
        grad = self.grad[start:stop] if self.grad.numel() and (self.normalize or not self.direct) else None
        dot = self.dot[start:stop] if self.dot.numel() else None
        scale = None if dot is None or self.scale is None else self.scale[start:stop]
        finish(self.part(start, stop), self.x[start:stop], grad, scale, dot, self.factor, self.normalize)


def half(tile: Tile) -> Tile:
    """With half the rows: for a kernel with branches that hold more registers."""
    return tile if tile.rows <= HALF_TILE else replace(tile, rows=tile.rows // 2)


def make_block(
    call: Call, work: Tensor | None, sums: Tensor | None, given: tuple, area: tuple[int, int, int, int], pitch: int,
    made: bool = False,
) -> Tensor:  # fmt: skip
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
        _contrastive_bwd_kernel[(tiles[0] * tiles[1],)](
            *operands, call.rows, call.columns, (work, sums), given, call.sizes, (row, column, end, *tiles, pitch),
            call.beta, call.form, tile.constants, part.value, GROUP, **tile.options,
        )  # fmt: skip
    return call.query.new_empty(0) if work is None else work.view(-1, pitch)[: end - row, : stop - column]


def make_gradients(
    call: Call, given: tuple, blocks: tuple[int, int], q: Side, k: Side, bias_grad: Tensor
) -> None:  # fmt: skip
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
