"""Distances of images from a bank whose rows lie on several ranks.

The images travel, the bank stays: each rank has the images of all ranks, compares them with its own rows, and sends
what it found to the ranks whose images they are: a distance, and the number of the nearest row where it is asked for.
These put the ranks' answers together. Gradients go the same way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import result_dtype
from ..diversity.bank_distance import merged
from ..diversity.distances import Bank
from ..diversity.diversity import Search
from ..diversity.nearest import Nearest
from .collectives import rows_to_owners
from .exchange import Exchange
from .ranks import Meeting, Ranks, needs


def distances_of_all(
    generated: Tensor,
    bank: Bank,
    search: Search,
    distances: Callable[[Tensor, Bank, Search], Nearest],
    options: dict[str, Any],
    group: Any,
    exchange: Any,
) -> tuple[Nearest, Meeting]:
    """The distances of this rank's images [N,P] from the rows of all ranks, whose numbers go on from rank to rank.
    `options`: what else is to be the same on all ranks."""
    ranks = Ranks.of(group, Exchange(rows="uneven") if exchange is None else exchange)
    _check_exchange(ranks.exchange)
    rows = bank.rows.shape[0]
    same = {
        "loss": "diversity_loss", "mode": search.mode, "metric": search.metric, "return_nearest": search.with_row,
        "reduction": options["reduction"], "dtype": result_dtype(generated, bank.rows),
        "gradients of": needs(generated=generated),
    }  # fmt: skip
    numbers = {"margin": options["margin"], "temperature": search.temperature}
    sizes = {"generated": generated.shape[0], "bank": rows}
    meeting = ranks.meet(same, numbers, sizes, {"generated": generated})
    of_ranks = meeting.counts_of("bank")
    if sum(of_ranks) == 0:
        raise ValueError(f"bank: expected at least one image on one of the ranks, got {of_ranks}")
    everyone = meeting.gather({"generated": generated})["generated"]
    if rows:
        made = distances(everyone, bank, search)
    else:  # a distance that depends on the images, for the other ranks' backward waits for this one's
        nothing = everyone[:, :0].sum(1, dtype=same["dtype"])
        made = Nearest(nothing, torch.zeros_like(nothing, dtype=torch.int64))
    there = [rank for rank, count in enumerate(of_ranks) if count]
    distance = _brought_home(made.distance, meeting)[there]
    if search.mode == "nearest":
        row = _brought_home(made.row, meeting)[there] if search.with_row else distance.detach().long()
        first = [sum(of_ranks[:rank]) for rank in there]
        return _nearest(distance, row, first), meeting
    shares = [of_ranks[rank] / sum(of_ranks) for rank in there]
    whole = merged(distance.unbind(), shares, search.mode, search.temperature)
    return Nearest(whole, whole), meeting


def _check_exchange(exchange: Exchange) -> None:
    for name, value, taken in (
        ("strategy", exchange.strategy, ("auto", "gather")),
        ("wire", exchange.wire, (None,)),
        ("negatives", exchange.negatives, ("sharded",)),
    ):
        if value not in taken:
            raise ValueError(f"exchange: expected {name}={taken[-1]!r} with diversity_loss, got {value!r}")


def _brought_home(made: Tensor, meeting: Meeting) -> Tensor:
    """[W, N]: what each rank, in their order, has made for this rank's images, of `made` for the images of all."""
    counts, world = meeting.counts_of("generated"), meeting.ranks.size
    parts = rows_to_owners(made.contiguous(), counts[meeting.rank], counts, meeting.ranks.name)
    return parts[[(rank - meeting.rank) % world for rank in range(world)]]


def _nearest(distance: Tensor, row: Tensor, first: list[int]) -> Nearest:
    """Of equally near rows the first, and a NaN is the nearest, as in a bank in one place."""
    winner = distance.detach().argmin(0, keepdim=True)
    row = torch.stack([each + start for each, start in zip(row.unbind(), first, strict=True)])
    return Nearest(distance.gather(0, winner)[0], row.gather(0, winner)[0])
