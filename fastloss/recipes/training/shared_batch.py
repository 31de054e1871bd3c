"""The batch that the ranks of a run share: means over all of its rows, and rows of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ... import Exchange
from .world import World

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name since torch 2.14


class SharedBatch:
    """A global batch of so many rows, whose :meth:`World.own` each rank has. Gradients follow the rule of the losses
    with a `group`: DDP's average over the ranks leaves those of the whole batch."""

    def __init__(self, world: World, rows: int) -> None:
        self.world, self.rows, self.counts = world, rows, world.counts(rows)
        #: for the losses with a `group`; the memory bank is the same on all ranks
        self.exchange = Exchange(rows=self.counts, negatives="replicated")

    def means(self, own: Tensor) -> Tensor:
        """Means over the whole batch, from those over this rank's rows."""
        part = own * (self.counts[self.world.rank] / self.rows)
        total = part.detach().clone()
        dist.all_reduce(total, group=self.world.group)
        return total + self.world.size * (part - part.detach())

    @torch.no_grad()
    def everyone(self, x: Tensor) -> Tensor:
        """The rows of all ranks in the order of the batch, without a gradient."""
        most = max(self.counts)
        padded = torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:])))
        gathered = x.new_empty(most * self.world.size, *x.shape[1:])
        _all_gather(gathered, padded, group=self.world.group)
        blocks = gathered.split(most)
        return torch.cat([block[:count] for block, count in zip(blocks, self.counts, strict=True)])
