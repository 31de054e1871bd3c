"""Statistics of both directions with each similarity made once, a block of the logits at a time.

The family's op finds the statistics of a block's rows and those of its columns together, where there are as many of
both. Another block is cut into squares, and what is left beside them again; of a strip too thin for that each direction
is made by itself. Across ranks a block is what one rank's queries and another's keys have.

The parts are log-sum-exps, maxima and sums, so the merged ones are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.traced import symbolic
from .groups import sum_of_group
from .ops.softmax_stats import Inputs, softmax_statistics
from .row_losses import merged

Range = tuple[int, int]  # the first, and the one after the last
SQUARES = 64  # that a block is cut into at most, if they are smaller than LEAST_SIDE
SQUARES_OF_REST = 8  # the same of a strip that is left beside them
LEAST_SIDE = 512  # from which on squares are large enough to be calls of their own, however many


class Side(NamedTuple):
    """The queries or the keys of a block; None for what the loss does not have."""

    embeddings: Tensor  # [n, D]
    scale: Tensor | None  # [n], of the products
    bias: Tensor | None  # [n]
    ids: Tensor | None  # [n]
    limit: Tensor | None = None  # [n], of the queries' logits
    targets: Tensor | None = None  # [n], of the queries among their own rank's keys
    groups: Tensor | None = None  # [n], whose equal ones are positives; in the sum of positives alone

    @property
    def rows(self) -> int:
        return self.embeddings.shape[0]

    def part(self, start: int, end: int) -> Side:
        fields: Any = [None if t is None else t[start:end] for t in self]
        return Side(*fields)

    def split(self, counts: Sequence[int]) -> list[Side]:
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [self.part(end - count, end) for end, count in zip(ends, counts, strict=True)]


def sides_of(x: Inputs) -> tuple[Side, Side]:
    return (
        Side(x.query, x.row_scale, None, x.row_ids, x.logit_limit, x.targets),
        Side(x.key, x.column_scale, x.bias, x.column_ids),
    )


class Call(NamedTuple):
    """One call of the op: its inputs, and of which queries and keys it gives statistics (None: of none)."""

    inputs: Inputs
    queries: Range | None
    keys: Range | None


def calls(x: Inputs, queries: Side, keys: Side, both: bool, own: bool) -> Iterator[Call]:
    """The op's calls for a block. `own`: of this rank's keys, whose diagonal, targets and symmetry `x` speaks of."""
    whole = (0, queries.rows), (0, keys.rows)
    if own and x.self_similarity:
        yield Call(_between(x, queries, keys), whole[0], None)
        return
    x, workspace_mib = x._replace(diagonal=x.diagonal and own, self_similarity=False), x.workspace_mib
    if not own:
        queries = queries._replace(targets=None)
    if not both:
        yield Call(_between(x, queries, keys), whole[0], None)
        return
    pieces = _cut(whole[0], whole[1])
    for of_queries, of_keys in pieces:
        left, right = queries.part(*of_queries), keys.part(*of_keys)
        if len(pieces) > 1:  # each saves its share of what the block may
            share = left.rows * right.rows / (queries.rows * keys.rows)
            x = x._replace(workspace_mib=workspace_mib * share)
        if left.rows == right.rows:
            diagonal = x.diagonal and of_queries[0] == of_keys[0]
            yield Call(_between(x._replace(diagonal=diagonal), left, right, symmetric=True), of_queries, of_keys)
        else:
            yield Call(_between(x._replace(diagonal=False), left, right), of_queries, None)
            yield Call(_transposed(x._replace(diagonal=False), left, right), None, of_keys)


def _cut(rows: Range, columns: Range, most: int = SQUARES) -> list[tuple[Range, Range]]:
    """The squares of a block, those of what is left beside them, and so on; a thin strip stays whole, and so does what
    has other sizes at the next call of a compiled graph, whose squares would be others."""
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    if height != width and (symbolic(height) or symbolic(width)):
        return [(rows, columns)]
    side, wide = min(height, width), width >= height
    if side == 0:
        return []
    count = max(height, width) // side
    if count > most and side < LEAST_SIDE:
        return [(rows, columns)]
    ends = [i * side for i in range(count + 1)]
    steps = [(start, start + side) for start in ends[:-1]]
    if wide:
        squares = [(rows, (columns[0] + start, columns[0] + end)) for start, end in steps]
        rest = _cut(rows, (columns[0] + ends[-1], columns[1]), SQUARES_OF_REST)
    else:
        squares = [((rows[0] + start, rows[0] + end), columns) for start, end in steps]
        rest = _cut((rows[0] + ends[-1], rows[1]), columns, SQUARES_OF_REST)
    return squares + rest


def _between(x: Inputs, rows: Side, columns: Side, symmetric: bool = False) -> Inputs:
    assert rows.scale is not None
    return x._replace(
        query=rows.embeddings, key=columns.embeddings, row_scale=rows.scale, column_scale=columns.scale,
        bias=columns.bias, row_ids=rows.ids, column_ids=columns.ids, logit_limit=rows.limit, targets=rows.targets,
        symmetric=symmetric,
    )  # fmt: skip


def _transposed(x: Inputs, queries: Side, keys: Side) -> Inputs:
    """The keys' statistics over the queries alone. A bias per key becomes a further dimension of the embeddings."""
    assert queries.scale is not None
    ones = queries.scale.new_ones(keys.rows)
    if keys.bias is None:
        return _between(x, keys._replace(scale=ones if keys.scale is None else keys.scale), queries)
    scaled = (
        side.embeddings.to(ones.dtype) * (1 if side.scale is None else side.scale[:, None]) for side in (keys, queries)
    )
    rows, columns = (
        torch.cat((t, last[:, None]), 1)
        for t, last in zip(scaled, (keys.bias, queries.scale.new_ones(queries.rows)), strict=True)
    )
    sides = Side(rows, ones, None, keys.ids), Side(columns, None, None, queries.ids)
    return _between(x._replace(bfloat16=False), *sides)


