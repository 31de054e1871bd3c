"""What the kernels over tiles of logits are given, by name: M rows (queries), N columns (keys), D numbers each.

A field that is None costs nothing: the kernels are compiled without it. Sizes that change with a batch go as odd
numbers, so that another batch compiles nothing; what is a multiple of 16 in every call goes as it is, and so do all
pointers: to the second of two vectors in one piece of memory only where :func:`aligned` has made it one of 16 bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

from ...core.kernels.device_math import number_in
from ...core.kernels.launch import odd_number


class Rows(NamedTuple):
    """Vectors of the rows."""

    row_scale: Tensor  # [M] float32
    targets: Tensor | None  # [M] int64: a column that is no negative of the row
    row_ids: Tensor | None  # [M] int64: columns of the same id are no negatives
    logit_limit: Tensor | None  # [M] float32: logits above it, before the bias, are no negatives
    pair_spans: Tensor | None = None  # [M, 2] int64: which of the columns' words are the row's

    def part(self, part: slice) -> Rows:
        return Rows(*[None if v is None else v[part] for v in self])  # type: ignore[arg-type]


class Columns(NamedTuple):
    """Vectors of the columns."""

    column_scale: Tensor | None  # [N] float32
    bias: Tensor | None  # [N] float32
    column_ids: Tensor | None  # [N] int64
    pair_words: Tensor | None = None  # [P, 2] int32: listed pairs, see pairs.py


class Sizes(NamedTuple):
    rows: int  # M
    columns: int  # N
    dim: int  # D, padded to a multiple of 16

    def odd(self) -> Sizes:
        """As a kernel takes it, where :func:`sizes_in` reads it; so with all such pairs here."""
        return Sizes(odd_number(self.rows), odd_number(self.columns), self.dim)


@triton.jit
def sizes_in(odd):
    return Sizes(number_in(odd.rows), number_in(odd.columns), odd.dim)


class Operands(NamedTuple):
    """What makes the products <query_i, key_j> of a tile: embeddings, or a block of products made by a library."""

    query: Any  # [M, D] as a pointer or a tensor descriptor; or the products, float32, rows `key.pitch` apart
    key: Any  # [N, D] as a pointer or a tensor descriptor; or where the products lie, see ProductsBlock


class ProductsBlock(NamedTuple):
    """Which products a block holds."""

    pitch: int  # elements from one row to the next
    row: int  # the first
    column: int  # the first
    end_row: int

    def odd(self) -> ProductsBlock:
        return self._replace(end_row=odd_number(self.end_row))


@triton.jit
def products_block_in(odd):
    return ProductsBlock(odd.pitch, odd.row, odd.column, number_in(odd.end_row))


class Area(NamedTuple):
    """A block of the logits: rows `row` to `end_row`, columns `column` to `end_column`."""

    row: int
    end_row: int
    column: int
    end_column: int
    first_column: int = 0  # of these rows' first block, for the forward, which goes on from block to block

    def odd(self) -> Area:
        return self._replace(end_row=odd_number(self.end_row), end_column=odd_number(self.end_column))


@triton.jit
def area_in(odd):
    return Area(odd.row, number_in(odd.end_row), odd.column, number_in(odd.end_column), odd.first_column)


class SavedExps(NamedTuple):
    """Exponentials that the forward saves for the backward; all None: it saves none."""

    exps: Tensor | None  # [M, pitch] in the embeddings' dtype: e^s / 2^exponent
    exponents: Tensor | None  # [column tiles, M] float32
    pitch: int | None  # elements from one row to the next


NOTHING_SAVED = SavedExps(None, None, None)


class BackwardInputs(NamedTuple):
    """What the gradient of the logits is made from, beside the logits themselves."""

    stats: Tensor  # [directions, states, M]
    stats_grad: Tensor  # [directions, states, M]: the upstream gradient of `stats`
    fp16_scale: Tensor | None  # [1]: a power of two that G is multiplied by
    exps: Tensor | None  # as in SavedExps, like the next two
    exponents: Tensor | None
    pitch: int | None
    positive_grad: Tensor | None  # [M]: G of the positives, which are no negatives


class BackwardResults(NamedTuple):
    grad_block: Tensor | None  # [rows of the block, pitch] in the embeddings' dtype: G r c
    column_sums: Tensor | None  # [row tiles, pitch] float32: sums of G over the rows of each tile


class Block(NamedTuple):
    """A block of G, cut into tiles."""

    row: int  # the first
    column: int  # the first
    end_row: int
    row_tiles: int
    column_tiles: int
    pitch: int  # elements from one row of the block to the next

    def odd(self) -> Block:
        tiles = {"row_tiles": odd_number(self.row_tiles), "column_tiles": odd_number(self.column_tiles)}
        return self._replace(end_row=odd_number(self.end_row), **tiles)


@triton.jit
def block_in(odd):
    return Block(
        odd.row, odd.column, number_in(odd.end_row), number_in(odd.row_tiles), number_in(odd.column_tiles), odd.pitch
    )


class TileConstants(NamedTuple):
    """What the kernels know of a tile when they are compiled."""

    rows: int
    columns: int
    dim: int  # so many numbers of the embeddings are multiplied at a time
    operands: int  # POINTERS, DESCRIPTORS or PRODUCTS of tile_configs.py
    shares: bool  # rows and columns share exponentials where they can
