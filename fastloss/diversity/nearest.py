"""The nearest row of a bank: its distance and its number, without the matrix of all distances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Op, result_dtype
from .distances import Bank, nearest_row, paired_distances, search_dtype


class Inputs(NamedTuple):
    """Of the op. The kernels read the bank in tiles, and compute the winner's distance by direct differences."""

    generated: Tensor  # [N, P], float32 or float64
    bank: Tensor  # [M, P], floating point or uint8, M and P >= 1
    metric: str  # "l1", "l2" or "cosine"
    scale: float  # a row of the bank is scale * row + shift
    shift: float
    workspace_mib: float  # bound of the temporaries


class Nearest(NamedTuple):
    """What the forward gives: distances, which are means over the elements of a row, and where they are."""

    distance: Tensor  # [N]
    row: Tensor  # [N] int64, of equally near rows the first


class Row(NamedTuple):
    """What the backward needs of it."""

    row: Tensor  # [N]


class Grads(NamedTuple):
    generated: Tensor  # [N, P]


class Needs(NamedTuple):
    generated: bool


def nearest_with_row(x: Inputs) -> Nearest:
    """The definition: a search without a graph, then the differentiable distance of the one row that won."""
    generated = x.generated.to(result_dtype(x.generated, x.bank))
    bank = Bank(x.bank, x.scale, x.shift)
    index = nearest_row(generated, bank, x.metric, int(x.workspace_mib * 2**20))
    return Nearest(paired_distances(generated, bank.at(index), x.metric), index)


def nearest_reference(x: Inputs) -> Tensor:
    return nearest_with_row(x).distance


def _nearest_fwd(x: Inputs) -> Nearest:
    count = x.generated.shape[:1]
    return Nearest(x.generated.new_empty(count), x.generated.new_empty(count, dtype=torch.int64))


def _nearest_bwd(grad: Tensor, x: Inputs, nearest: Row, needs: Needs) -> Grads:
    return Grads(torch.empty_like(x.generated) if needs.generated else x.generated.new_empty(0))


nearest = Op(
    "nearest",
    fwd=_nearest_fwd,
    bwd=_nearest_bwd,
    reference=nearest_reference,
    grads=Grads._fields,
    outputs=Nearest._fields,
    triton="diversity.kernels.nearest",
)


def nearest_in_pieces(generated: Tensor, bank: Bank, metric: str, workspace: int) -> Nearest:
    """The search of a bank that lies elsewhere, or not row by row: pieces of it come to the device of the images
    [N,P], each in half of the workspace. No graph holds a piece: the winners are fetched once more at the end."""
    best, first, half = None, 0, workspace // 2
    with torch.no_grad():
        for piece in bank.pieces(generated, half):
            x = Inputs(generated.detach(), piece.rows, metric, bank.scale, bank.shift, half / 2**20)
            found = nearest_with_row(x) if nearest.backend(*x) == "reference" else Nearest(*nearest.fwd(*x))
            found = found._replace(row=found.row + first)
            best = found if best is None else _nearer(best, found)
            first += piece.rows.shape[0]
    assert best is not None
    exact = generated.to(search_dtype(generated, metric))  # of cosine; differences are exact enough
    distance = paired_distances(exact, bank.at(best.row), metric).to(generated.dtype)
    return Nearest(distance, best.row)


def _nearer(best: Nearest, other: Nearest) -> Nearest:
    """Of equally near rows that of `best`, which come before; a NaN is nearest."""
    nearer = (other.distance < best.distance) | (other.distance.isnan() & ~best.distance.isnan())
    return Nearest(*(torch.where(nearer, new, old) for new, old in zip(other, best, strict=True)))
