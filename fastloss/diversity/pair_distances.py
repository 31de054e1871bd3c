"""Distances of the rows of a batch from one another, without their differences in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import Op
from .distances import Bank, chunk_distances, chunks, of_chunks

_WORKSPACE = 256 * 2**20  # bytes of differences at a time, or one row's, where PyTorch operators compute them


class Inputs(NamedTuple):
    x: Tensor  # [N, P], float32 or float64, N and P >= 1
    metric: str  # "l1" or "l2": means over a row's elements of |a - b|, or (a - b)^2


class Grads(NamedTuple):
    x: Tensor  # [N, P]


class Needs(NamedTuple):
    x: bool


def pair_distances_reference(x: Inputs) -> Tensor:
    """[N, N]; differences come a chunk at a time, and again in the backward."""
    parts = chunks(x.x, Bank(x.x, 1.0, 0.0), x.metric, _WORKSPACE)
    return torch.cat(of_chunks(chunk_distances, x.x, parts, x.metric), 1)


def _pair_distances_fwd(x: Inputs) -> Tensor:
    return x.x.new_empty(x.x.shape[0], x.x.shape[0])


def _pair_distances_bwd(grad: Tensor, x: Inputs, needs: Needs) -> Grads:
    return Grads(x.x.new_empty(x.x.shape if needs.x else 0))


pair_distances = Op(
    "pair_distances",
    fwd=_pair_distances_fwd,
    bwd=_pair_distances_bwd,
    reference=pair_distances_reference,
    grads=Grads._fields,
    triton="diversity.kernels.pair_distances",
)
