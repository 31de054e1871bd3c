"""lightly's NTXentLoss (lightly 1.5), by :func:`fastloss.nt_xent_loss`.

A memory bank, and batches gathered from several processes, are lightly's own code's. Where lightly is installed the
class is a subclass of its class; else it stands alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..contrastive import nt_xent_loss
from ._common import NotServed, as_theirs, check_plain, hands_on, library

_theirs = library("lightly.loss")


class _NTXentAlone(nn.Module):
    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | tuple = 0, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        self.size = memory_bank_size
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.cross_entropy = nn.CrossEntropyLoss(reduction="mean")
        self.eps = 1e-8
        if abs(temperature) < self.eps:
            raise ValueError(f"temperature: expected at least {self.eps} in size, got {temperature}")


_Base: Any = _NTXentAlone if _theirs is None else _theirs.NTXentLoss


class NTXentLoss(_Base):
    """lightly's module: each view of each image must find its other view among all the other views of the batch."""

    @hands_on("lightly.NTXentLoss", None if _theirs is None else _theirs.NTXentLoss.forward)
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        memory: Any = getattr(self, "memory_bank", self)  # in older versions the loss itself is the memory bank
        bank, *_ = memory.size if isinstance(memory.size, (tuple, list)) else (memory.size,)
        if bank > 0:
            raise NotServed("memory_bank_size: a memory bank")
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.gather_distributed and several and torch.distributed.get_world_size() > 1:
            raise NotServed("gather_distributed: several processes")
        check_plain(out0, out1)
        return as_theirs(nt_xent_loss(out0, out1, temperature=self.temperature), out0, out1)


SWAPS = {"lightly.loss.NTXentLoss": NTXentLoss}
LEFT = {
    "lightly.loss.DCLLoss": "no drop-in yet",
    "lightly.loss.DCLWLoss": "no drop-in yet",
}
