"""lightly's losses as eager torch defines them; beside lightly itself where that is installed."""

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


def dcl(out0, out1, temperature=0.1, weight_fn=None):
    """Decoupled: the log-sum-exp over a view's negatives, less its positive similarity times a weight."""
    views = F.normalize(torch.cat((out0, out1)), dim=1)
    logits, rows = views @ views.T / temperature, torch.arange(len(views))
    positives = logits[rows, rows.roll(len(out0))]
    logits[rows, rows] = logits[rows, rows.roll(len(out0))] = -torch.inf
    a, b = views.split(len(out0))
    weights = 1 if weight_fn is None else torch.cat((weight_fn(a, b), weight_fn(b, a)))
    return (logits.logsumexp(1) - positives * weights).mean()


def distances(a, b):
    return (a - b).square().sum(1)


def test_dcl_loss():
    for draw in Draws(32):
        tensors = [draw.normal(*shape) for shape in [(draw.size(9, 32), draw.size(8, 40))] * 2]
        tensors[1] = tensors[1][:, : tensors[0].shape[1]]
        options = {"temperature": draw.one_of(0.1, 0.5, 1.0), "weight_fn": draw.one_of(None, distances)}
        theirs = functools.partial(dcl, **options)
        draw.compare(
            ours.DCLLoss(**options), theirs if ours._theirs is None else ours._theirs.DCLLoss(**options), tensors
        )


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_dclw_loss():
    for draw in Draws(16):
        shape, sigma = (draw.size(9, 32), draw.size(8, 40)), draw.one_of(0.5, 1.0)
        theirs = functools.partial(dcl, weight_fn=ours._MisesFisher(sigma))
        if ours._theirs is not None:
            theirs = ours._theirs.DCLWLoss(sigma=sigma)
        draw.compare(ours.DCLWLoss(sigma=sigma), theirs, [draw.normal(*shape), draw.normal(*shape)])
    assert isinstance(ours.DCLWLoss(), ours.DCLLoss)


def test_memory_bank():
    """Values, gradients and the bank itself, over several batches."""
    lightly = pytest.importorskip("lightly.loss")
    draw = torch.Generator().manual_seed(0)
    mine, other = (m.NTXentLoss(0.2, memory_bank_size=(24, 8)) for m in (ours, lightly))
    other.load_state_dict(mine.state_dict())
    other.memory_bank.bank.copy_(mine.memory_bank.bank)
    other.memory_bank.bank_ptr.copy_(mine.memory_bank.bank_ptr)
    for needs_gradient in (True, True, True, False, True):
        batch = torch.randn(2, 10, 8, generator=draw)
        found = []
        for loss in (mine, other):
            out0, out1 = (t.clone().requires_grad_(needs_gradient) for t in batch)
            value = loss(out0, out1)
            found.append((value.detach(), *(torch.autograd.grad(value, (out0, out1)) if needs_gradient else ())))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(mine.memory_bank.bank, other.memory_bank.bank)
        assert torch.equal(mine.memory_bank.bank_ptr, other.memory_bank.bank_ptr)


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
