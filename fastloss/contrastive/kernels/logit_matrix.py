"""One call of the contrastive kernels: embeddings, vectors of rows and columns, form, tile."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core.kernels.matmul import add_product, embeddings
from ..options import Form
from .arguments import Area, Columns, Operands, ProductsBlock, Rows, SavedExps, Sizes
from .blocking import block_plan
from .tile_configs import DESCRIPTORS, PRODUCTS, best_tile, products_kind

HALF_TILE = 64  # columns, or rows


class Workspace(NamedTuple):
    """Memory for a block of products."""

    memory: Tensor
    pitch: int  # elements from one row to the next


class LogitMatrix:
    """What the kernels of the forward and of the backward are given: embeddings, vectors, form, tile."""

    def __init__(
        self, query: Tensor, key: Tensor, rows: Rows, columns: Columns, form: Form, hardness: float,
        backward: bool = False, saves_exps: bool = False, workspace_mib: float = 0.0,
    ) -> None:  # fmt: skip
        self.query, self.key = embeddings(query), embeddings(key)
        self.rows = Rows(*[None if v is None else v.contiguous() for v in rows])  # type: ignore[arg-type]
        self.columns = Columns(*[None if v is None else v.contiguous() for v in columns])
        if (rows.row_ids is None) != (columns.column_ids is None):  # ids count only in pairs
            self.rows, self.columns = self.rows._replace(row_ids=None), self.columns._replace(column_ids=None)
        self.form, self.self_similarity = form, form.self_similarity
        self.both_sides = form.symmetric or form.self_similarity  # a tile counts in its rows and in its columns
        self.directions = 1 + form.symmetric
        self.beta = hardness if hardness > 0 else None
        self.states = 2 + 2 * form.moments + 2 * (hardness > 0)
        self.sizes = Sizes(query.shape[0], key.shape[0], self.query.shape[1])
        self.products = products_kind(query.dtype)
        self.tile, self.programs = best_tile(
            query.device,
            self.products,
            self.sizes.rows,
            self.sizes.columns,
            self.sizes.dim,
            self._register_pressure(saves_exps),
        )
        self.by_library, self.elements = self.tile.operands == PRODUCTS, int(workspace_mib * 2**18)
        # the triangle's tiles have a mask, float16's backward a scale more, and sm_80 keeps products in registers;
        # saved exponents are found by the columns of a tile, so forward and backward have as many
        held_there = saves_exps and self.tile.operands != DESCRIPTORS
        held = query.dtype == torch.float16 or self.sizes.dim <= 32
        narrow = self.self_similarity or held_there or (held and (backward or saves_exps))
        if narrow and self.both_sides and self.tile.columns > HALF_TILE:
            self.tile = replace(self.tile, columns=HALF_TILE, stages=self.tile.stages + 1)

    def _register_pressure(self, saves_exps: bool) -> int:
        """How much the options of this call hold in registers, see `best_tile`."""
        rows, hardness = self.rows, self.beta is not None
        options = (rows.row_ids is not None) + (rows.logit_limit is not None) + (self.columns.bias is not None)
        options += self.form.moments + (rows.pair_spans is not None)
        targets = saves_exps and not self.both_sides and rows.targets is not None
        if rows.pair_spans is not None and self.both_sides and saves_exps:  # spills in the small tile on gfx942
            return 3
        if hardness or rows.pair_spans is not None or options + targets > (0 if self.both_sides else 2):
            return 3 if (hardness and self.both_sides) or self.self_similarity or options > 3 else 2
        return int(options > 0 or targets)  # what spills a little with four warps

    def operands(self, rows: int = 0) -> Operands:
        """As the kernels take them, with `rows` those of a tile if not as many as of this call's."""
        if self.tile.operands != DESCRIPTORS:
            return Operands(self.query, self.key)
        blocks = (rows or self.tile.rows, self.tile.columns)
        pairs = zip((self.query, self.key), blocks, strict=True)
        return Operands(*[TensorDescriptor.from_tensor(x, [block, self.tile.dim]) for x, block in pairs])

    def descriptor_of(self, saved: SavedExps) -> TensorDescriptor | None:
        """The saved exponentials as kernels write them with tensor descriptors."""
        if saved.exps is None or saved.pitch is None or self.tile.operands != DESCRIPTORS:
            return None
        exps = saved.exps.view(-1, saved.pitch)
        return TensorDescriptor.from_tensor(exps, [self.tile.rows, self.tile.columns])

    def products_plan(self) -> tuple[int, int]:
        """(rows, columns) of the blocks of products that the workspace holds: whole tiles, or all rows."""
        rows, columns = self.sizes.rows, self.sizes.columns
        block_rows, block_columns = block_plan(rows, columns, self.elements, self.tile, self.self_similarity)
        return block_rows if block_rows == rows else max(block_rows, self.tile.rows), block_columns

    def make_products(self, workspace: Workspace, area: Area) -> Operands:
        """<query_i, key_j> of an area, in `workspace`; the kernels' operands."""
        row, end_row, column, end_column, _ = area
        block = workspace.memory.view(-1)[: (end_row - row) * workspace.pitch].view(-1, workspace.pitch)
        add_product(block[:, : end_column - column], self.query[row:end_row], self.key[column:end_column].T, True)
        return Operands(workspace.memory, ProductsBlock(workspace.pitch, row, column, end_row).odd())
