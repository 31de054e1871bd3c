"""The memory bank: embeddings of earlier batches as further negatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.checks import check_integer, check_same_device, check_tensor
from .exchange import Exchange

if TYPE_CHECKING:
    from .exchange import Group


class MemoryBank(nn.Module):
    r"""The last `size` embeddings that were pushed, with their ids: more negatives than a batch has.

    ::

        bank = MemoryBank(65536, 512)
        negatives, ids = bank.stored()                                   # of earlier steps, [K, D] and [K]
        loss = info_nce(query, key, negatives, in_batch=True, query_ids=own, key_ids=torch.cat((own, ids)))
        bank.push(key.detach(), own)

    The oldest rows are written over first; of a push of more than `size` rows the last `size` stay. Embeddings and ids
    are buffers, and the state_dict has the number of rows pushed too, so that a resumed run goes on where it was.

    With a `group` each push gathers the rows of all ranks, whose numbers may differ, in the order of the ranks. So the
    bank is the same on all of them, and DDP, which overwrites buffers by those of rank 0, changes nothing. Its rows are
    then negatives that do not travel: ``exchange=Exchange(negatives="replicated")``. Without a group it holds the rows
    of this rank alone, which DDP would overwrite: keep such a bank outside of the module that DDP wraps.

    Args:
        size: rows, >= 1.
        dim: D, >= 1.
        group: a ProcessGroup or a 1-D DeviceMesh; None: this process alone.

    Raises:
        TypeError, ValueError: sizes, shapes, dtypes or devices that do not fit.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", 2018; He et al.,
    "Momentum contrast", 2020 (a queue).

    Example:
        >>> bank = MemoryBank(3, 2)
        >>> bank.push(torch.arange(8.0).view(4, 2))
        >>> bank.stored()[0].tolist()
        [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    """

    emb: Tensor  # [size, D]
    ids: Tensor  # [size]

    def __init__(self, size: int, dim: int, group: Group = None) -> None:
        super().__init__()
        self.size, dim, self.group = check_integer("size", size, 1), check_integer("dim", dim, 1), group
        self.register_buffer("emb", torch.zeros(self.size, dim, dtype=torch.float32))
        self.register_buffer("ids", torch.full((self.size,), -1, dtype=torch.int64))
        self.pushed = 0  # rows in all; on the host, so that no push waits for a device

    def get_extra_state(self) -> dict[str, int]:
        return {"pushed": self.pushed}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.pushed = state["pushed"]

    def extra_repr(self) -> str:
        return f"{self.size}, {self.emb.shape[1]}, pushed={self.pushed}"

    def stored(self) -> tuple[Tensor, Tensor]:
        """Embeddings [K, D] and ids [K] of the min(size, pushed) rows there are, in no particular order.

        Copies, as `push` writes in place while a backward may still need them.
        """
        filled = min(self.pushed, self.size)
        return self.emb[:filled].clone(), self.ids[:filled].clone()

    @torch.no_grad()
    def push(self, emb: Tensor, ids: Tensor | None = None) -> None:
        """Adds the rows `emb` [M, D], in the bank's dtype, and their integer `ids` [M]; -1 where there are none."""
        check_tensor("emb", emb, 2)
        if emb.shape[1] != self.emb.shape[1]:
            raise ValueError(f"emb: expected embeddings [M, {self.emb.shape[1]}], got shape {tuple(emb.shape)}")
        check_same_device("the bank", self.emb, "emb", emb)
        if ids is None:
            ids = self.ids.new_full((emb.shape[0],), -1)
        elif ids.shape != emb.shape[:1] or ids.is_floating_point():
            raise ValueError(f"ids: expected integers [{emb.shape[0]}], got {ids.dtype} {tuple(ids.shape)}")
        emb, ids = emb.to(self.emb.dtype), ids.to(self.ids)
        if self.group is not None:
            emb, ids = self._of_all_ranks(emb, ids)
        rows = emb.shape[0]
        kept = torch.arange(max(0, rows - self.size), rows, device=emb.device)
        place = (kept + self.pushed) % self.size
        self.emb[place], self.ids[place] = emb[kept], ids[kept]
        self.pushed += rows

    def _of_all_ranks(self, emb: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of all ranks in the order of the ranks."""
        from .ranks import Ranks

        ranks = Ranks.of(self.group, Exchange(rows="uneven"))
        sizes, tensors = {"emb": emb.shape[0]}, {"emb": emb, "emb ids": ids}
        meeting = ranks.meet({"call": "MemoryBank.push"}, {}, sizes, tensors)
        found, counts = meeting.gather(tensors), meeting.counts
        own, world = ranks.group.rank(), ranks.size
        order = [(own + hop) % world for hop in range(world)]  # in which they came
        of_ranks = [counts.of(0)[rank] for rank in order]
        blocks = [found[name].split(of_ranks) for name in ("emb", "emb ids")]
        back = [order.index(rank) for rank in range(world)]
        one, two = (torch.cat([each[i] for i in back]) for each in blocks)
        return one, two
