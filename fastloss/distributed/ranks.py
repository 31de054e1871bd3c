"""The ranks of a group: what a loss gathers from them, and the sums over all of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..core import check_not_empty, row_shares
from .agreement import Call, agree
from .collectives import Counts, described, gather_rows, replicated, sum_over_ranks
from .exchange import Exchange


def process_group(group: Any) -> Any:
    if isinstance(group, dist.ProcessGroup):
        return group
    if not isinstance(group, DeviceMesh):
        raise TypeError(f"group: expected a ProcessGroup or a 1-D DeviceMesh, got {type(group).__name__}")
    if group.ndim != 1:
        raise ValueError(f"group: expected a 1-D DeviceMesh, got {group.ndim} dimensions; pass mesh['dp']")
    return group.get_group()


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
        if not isinstance(exchange.rows, str) and len(exchange.rows) != size:
            raise ValueError(f"rows: expected one number per rank, {size} of them, got {len(exchange.rows)}")
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
    ) -> tuple[dict[str, Tensor], Counts]:
        """The tensors with the rows of all ranks, this rank's own first, and how many rows each rank has.

        Before that the ranks compare what is to be the `same`, the options that are floats (`numbers`), and their
        `sizes`. The first word of a tensor's name is the size that its rows have; None does not travel. `rows_each`:
        rows that each one of a list of rows stands for.
        """
        there = {name: t for name, t in tensors.items() if t is not None}
        order = list(sizes)
        kinds = [order.index(name.split()[0]) for name in there]
        rows, given = self.exchange.rows, list(sizes.values())
        counts = [size for size in given for _ in range(self.size)]
        if not isinstance(rows, str):
            own = [rows_each * count for count in rows]
            counts = [n for name in order for n in (own if name != "negatives" else [sizes[name]] * self.size)]
            rows = ",".join([str(n) for n in own])
        exchange = {name: getattr(self.exchange, name) for name in ("strategy", "wire", "gradients", "negatives")}
        fields = _text(dict(same) | exchange)
        floats, size_names, to_compare = "", ",".join(order), fields
        if not torch.compiler.is_compiling():
            floats = _text(numbers)
            known = agree(
                Call(f"{fields}; {described(there, there.values())}", floats, size_names, given, rows), self.group
            )
            to_compare = ""
            if rows == "uneven":
                counts = [sizes_of_rank[kind] for kind in range(len(order)) for sizes_of_rank in known]
        elif rows == "uneven":
            raise ValueError(
                "rows: 'uneven' cannot be compiled, as the ranks' numbers of rows would have to be read; "
                "pass a list of them, or 'equal'"
            )
        everyone: Sequence[Tensor] = []
        if there:
            wire = self.exchange.wire is not None
            everyone = gather_rows(
                list(there.values()),
                kinds,
                given,
                counts,
                wire,
                ",".join(there),
                to_compare,
                floats,
                size_names,
                rows,
                self.name,
            )
        return dict(zip(there, everyone, strict=True)), Counts(counts, self.size)

    def shares(self, weights: Tensor | None, reduction: str, dtype: torch.dtype, counts: Counts) -> Tensor | None:
        """The weights of this rank's rows, of a mean over the sum of those of all ranks."""
        if weights is None or reduction != "mean":
            return weights
        weights = weights.to(torch.promote_types(weights.dtype, dtype))
        own, of_ranks = [weights.shape[0]], counts.of(0)
        (everyone,) = gather_rows([weights], [0], own, of_ranks, False, "", "", "", "", "", self.name)
        return row_shares(everyone, reduction, dtype)[: weights.shape[0]]

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


def _text(values: Mapping[str, Any]) -> str:
    return "; ".join([f"{name}={value}" for name, value in values.items()])


def needs(**tensors: Any) -> str:
    """Which of the tensors get a gradient: the same ones on all ranks, or some would wait for the others' backward."""
    if not torch.is_grad_enabled():
        return "none"
    names = [name for name, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad]
    return " and ".join(names) or "none"
