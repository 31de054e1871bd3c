"""The exchange as ops: to autograd and torch.compile one node each, which takes the group by its name.

    compared         a tensor as it is, once the ranks have compared what they call; without a gradient
    gather_rows      rows of all ranks, this rank's own first; its gradient: scatter_rows
    scatter_rows     the sum over ranks of what each has for this rank's rows; its gradient: gather_rows
    sum_over_ranks   forward * sum over ranks of x; its gradient: backward * sum over ranks of the upstream gradient
    replicated       a tensor that is the same on all ranks, as it is; its gradient: the mean over ranks
    rows_to_owners   rows that this rank made for each rank, to those ranks; its gradient: rows_from_owners
    rows_from_owners the way back; its gradient: rows_to_owners

torch's own collectives with autograd differ from version to version, and some are refused by torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.library import Library

from ..core.op import NAMESPACE
from .agreement import Call, agree, named

_LIB = Library(NAMESPACE, "FRAGMENT")

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name since torch 2.14
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_to_all = dist.all_to_all_single


_group_named: Callable[..., Any] = _resolve_process_group  # torch's own registry, as its collectives for graphs use it


class Counts:
    """How many rows of each kind each rank has: rank by rank, one kind after the other."""

    def __init__(self, counts: Sequence[int], world: int) -> None:
        self.counts, self.world = counts, world

    def of(self, kind: int) -> list[int]:
        return list(self.counts[kind * self.world : (kind + 1) * self.world])

    def total(self, kind: int) -> int:
        return sum(self.of(kind))


def described(names: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """What of tensors is to be the same on all ranks: all but the number of rows."""
    shapes = [", ".join(["*", *map(str, t.shape[1:])]) for t in tensors]
    return "; ".join([f"{n} [{s}] {t.dtype}" for n, s, t in zip(names, shapes, tensors, strict=True)])


def _compared(
    x: Tensor,
    tensors: list[Tensor],
    names: str,
    fields: str,
    numbers: str,
    size_names: str,
    sizes: list[int],
    rows: str,
    group: str,
) -> Tensor:
    own = _group_named(group)
    agree(Call(f"{fields}; {described(names.split(','), tensors)}", numbers, size_names, sizes, rows), own)
    return x.clone()


def _compared_fake(x, tensors, names, fields, numbers, size_names, sizes, rows, group):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _gather_rows(
    tensors: list[Tensor],
    kinds: list[int],
    sizes: list[int],
    counts: list[int],
    round_to_bfloat16: bool,
    names: str,
    fields: str,
    numbers: str,
    size_names: str,
    rows: str,
    group: str,
) -> list[Tensor]:
    """Each tensor with the rows of all ranks, those of this rank first, then of the next one, and so on around.

    `kinds` says of which of the `sizes` the rows of a tensor are. Where `fields` is not empty, the ranks first compare
    what they call: see :class:`Call`.
    """
    own = _group_named(group)
    if fields:
        agree(Call(f"{fields}; {described(names.split(','), tensors)}", numbers, size_names, sizes, rows), own)
    known = Counts(counts, own.size())
    with named("the gathering of rows", own):
        return [_gathered(t, known.of(k), round_to_bfloat16, own) for t, k in zip(tensors, kinds, strict=True)]


def _gather_rows_fake(
    tensors, kinds, sizes, counts, round_to_bfloat16, names, fields, numbers, size_names, rows, group
):  # type: ignore[no-untyped-def]
    known = Counts(counts, _group_named(group).size())
    return [t.new_empty(known.total(k), *t.shape[1:]) for t, k in zip(tensors, kinds, strict=True)]


def _scatter_rows(
    gathered: list[Tensor], kinds: list[int], sizes: list[int], counts: list[int], group: str
) -> list[Tensor]:
    """Of each tensor in the order of :func:`gather_rows` the sum over ranks of this rank's rows. Half precision is
    added up in float32 and rounded once."""
    own = _group_named(group)
    known = Counts(counts, own.size())
    with named("the reduction of gradients", own):
        return [_scattered(t, known.of(k), own) for t, k in zip(gathered, kinds, strict=True)]


def _scatter_rows_fake(gathered, kinds, sizes, counts, group):  # type: ignore[no-untyped-def]
    return [t.new_empty(sizes[k], *t.shape[1:]) for t, k in zip(gathered, kinds, strict=True)]


def _gathered(x: Tensor, counts: list[int], round_to_bfloat16: bool, group: Any) -> Tensor:
    rank, world, most = group.rank(), group.size(), max(counts)
    rounded = round_to_bfloat16 and x.ndim == 2 and x.is_floating_point() and x.element_size() > 2
    sent = x.to(torch.bfloat16) if rounded else x
    if x.shape[0] < most:
        sent = torch.cat((sent, sent.new_zeros(most - x.shape[0], *x.shape[1:])))
    everyone = sent.new_empty(world * most, *x.shape[1:])
    all_gather(everyone, sent.contiguous(), group=group)
    blocks = everyone.view(world, most, *x.shape[1:])
    others = [(rank + hop) % world for hop in range(1, world)]
    return torch.cat([x, *(blocks[other, : counts[other]].to(x.dtype) for other in others)])


def _scattered(x: Tensor, counts: list[int], group: Any) -> Tensor:
    rank, world, most = group.rank(), group.size(), max(counts)
    order = [(rank + hop) % world for hop in range(world)]
    half = x.dtype in (torch.bfloat16, torch.float16)
    blocks = x.new_zeros(world, most, *x.shape[1:], dtype=torch.float32 if half else x.dtype)
    for other, block in zip(order, x.split([counts[other] for other in order]), strict=True):
        blocks[other, : counts[other]] = block
    mine = blocks.new_empty(most, *x.shape[1:])
    reduce_scatter(mine, blocks.view(world * most, *x.shape[1:]), group=group)
    return mine[: counts[rank]].to(x.dtype)


def _setup_gather(ctx: Any, inputs: tuple, output: Any) -> None:
    _, ctx.kinds, ctx.sizes, ctx.counts, *_, ctx.group = inputs


def _gather_backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    return _given(grads, ctx, lambda given, kinds: scatter_rows(given, kinds, ctx.sizes, ctx.counts, ctx.group), 10)


def _setup_scatter(ctx: Any, inputs: tuple, output: Any) -> None:
    _, ctx.kinds, ctx.sizes, ctx.counts, ctx.group = inputs


def _scatter_backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    def again(given: list[Tensor], kinds: list[int]) -> list[Tensor]:
        return gather_rows(given, kinds, ctx.sizes, ctx.counts, False, "", "", "", "", "", ctx.group)

    return _given(grads, ctx, again, 4)


def _given(grads: list[Tensor | None], ctx: Any, op: Any, others: int) -> tuple:
    """The op on those gradients that there are, and None for the others and for the arguments that are no tensors."""
    there = [i for i, grad in enumerate(grads) if grad is not None and grad.is_floating_point()]
    out: list[Tensor | None] = [None] * len(grads)
    results = op([grads[i] for i in there], [ctx.kinds[i] for i in there]) if there else []
    for i, result in zip(there, results, strict=True):
        out[i] = result
    return out, *[None] * others


def _sum_over_ranks(x: Tensor, forward: float, backward: float, group: str) -> Tensor:
    own = _group_named(group)
    out = x.clone(memory_format=torch.contiguous_format)
    with named("the sum over ranks", own):
        dist.all_reduce(out, group=own)
    return out * forward


def _sum_over_ranks_fake(x, forward, backward, group):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_sum(ctx: Any, inputs: tuple, output: Any) -> None:
    _, ctx.forward_factor, ctx.backward_factor, ctx.group = inputs


def _sum_backward(ctx: Any, grad: Tensor) -> tuple:
    return sum_over_ranks(grad, ctx.backward_factor, ctx.forward_factor, ctx.group), None, None, None


def _replicated(x: Tensor, group: str) -> Tensor:
    return x.clone()


def _replicated_fake(x, group):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _setup_replicated(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.group = inputs[1]


def _replicated_backward(ctx: Any, grad: Tensor) -> tuple:
    mean = 1.0 / _group_named(ctx.group).size()
    return sum_over_ranks(grad, mean, mean, ctx.group), None


def _rows_to_owners(made: Tensor, own_rows: int, counts: list[int], group: str) -> Tensor:
    """[W, own_rows, ...]: what this rank and the next ones around have made for this one's rows, of `made` [B, ...] in
    the order of :func:`gather_rows`."""
    own = _group_named(group)
    world, order = own.size(), _around(own)
    parts = dict(zip(order, made.split([counts[rank] for rank in order]), strict=True))
    sent = torch.cat([parts[rank] for rank in range(world)])
    out = made.new_empty(world * own_rows, *made.shape[1:])
    with named("the exchange of statistics", own):
        all_to_all(out, sent, [own_rows] * world, counts, group=own)
    return out.view(world, own_rows, *made.shape[1:])[order]


def _rows_to_owners_fake(made, own_rows, counts, group):  # type: ignore[no-untyped-def]
    return made.new_empty(_group_named(group).size(), own_rows, *made.shape[1:])


def _setup_to_owners(ctx: Any, inputs: tuple, output: Any) -> None:
    _, ctx.own_rows, ctx.counts, ctx.group = inputs


def _to_owners_backward(ctx: Any, grad: Tensor) -> tuple:
    return rows_from_owners(grad, ctx.own_rows, ctx.counts, ctx.group), None, None, None


def _rows_from_owners(parts: Tensor, own_rows: int, counts: list[int], group: str) -> Tensor:
    """[B, ...]: of what :func:`rows_to_owners` gave, each part to the rank that made it."""
    own = _group_named(group)
    world, order = own.size(), _around(own)
    back = [order.index(rank) for rank in range(world)]
    sent = parts[back].reshape(world * own_rows, *parts.shape[2:])
    out = parts.new_empty(sum(counts), *parts.shape[2:])
    with named("the exchange of statistics' gradients", own):
        all_to_all(out, sent, counts, [own_rows] * world, group=own)
    blocks = out.split(counts)
    return torch.cat([blocks[rank] for rank in order])


def _rows_from_owners_fake(parts, own_rows, counts, group):  # type: ignore[no-untyped-def]
    return parts.new_empty(sum(counts), *parts.shape[2:])


def _from_owners_backward(ctx: Any, grad: Tensor) -> tuple:
    return rows_to_owners(grad, ctx.own_rows, ctx.counts, ctx.group), None, None, None


def _around(group: Any) -> list[int]:
    """The ranks in the order of :func:`gather_rows`."""
    return [(group.rank() + hop) % group.size() for hop in range(group.size())]


def _op(name: str, kernel: Callable, fake: Callable, backward: Callable, setup: Callable) -> Any:
    """Not by `torch.library.custom_op`, which imports torch.compile at an op's first call: that takes seconds."""
    _LIB.define(name + torch.library.infer_schema(kernel, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIB)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=_LIB)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _no_gradient(ctx: Any, grad: Tensor) -> tuple:
    raise RuntimeError("compared: no gradient is provided")


compared = _op("compared", _compared, _compared_fake, _no_gradient, lambda ctx, inputs, output: None)
gather_rows = _op("gather_rows", _gather_rows, _gather_rows_fake, _gather_backward, _setup_gather)
scatter_rows = _op("scatter_rows", _scatter_rows, _scatter_rows_fake, _scatter_backward, _setup_scatter)
sum_over_ranks = _op("sum_over_ranks", _sum_over_ranks, _sum_over_ranks_fake, _sum_backward, _setup_sum)
replicated = _op("replicated", _replicated, _replicated_fake, _replicated_backward, _setup_replicated)
rows_to_owners = _op("rows_to_owners", _rows_to_owners, _rows_to_owners_fake, _to_owners_backward, _setup_to_owners)
rows_from_owners = _op(
    "rows_from_owners", _rows_from_owners, _rows_from_owners_fake, _from_owners_backward, _setup_to_owners
)