class Statistics(NamedTuple):
    """How the statistics [S, n] of sets of negatives are merged; with `positives` [S + 1, n], a sum being the last."""

    moments: bool
    hardness: float
    positives: bool = False

    @property
    def values_of_nothing(self) -> list[float]:
        values = [-torch.inf, -torch.inf]
        values += [0.0, 0.0] if self.moments else []  # asked, not multiplied: in a graph it may be a symbol
        values += [-torch.inf, -torch.inf] if self.hardness else []
        return values + [0.0] if self.positives else values

    @property
    def size(self) -> int:
        return len(self.values_of_nothing)

    def of_nothing(self, like: Tensor, rows: int) -> Tensor:
        return torch.cat([like.new_full((1, rows), value) for value in self.values_of_nothing])

    def union(self, one: Tensor, two: Tensor) -> Tensor:
        both = merged(one[: self.size - self.positives], two[: self.size - self.positives], self.moments, self.hardness)
        return torch.cat((both, one[-1:] + two[-1:])) if self.positives else both

    def placed(self, stats: Tensor, place: Range, rows: int) -> Tensor:
        """[S, rows]: the statistics of some rows, and of nothing for the others."""
        if place == (0, rows):
            return stats
        around = [self.of_nothing(stats, count) for count in (place[0], rows - place[1])]
        return torch.cat((around[0], stats, around[1]), 1)


def of_block(
    x: Inputs, queries: Side, keys: Side, both: bool, own: bool, how: Statistics
) -> tuple[Tensor, Tensor | None]:
    """The statistics of the queries over the keys and, with `both`, of the keys over the queries."""
    only = how._replace(positives=False)
    found_rows = [only.of_nothing(x.row_scale, queries.rows)]
    found_columns = [only.of_nothing(x.row_scale, keys.rows)]
    for call in calls(x, queries, keys, both, own):
        stats = softmax_statistics(call.inputs)
        if call.queries is not None:
            found_rows.append(only.placed(stats[0], call.queries, queries.rows))
        if call.keys is not None:
            found_columns.append(only.placed(stats[-1], call.keys, keys.rows))
    found = [reduce(only.union, of[1:] or of) for of in ([found_rows, found_columns] if both else [found_rows])]
    if how.positives:
        sums = positives(queries, keys, both)
        found = [torch.cat((stats, of[None])) for stats, of in zip(found, sums, strict=True)]
    return found[0], found[1] if both else None


def of_both(x: Inputs) -> list[Tensor]:
    """[S, M] of the queries over the keys and [S, N] of the keys over the queries, of one device."""
    rows, columns = of_block(x, *sides_of(x), both=True, own=True, how=Statistics(x.moments, x.hardness))
    assert columns is not None
    return [rows, columns]


def positives(queries: Side, keys: Side, both: bool) -> list[Tensor]:
    """The sum of each query's logits over the keys of its group and, with `both`, of each key's over the queries; of
    what is compared with itself, with itself too. In O((m + n) D)."""
    assert queries.scale is not None and queries.groups is not None and keys.groups is not None
    dtype = queries.scale.dtype
    rows = queries.embeddings.to(dtype) * queries.scale[:, None]
    columns = keys.embeddings.to(dtype)
    columns = columns if keys.scale is None else columns * keys.scale[:, None]
    of_rows = (rows * sum_of_group(columns, keys.groups, queries.groups)[0]).sum(1)
    return [of_rows, (columns * sum_of_group(rows, queries.groups, keys.groups)[0]).sum(1)] if both else [of_rows]
