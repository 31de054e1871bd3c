"""The memory bank: what it keeps, what a state_dict restores."""

from __future__ import annotations

import pytest
import torch

from fastloss import MemoryBank


def rows(first: int, last: int) -> torch.Tensor:
    """Row i holds i twice."""
    return torch.arange(first, last, dtype=torch.float32)[:, None].repeat(1, 2)


def kept(bank: MemoryBank) -> list[int]:
    emb, ids = bank.stored()
    assert torch.equal(emb[:, 0].long(), ids) and torch.equal(emb[:, 0], emb[:, 1])
    return sorted(ids.tolist())


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 12])
def test_it_keeps_the_last_rows_whatever_the_batch(batch):
    bank = MemoryBank(5, 2)
    assert bank.stored()[0].shape == (0, 2)
    for start in range(0, 36, batch):
        bank.push(rows(start, start + batch), torch.arange(start, start + batch))
        assert kept(bank) == list(range(max(0, start + batch - 5), start + batch))


def test_a_state_dict_goes_on_where_it_was():
    one, two = MemoryBank(5, 2), MemoryBank(5, 2)
    one.push(rows(0, 3), torch.arange(3))
    two.load_state_dict(one.state_dict())
    for bank in (one, two):
        bank.push(rows(3, 7), torch.arange(3, 7))
    assert kept(one) == kept(two) == [2, 3, 4, 5, 6]
    assert torch.equal(one.emb, two.emb)


def test_what_is_stored_is_a_copy_in_the_banks_dtype_without_a_graph():
    bank = MemoryBank(3, 2).to(torch.bfloat16)
    bank.push(torch.ones(2, 2, requires_grad=True))
    emb, ids = bank.stored()
    bank.push(torch.zeros(3, 2))
    assert emb.dtype == torch.bfloat16 and not emb.requires_grad and bool((emb == 1).all())
    assert ids.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: MemoryBank(0, 2), ValueError, "size: expected a whole number from 1"),
        (lambda: MemoryBank(2, 2.5), TypeError, "dim: expected a whole number"),
        (lambda: MemoryBank(2, 2).push(torch.ones(2, 3)), ValueError, r"emb: expected embeddings \[M, 2\]"),
        (lambda: MemoryBank(2, 2).push(torch.ones(2)), ValueError, "emb: expected a 2-D tensor"),
        (
            lambda: MemoryBank(2, 2).push(torch.ones(2, 2), torch.ones(3).long()),
            ValueError,
            r"ids: expected integers \[2\]",
        ),
        (lambda: MemoryBank(2, 2, group="all").push(torch.ones(1, 2)), TypeError, "group: expected a ProcessGroup"),
    ],
)
def test_what_it_refuses(call, error, said):
    with pytest.raises(error, match=said):
        call()
