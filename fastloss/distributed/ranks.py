"""The ranks of a group: what a loss gathers from them, and the sums over all of their rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..core import check_not_empty, row_shares
from .agreement import NO_CALL, Call, agree, comparisons, refuse
from .collectives import Counts, compared, described, gather_rows, replicated, sum_over_ranks
from .exchange import Exchange
from .pieces import Route

RING_ROWS = 4096  # a rank, from which on a ring inside a node beats a gather: docs/large-batch.md
ALIASES = {"query": "image", "key": "text"}  # clip_loss calls them so


def process_group(group: Any) -> Any:
    if isinstance(group, dist.ProcessGroup):
        return group
    if not isinstance(group, DeviceMesh):
        raise TypeError(f"group: expected a ProcessGroup or a 1-D DeviceMesh, got {type(group).__name__}")
    if group.ndim != 1:
        raise ValueError(f"group: expected a 1-D DeviceMesh, got {group.ndim} dimensions; pass mesh['dp']")
    return group.get_group()


def together(loss: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
    """A loss with a `group`; what it raises at its arguments, before the ranks have compared their calls, the others
    raise too, with the rank's number."""
    before = comparisons()
    try:
        return loss(*args, **options)
    except (TypeError, ValueError) as error:
        group = options["group"]
        if comparisons() == before and isinstance(group, (dist.ProcessGroup, DeviceMesh)):
            with contextlib.suppress(ValueError):  # a mesh of more dimensions
                refuse(error, process_group(group))
        raise


@dataclass(frozen=True)
class Ranks:
    """The ranks of a group as this one sees them."""

    group: Any
    name: str
    size: int
    exchange: Exchange

    @staticmethod
    def of(group: Any, exchange: Any) -> Ranks:
        if exchange is None:
            exchange = Exchange()
        elif not isinstance(exchange, Exchange):
            raise TypeError(f"exchange: expected a fastloss.Exchange, got {type(exchange).__name__}")
        group = process_group(group)
        size = group.size()
        rows = exchange.rows
        for of_one in [] if isinstance(rows, str) else rows.values() if isinstance(rows, Mapping) else [rows]:
            if len(of_one) != size:
                raise ValueError(f"rows: expected one number per rank, {size} of them, got {len(of_one)}")
        return Ranks(group, group.group_name, size, exchange)

    def number(self, value: Any) -> Any:
        """A number, or a tensor that all ranks have, whose gradient is then the same on all of them."""
        learned = isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()
        return replicated(value, self.name) if learned and self.size > 1 else value

    def meet(
        self,
        same: Mapping[str, Any],
        numbers: Mapping[str, Any],
        sizes: Mapping[str, int],
        tensors: Mapping[str, Tensor | None],
        rows_each: int = 1,
    ) -> Meeting:
        """What is to be the `same` is, on all ranks, and so are the options that are floats (`numbers`), the kinds and
        dtypes of the `tensors` that will travel, and, as :class:`Exchange` has it, their `sizes`: else a ValueError.

        The first word of a tensor's name is the size that its rows have; one of that name alone is embeddings. None
        does not travel. `rows_each`: rows that each one of a list of rows stands for. In a graph that is being compiled
        the comparison is that of the first collective.
        """
        there = {name: t for name, t in tensors.items() if t is not None}
        given = list(sizes.values())
        counts = [size for size in given for _ in range(self.size)]
        rows = self.exchange.rows
        if not isinstance(rows, str):
            known = self._known_rows(rows, sizes, rows_each)
            counts = [n for name, of in known.items() for n in of or [sizes[name]] * self.size]
            rows = ";".join([",".join(map(str, of)) for of in known.values()])
        options = ("strategy", "mib", "wire", "gradients", "negatives")
        fields = _text(dict(same) | {name: getattr(self.exchange, name) for name in options})
        call = Call(fields, "", ",".join(sizes), given, rows)
        if torch.compiler.is_compiling():
            if rows == "uneven":
                raise ValueError(
                    "rows: 'uneven' cannot be compiled, as the ranks' numbers of rows would have to be read; "
                    "pass a list of them, or 'equal'"
                )
            return Meeting(self, list(sizes), Counts(counts, self.size), call, there)
        what = f"{fields}; {described(there, there.values())}"
        everyone = agree(call._replace(fields=what, numbers=_text(numbers)), self.group)
        if rows == "uneven":
            counts = [sizes_of_rank[kind] for kind in range(len(given)) for sizes_of_rank in everyone]
        return Meeting(self, list(sizes), Counts(counts, self.size), None, there)

    def _known_rows(self, rows: Any, sizes: Mapping[str, int], rows_each: int) -> dict[str, list[int]]:
        """Of each of the sizes those of all ranks; nothing of negatives without a list, which are as many on all."""
        found = {}
        for name in sizes:
            of_name = rows if not isinstance(rows, Mapping) else rows.get(name, rows.get(ALIASES.get(name)))
            if name == "negatives" and not isinstance(rows, Mapping):
                of_name = None
            if of_name is None and name != "negatives":
                wanted = " and ".join(f"{ALIASES.get(n, n)!r}" for n in sizes if n != "negatives")
                raise ValueError(f"rows: expected numbers of rows for {wanted}, got {list(rows)}")
            found[name] = [rows_each * n for n in of_name or []]
        return found

    def reduced(self, rows: Tensor, weights: Tensor | None, reduction: str, counts: Counts) -> Tensor:
        """Weighted losses of this rank's rows (or their sum) as they are, or the sum or the mean over all ranks.

        The gradient is that of the sum over ranks of what each makes of its result: where all call `backward` on the
        loss, as many times the loss's own as there are ranks, of which an average over ranks leaves one.
        """
        if reduction == "none":
            return rows
        if reduction == "mean":
            check_not_empty(counts.total(0))
        part = rows.sum() if rows.ndim else rows
        back = 1.0 if self.exchange.gradients == "mean" else 1.0 / self.size
        total = sum_over_ranks(part, 1.0, back, self.name)
        if reduction == "sum" or weights is not None:
            return total
        return total / counts.total(0)


