"""lightly's NTXentLoss, DCLLoss and DCLWLoss (lightly 1.5), by :func:`fastloss.nt_xent_loss`.

A memory bank stays lightly's, and its rows are the negatives of :func:`fastloss.info_nce`. Batches gathered from
several processes are those of the default group: a rank's value is that of its own rows. Where lightly is installed the
classes are subclasses of its classes; else they stand alone, without a memory bank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contrastive import info_nce, nt_xent_loss
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
        if bank > 0 and memory is self:
            raise NotServed("memory_bank_size: a memory bank")
        check_plain(out0, out1)
        if bank == 0:
            return as_theirs(_rows(self, out0, out1).mean(), out0, out1)
        if self.temperature < 0 or out0.shape != out1.shape or out0.shape[1:] != memory.size[1:]:
            raise NotServed(f"temperature {self.temperature!r}, embeddings {tuple(out0.shape)}, {tuple(out1.shape)}")
        query, key = F.normalize(out0), F.normalize(out1)
        key, negatives = memory(key, update=query.requires_grad)
        rows = negatives.T.to(query)
        loss = info_nce(query, key, rows, temperature=self.temperature, normalize=False)
        return as_theirs(loss, out0, out1)


class _DCLAlone(nn.Module):
    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed


class _MisesFisher:
    """DCLW's weights: 2 less M times the softmax of the positive similarities over `sigma`, without a gradient."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(self, out0: Tensor, out1: Tensor) -> Tensor:
        return 2 - len(out0) * torch.softmax((out0 * out1).sum(1).detach() / self.sigma, 0)


class _DCLWAlone(_DCLAlone):
    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
        super().__init__(temperature, _MisesFisher(sigma), gather_distributed)


_DCLBase: Any = _DCLAlone if _theirs is None else _theirs.DCLLoss
_DCLWBase: Any = _DCLWAlone if _theirs is None else _theirs.DCLWLoss


class DCLLoss(_DCLBase):
    """lightly's module: as :class:`NTXentLoss`, the positive left out of the sum, and weighted by `weight_fn`.

    ``weight_fn(view, other_view)`` gets the unit embeddings, and gives a weight for the positive of each sample.
    """

    @hands_on("lightly.DCLLoss", None if _theirs is None else _theirs.DCLLoss.forward)
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        check_plain(out0, out1)
        if len(out0) < 2 and _group(self) is None:
            raise NotServed("out0: one sample has no negatives")
        if not self.weight_fn:
            return as_theirs(_rows(self, out0, out1, include_positive=False).mean(), out0, out1)
        if self.temperature < 0:  # before weight_fn, which may draw numbers
            raise NotServed(f"temperature {self.temperature!r}")
        lse = _rows(self, out0, out1, include_positive=False, return_lse=True).lse
        views = F.normalize(out0), F.normalize(out1)
        positives = (views[0].to(lse.dtype) * views[1].to(lse.dtype)).sum(1) / self.temperature
        weights = self.weight_fn(*views) + self.weight_fn(*views[::-1])
        return as_theirs(lse.mean() - (positives * weights).mean() / 2, out0, out1)


class DCLWLoss(_DCLWBase, DCLLoss):
    """lightly's module: :class:`DCLLoss` with weights that are smaller the nearer the two views are."""


def _rows(loss: Any, out0: Tensor, out1: Tensor, **options: Any) -> Any:
    """The losses of this process's views among those of all processes that are gathered."""
    return nt_xent_loss(out0, out1, temperature=loss.temperature, reduction="none", group=_group(loss), **options)


def _group(loss: Any) -> Any:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    gathers = loss.gather_distributed and several and torch.distributed.get_world_size() > 1
    return torch.distributed.group.WORLD if gathers else None


SWAPS = {
    "lightly.loss.NTXentLoss": NTXentLoss,
    "lightly.loss.DCLLoss": DCLLoss,
    "lightly.loss.DCLWLoss": DCLWLoss,
}
LEFT: dict[str, str] = {}
