"""One call of the contrastive kernels: operands, vectors of rows and columns, form, tile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core.kernels.matmul import add_product, embeddings
from .blocking import block_plan
from .tile_configs import DESCRIPTORS, PRODUCTS, best_tile, products_kind

HALF_TILE = 64  # columns, or rows


class LogitMatrix:
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
