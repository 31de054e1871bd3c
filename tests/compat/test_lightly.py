"""lightly's NTXentLoss as eager torch defines it; beside lightly itself where that is installed."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from fastloss.compat import lightly as ours
from tests.compat.tools import Draws


def nt_xent(out0, out1, temperature=0.5):
    """Cross entropy of each view's similarities to all the other views, whose label is the other view of its image."""
    views = F.normalize(torch.cat((out0, out1)), dim=1)
    logits = (views @ views.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(views)).roll(len(out0)))


def test_nt_xent_loss():
    for draw in Draws(48):
        rows, dim, temperature = draw.size(9, 32), draw.size(8, 40), draw.one_of(0.1, 0.5, 1.0)
        loss = ours.NTXentLoss(temperature, gather_distributed=draw.one_of(True, False))
        tensors = [draw.normal(rows, dim), draw.normal(rows, dim)]
        theirs = functools.partial(nt_xent, temperature=temperature)
        draw.compare(loss, theirs if ours._theirs is None else ours._theirs.NTXentLoss(temperature), tensors)


def test_attributes_and_errors():
    loss = ours.NTXentLoss()
    assert (loss.temperature, loss.gather_distributed, loss.eps) == (0.5, False, 1e-8)
    with pytest.raises(ValueError):
        ours.NTXentLoss(temperature=1e-9)
    if ours._theirs is None:
        for size in (8, (8, 4)):
            with pytest.raises(NotImplementedError, match="lightly.NTXentLoss: memory_bank_size: a memory bank"):
                ours.NTXentLoss(memory_bank_size=size)(torch.randn(2, 4), torch.randn(2, 4))
        with pytest.raises(ValueError, match="view_b"):
            loss(torch.randn(2, 4), torch.randn(3, 4))