class Meeting:
    """Ranks that call alike, and how many rows each of them has: what a loss then exchanges with them."""

    def __init__(
        self, ranks: Ranks, names: list[str], counts: Counts, call: Call | None, travels: Mapping[str, Tensor]
    ) -> None:
        self.ranks, self.names, self.counts, self._call, self._travels = ranks, names, counts, call, travels
        self.rank = ranks.group.rank()
        embeddings = [(counts.total(names.index(n)), t) for n, t in travels.items() if n in names]
        size = sum(total * t.shape[1] * _bytes_of(t, ranks.exchange) for total, t in embeddings)
        most = max([1, *(max(counts.of(names.index(n))) for n in travels if n in names)])
        self.strategy = chosen(ranks.exchange, ranks.size, size, most)

    def counts_of(self, name: str) -> list[int]:
        """Of the rows of a name, rank by rank."""
        return self.counts.of(self.names.index(name))

    def around(self, name: str) -> list[int]:
        """The same, this rank first."""
        counts = self.counts_of(name)
        return [*counts[self.rank :], *counts[: self.rank]]

    def is_lower(self, hop: int) -> bool:
        """Whether this rank is the lower one of itself and the one so far ahead."""
        return self.rank + hop < self.ranks.size

    def comparison(self) -> Call:
        """What the ranks have yet to compare: the first collective of a compiled graph does it."""
        call, self._call = self._call, None
        return NO_CALL if call is None else call

    def gather(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The tensors with the rows of all ranks, this rank's own first; None does not travel."""
        there = {name: t for name, t in tensors.items() if t is not None}
        if not there:
            return {}
        kinds = [self.names.index(name.split()[0]) for name in there]
        sizes = [self.counts_of(name)[self.rank] for name in self.names]
        for kind, t in zip(kinds, there.values(), strict=True):
            sizes[kind] = t.shape[0]
        wire, call = self.ranks.exchange.wire is not None, self.comparison()
        everyone = gather_rows(
            list(there.values()), kinds, sizes, self.counts.counts, wire, ",".join(there), call.fields, call.numbers,
            call.size_names, call.rows, self.ranks.name,
        )  # fmt: skip
        return dict(zip(there, everyone, strict=True))

    def route(self, name: str, rows: Tensor, wire: torch.dtype) -> Route:
        """How embeddings of that name travel in pieces: in the dtype `wire`, unless the exchange has a smaller one."""
        exchange = self.ranks.exchange
        if exchange.wire is not None and wire.itemsize > exchange.wire.itemsize:
            wire = exchange.wire
        counts = self.counts_of(name)
        two = 2 * self.ranks.size * rows.shape[1] * (wire.itemsize + _gradient_bytes(rows.dtype))
        pieces = -(-max(counts) // max(1, int(exchange.mib * 2**20 / two)))
        each = -(-max(counts) // max(1, pieces)) if max(counts) else 1
        return Route(self.strategy, str(wire).removeprefix("torch."), each, counts, self.ranks.name)

    def shares(self, weights: Tensor | None, reduction: str, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The weights of this rank's rows, of a mean over the sum of those of all ranks; and whether all of them on all
        ranks are 0, so that not even a NaN counts. None and None where there are no weights."""
        if weights is None:
            return None, None
        if weights.dtype == torch.bool or reduction == "mean":
            weights = weights.to(torch.promote_types(weights.dtype, dtype))
        name, call = self.names[0], self.comparison()
        if call.fields:
            weights = compared(
                weights, [t.detach() for t in self._travels.values()], ",".join(self._travels), *call, self.ranks.name
            )
        everyone = self.gather({f"{name} weights": weights})[f"{name} weights"]
        nobody = (everyone == 0).all()
        if reduction == "mean":
            weights = row_shares(everyone, reduction, dtype)[: weights.shape[0]]
        return weights, nobody


def _gradient_bytes(dtype: torch.dtype) -> int:
    return max(dtype.itemsize, 4)


def _bytes_of(t: Tensor, exchange: Exchange) -> int:
    """Of an element as it travels, and of its gradient."""
    wire = t.dtype.itemsize if exchange.wire is None else min(t.dtype.itemsize, exchange.wire.itemsize)
    return wire + _gradient_bytes(t.dtype)


def chosen(exchange: Exchange, ranks: int, size: int, rows: int) -> str:
    """The strategy: of "auto" one gather while the gathered embeddings and their gradients, `size` bytes, keep within
    `mib`; else a ring where it hides its hops, on one machine from RING_ROWS `rows` a rank on, if two blocks keep
    within `mib`; else chunks."""
    if exchange.strategy != "auto":
        return exchange.strategy
    limit = exchange.mib * 2**20
    if size <= limit:
        return "gather"
    local, world = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))  # torchrun's
    one_machine = local is not None and local == world
    return "ring" if one_machine and rows >= RING_ROWS and 2 * size <= ranks * limit else "chunked"


def _text(values: Mapping[str, Any]) -> str:
    return "; ".join([f"{name}={value}" for name, value in values.items()])


def dtypes(**tensors: Tensor | None) -> dict[str, str]:
    """Of what does not travel itself, but what is made of it does."""
    return {f"dtype of {name}": "none" if t is None else str(t.dtype) for name, t in tensors.items()}


def needs(**tensors: Any) -> str:
    """Which of the tensors get a gradient: the same ones on all ranks, or some would wait for the others' backward."""
    if not torch.is_grad_enabled():
        return "none"
    names = [name for name, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad]
    return " and ".join(names) or "none"
