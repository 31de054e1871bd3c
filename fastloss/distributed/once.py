"""Statistics of both directions with each similarity made once over all ranks: CLIP and symmetric InfoNCE.

A rank has rows q [b, D] and the columns k [B, D] of all ranks, its own first. Its logits are b x B; for each rank's
columns the family's op makes one block of them and finds the statistics of its rows and those of its columns:

    rows      of the blocks of this rank, merged: of each own query over all keys
    columns   go to the rank that owns them, which merges one part from each rank: of each own key over all queries

The parts are log-sum-exps, maxima and sums, so the merged ones are exact; they are merged in float64, of which there is
one number a row. Autograd runs the same way back: the gradients of the columns' statistics return to the ranks that
made them, and the op's backward makes each block once more.

Blocks that are not square (ranks with different numbers of rows) are a square and a strip, of which the op makes each
direction by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..contrastive.ops.softmax_stats import Inputs, softmax_statistics
from ..contrastive.row_losses import merged
from .collectives import Counts, rows_to_owners
from .ranks import Ranks


class Side(NamedTuple):
    """The queries or the keys of a block; None for what the loss does not have."""

    embeddings: Tensor  # [n, D]
    scale: Tensor | None  # [n], of the products
    bias: Tensor | None  # [n]
    ids: Tensor | None  # [n]

    @property
    def rows(self) -> int:
        return self.embeddings.shape[0]

    def split(self, counts: Sequence[int]) -> list[Side]:
        fields = [[None] * len(counts) if t is None else t.split(list(counts)) for t in self]
        return [Side(*of_one) for of_one in zip(*fields, strict=True)]  # type: ignore[arg-type]


def both_directions(x: Inputs, ranks: Ranks, counts: Counts) -> Tensor:
    """The statistics [2, S, b] of own queries over all keys and of own keys over all queries.

    `x` has the own queries [b, D] and the keys [B, D] of all ranks, own ones first, whose rows `counts` has as its
    kind 0.
    """
    of_ranks = counts.of(0)
    order = [of_ranks[(ranks.group.rank() + hop) % ranks.size] for hop in range(ranks.size)]
    queries = Side(x.query, x.row_scale, None, x.row_ids)
    blocks = Side(x.key, x.column_scale, x.bias, x.column_ids).split(order)
    x = x._replace(workspace_mib=x.workspace_mib / ranks.size)  # each block saves a part of it
    union = partial(merged, moments=x.moments, hardness=x.hardness)
    rows, columns = [], []
    for hop, keys in enumerate(blocks):
        of_rows, of_columns = _of_block(x._replace(diagonal=x.diagonal and hop == 0), queries, keys)
        rows.append(of_rows)
        columns.append(of_columns.T)
    made = torch.cat(columns)
    for t in (x.query, x.key, x.row_scale, x.column_scale, x.bias):  # also on a rank without rows, or others would wait
        made = made if t is None else made + t[:0].sum(dtype=made.dtype)
    parts = rows_to_owners(made, x.query.shape[0], of_ranks, ranks.name)
    both = (rows, [part.T for part in parts.unbind()])
    return torch.stack([reduce(union, [part.double() for part in side]).to(made.dtype) for side in both])


def _of_block(x: Inputs, queries: Side, keys: Side) -> tuple[Tensor, Tensor]:
    """The statistics [S, m] of the queries over the keys and [S, n] of the keys over the queries."""
    square = min(queries.rows, keys.rows)
    inner_queries, more_queries = queries.split([square, queries.rows - square])
    inner_keys, more_keys = keys.split([square, keys.rows - square])
    rows, columns = softmax_statistics(_between(x, inner_queries, inner_keys, symmetric=True)).unbind()
    union = partial(merged, moments=x.moments, hardness=x.hardness)
    if more_keys.rows:
        rows = union(rows, softmax_statistics(_between(x, inner_queries, more_keys))[0])
        columns = torch.cat((columns, _of_keys(x, inner_queries, more_keys)), 1)
    if more_queries.rows:
        columns = union(columns, _of_keys(x, more_queries, inner_keys))
        rows = torch.cat((rows, softmax_statistics(_between(x, more_queries, inner_keys))[0]), 1)
    return rows, columns


def _between(x: Inputs, rows: Side, columns: Side, symmetric: bool = False) -> Inputs:
    assert rows.scale is not None
    return x._replace(
        query=rows.embeddings, key=columns.embeddings, row_scale=rows.scale, column_scale=columns.scale,
        bias=columns.bias, row_ids=rows.ids, column_ids=columns.ids, symmetric=symmetric,
    )  # fmt: skip


def _of_keys(x: Inputs, queries: Side, keys: Side) -> Tensor:
    """The statistics [S, n] of the keys over the queries alone. A bias per key is one number of the key's logits."""
    ones = x.row_scale.new_ones(keys.rows)
    rows = keys._replace(scale=ones if keys.scale is None else keys.scale, bias=None)
    stats = softmax_statistics(_between(x._replace(diagonal=False), rows, queries))[0]
    if keys.bias is None:
        return stats
    bias, known = keys.bias, keys.bias.detach()
    lse, top, *others = stats.unbind()
    shifted = [lse + bias, top + known]
    if x.moments:
        total, number, *others = others
        shifted += [total + number * bias, number]
    if x.hardness:  # below the maximum: their values stay, not their gradients
        above, weight = others
        shifted += [above + (1 + x.hardness) * (bias - known), weight + x.hardness * (bias - known)]
    return torch.stack(shifted)
