"""Statistics and SigLIP's loss over the columns of all ranks, whose embeddings come piece by piece: one op a pass.

    statistics_of_pieces    rows [S, m] of the own queries over the keys of all ranks; parts [S, B] of the keys of all
                            ranks, own ones first, over the own queries, where both directions are asked for
    siglip_of_pieces        the loss and its gradients in one lap, as the family's op; of rows [m] the backward is a lap

Of the inputs that have a number a column, those of all ranks come [B], own ones first; of embeddings the own ones. The
backward of the statistics makes each block again, with the statistics of the whole, and the keys' gradients go back as
the keys came (:mod:`walks`). There is no double backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contrastive.blocks import Range, Side, Statistics, calls, of_block, positives, sides_of
from ..contrastive.ops.softmax_stats import Grads, Inputs, Needs, gradients_of_statistics
from ..core import full_precision
from ..core.autograd import _save, _saved
from ..core.structs import flattened
from .agreement import Call, agree
from .collectives import _group_named, _op, described
from .walks import Chunks, Ring, Stretch, Walk


class Share(NamedTuple):
    """What of a block of two ranks this one makes: its own rows and the other's columns, by their places."""

    rows: Range
    columns: Range


def shares(hop: int, own: int, others: Sequence[int], half: bool, lower: bool) -> Share | None:
    """The share in the block with the rank `hop` ahead, of `own` rows and that rank's `others[hop]`.

    All of it, or where the two compare the same rows (`half`) what the other one does not make: blocks up to half way
    around, and of the one just opposite the `lower` rank its first rows, the other all of its own with what is left.
    """
    columns, ranks = others[hop], len(others)
    if not half or hop == 0 or 2 * hop < ranks:
        return Share((0, own), (0, columns))
    if 2 * hop > ranks:
        return None
    return Share((0, (own + 1) // 2), (0, columns)) if lower else Share((0, own), ((columns + 1) // 2, columns))


class Groups(NamedTuple):
    """Whose equal ones are positives, where their sum is asked for."""

    row_groups: Tensor | None  # [m]
    column_groups: Tensor | None  # [B]


class Route(NamedTuple):
    """How the embeddings come."""

    strategy: str  # "chunked" or "ring"
    wire: str  # the dtype in which they travel
    each: int  # rows of every rank in a chunk
    counts: list[int]  # of the ranks, rank by rank
    group: str

    def walk(self, rows: Tensor, half: bool) -> Walk:
        group, wire = _group_named(self.group), getattr(torch, self.wire)
        around = self.around
        if self.strategy == "ring":
            return Ring(rows, around, wire, group, half)
        return Chunks(rows, around, wire, group, self.each)

    @property
    def around(self) -> list[int]:
        rank = _group_named(self.group).rank()
        return [*self.counts[rank:], *self.counts[:rank]]

    def is_lower(self, hop: int) -> bool:
        """Whether this rank is the lower one of itself and the one so far ahead."""
        return _group_named(self.group).rank() + hop < len(self.counts)


def compare(call: Call, route: Route, rows: Tensor) -> None:
    """Whether the ranks call alike, where they have not compared that yet; of `rows` the width and the dtype too."""
    if call.fields:
        what = f"{call.fields}; {described(['rows'], [rows])}"
        agree(call._replace(fields=what), _group_named(route.group))


class Place(NamedTuple):
    """Keys of a stretch, and where they are among those of all ranks."""

    stretch: int
    start: int
    end: int
    column: int


class Block(NamedTuple):
    rows: tuple[int, int]  # which queries
    keys: Tensor
    places: list[Place]
    own: bool  # this rank's keys

    def columns(self, of_all: Tensor | None) -> Tensor | None:
        """Of something that all ranks' columns have [..., B], what these keys have."""
        if of_all is None:
            return None
        return torch.cat([of_all[..., p.column : p.column + p.end - p.start] for p in self.places], -1)


def _blocks(piece: Sequence[Stretch], rows: int, half: bool, route: Route) -> Iterator[Block]:
    """What this rank makes of a piece: keys against the same queries together."""
    around = route.around
    found: dict[tuple[int, int], list[Place]] = {}
    for i, stretch in enumerate(piece):
        share = shares(stretch.hop, rows, around, half, route.is_lower(stretch.hop))
        if share is None:
            continue
        start, end = (min(max(at - stretch.start, 0), stretch.rows.shape[0]) for at in share.columns)
        column = sum(around[: stretch.hop]) + stretch.start + start
        if end > start and share.rows[1] > share.rows[0]:
            found.setdefault(share.rows, []).append(Place(i, start, end, column))
    for of_rows, places in found.items():
        keys = torch.cat([piece[p.stretch].rows[p.start : p.end] for p in places])
        yield Block(of_rows, keys, places, piece[0].hop == 0)


def _sides(x: Inputs, groups: Groups, block: Block) -> tuple[Side, Side]:
    queries, keys = sides_of(x)
    queries = queries._replace(groups=groups.row_groups).part(*block.rows)
    more = (block.columns(t) for t in (x.column_scale, x.bias, x.column_ids, groups.column_groups))
    scale, bias, ids, of_columns = more
    return queries, keys._replace(embeddings=block.keys, scale=scale, bias=bias, ids=ids, groups=of_columns)


def _how(x: Inputs, groups: Groups) -> Statistics:
    return Statistics(x.moments, x.hardness, groups.row_groups is not None)


def _statistics_fwd(x: Inputs, groups: Groups, route: Route, comparison: Call) -> tuple[Tensor, Tensor]:
    compare(comparison, route, x.key)
    half, how, own_rows = x.self_similarity, _how(x, groups), x.query.shape[0]
    rows = how.of_nothing(x.row_scale.double(), own_rows)
    columns = sum(route.counts) if half or x.symmetric else 0
    parts = how.of_nothing(x.row_scale, columns)
    with torch.no_grad(), full_precision(x.query):
        for piece in route.walk(x.key, half).pieces():
            for block in _blocks(piece, own_rows, half, route):
                both = x.symmetric or (half and not block.own)
                queries, keys = _sides(x, groups, block)
                of_rows, of_columns = of_block(x, queries, keys, both, block.own, how)
                rows = how.union(rows, how.placed(of_rows.double(), block.rows, own_rows))
                if of_columns is not None:
                    _put(parts, block, of_columns)
    return rows.to(x.row_scale.dtype), parts


def _put(to: Tensor, block: Block, of_columns: Tensor) -> None:
    """What is made of a block's columns [..., n] to its place among those of all [..., B]: each is made once."""
    sizes = [p.end - p.start for p in block.places]
    for place, part in zip(block.places, of_columns.split(sizes, -1), strict=True):
        to[..., place.column : place.column + part.shape[-1]] = part


def _statistics_fake(x: Inputs, groups: Groups, route: Route, comparison: Call) -> tuple[Tensor, Tensor]:
    count = _how(x, groups).size
    columns = sum(route.counts) if x.self_similarity or x.symmetric else 0
    return x.row_scale.new_empty(count, x.query.shape[0]), x.row_scale.new_empty(count, columns)


class Upstream(NamedTuple):
    """Of the statistics: what they are, and their gradients."""

    rows: Tensor
    parts: Tensor
    grad_rows: Tensor
    grad_parts: Tensor


def _statistics_bwd(up: Upstream, x: Inputs, groups: Groups, route: Route, needs: Needs) -> Grads:
    half, own_rows = x.self_similarity, x.query.shape[0]
    sums = {
        name: torch.zeros_like(getattr(x, name), dtype=up.rows.dtype)
        for name in ("query", "row_scale", "column_scale", "bias")
        if getattr(needs, name)
    }
    walk = route.walk(x.key, half)
    with torch.no_grad(), full_precision(x.query):
        for piece in walk.pieces():
            grads = [walk.home.new_zeros(s.rows.shape) for s in piece]
            for block in _blocks(piece, own_rows, half, route):
                with recording():
                    found = _gradients_of_block(up, x, groups, block, needs)
                start, end = block.rows
                for name, grad in found.items():
                    if name == "key":
                        sizes = [p.end - p.start for p in block.places]
                        for place, part in zip(block.places, grad.split(sizes), strict=True):
                            grads[place.stretch][place.start : place.end] += part
                    elif name in ("query", "row_scale"):
                        sums[name][start:end] += grad
                    else:
                        _put(sums[name], block, grad)
            if needs.key:
                walk.give(grads)
    empty = up.rows.new_empty(0)
    sums = {name: grad.to(getattr(x, name).dtype) for name, grad in sums.items()}
    if needs.key:
        sums["key"] = walk.gradient().to(x.key.dtype)
    return Grads(**{name: sums.get(name, empty) for name in Grads._fields})


def _gradients_of_block(up: Upstream, x: Inputs, groups: Groups, block: Block, needs: Needs) -> dict[str, Tensor]:
    """The gradients of the block's operands, by the names of the op's inputs."""
    queries, keys = _sides(x, groups, block)
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, t: Any) -> Any:
        if t is not None and getattr(needs, name):
            leaves[name] = t = t.detach().requires_grad_()
        return t

    queries = queries._replace(embeddings=leaf("query", queries.embeddings), scale=leaf("row_scale", queries.scale))
    keys = keys._replace(
        embeddings=leaf("key", keys.embeddings), scale=leaf("column_scale", keys.scale), bias=leaf("bias", keys.bias)
    )
    both = x.symmetric or (x.self_similarity and not block.own)
    of_rows = up.rows[:, slice(*block.rows)], up.grad_rows[:, slice(*block.rows)]
    of_columns: Any = (block.columns(up.parts), block.columns(up.grad_parts)) if both else None
    last = -1 if groups.row_groups is not None else None
    for call in calls(x, queries, keys, both, block.own):
        sides = [t for t in ((of_rows, call.queries), (of_columns, call.keys)) if t[1] is not None]
        known, grad = (
            torch.stack([side[i][:last, slice(*at)] for side, at in sides])  # type: ignore[index,misc]
            for i in range(2)
        )
        operands: dict[str, Any] = {name: getattr(call.inputs, name) for name in Grads._fields}
        wanted = Needs(*[t is not None and t.requires_grad for t in operands.values()])
        plain: dict[str, Any] = {name: None if t is None else t.detach() for name, t in operands.items()}
        made = gradients_of_statistics(call.inputs._replace(**plain), known, grad, wanted)
        there = [i for i, flag in enumerate(wanted) if flag]
        if there:
            torch.autograd.backward([list(operands.values())[i] for i in there], [made[i] for i in there])
    if last is not None:
        upstream = [of_rows[1][-1], *([] if of_columns is None else [of_columns[1][-1]])]
        torch.autograd.backward(positives(queries, keys, both), upstream)
    return {name: t.grad for name, t in leaves.items() if t.grad is not None}


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd within an op's kernel, which runs below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA"):
        key = getattr(torch._C.DispatchKey, name)
        excluded = excluded.remove(key) if excluded.has(key) else excluded
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(True)
    _save(ctx, [*inputs, *output])


def _statistics_backward(ctx: Any, grad_rows: Tensor, grad_parts: Tensor) -> tuple:
    *inputs, rows, parts = _saved(ctx)
    structs = [t for t in (Inputs, Groups, Route) for _ in t._fields]
    needs = [ctx.needs_input_grad[Inputs._fields.index(name)] for name in Needs._fields]
    got = statistics_of_pieces_bwd(rows, parts, grad_rows, grad_parts, *inputs[: len(structs)], *needs)
    by_name = dict(zip(Grads._fields, got, strict=True))
    wanted = dict(zip(Needs._fields, needs, strict=True))
    found = [by_name[name] if wanted.get(name) else None for name in Inputs._fields]
    return *found, *[None] * (len(inputs) - len(found))


def _no_double_backward(ctx: Any, *grads: Any) -> tuple:
    raise RuntimeError(
        "strategy: double backward is not provided by 'chunked' and 'ring'; pass exchange=Exchange(strategy='gather')"
    )


def _statistics_bwd_fake(up: Upstream, x: Inputs, groups: Groups, route: Route, needs: Needs) -> Grads:
    return Grads(**{
        name: getattr(x, name).new_empty(getattr(x, name).shape) if wanted else up.rows.new_empty(0)
        for name, wanted in needs._asdict().items()
    })  # fmt: skip


statistics_of_pieces = _op(
    "statistics_of_pieces", flattened(_statistics_fwd), flattened(_statistics_fake), _statistics_backward, _setup
)
statistics_of_pieces_bwd = _op(
    "statistics_of_pieces_bwd", flattened(_statistics_bwd), flattened(_statistics_bwd_fake), _no_double_backward,
    lambda ctx, inputs, output: None,
)  # fmt: skip
