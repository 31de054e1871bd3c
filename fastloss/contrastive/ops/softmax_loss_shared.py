"""The op of the plain loss whose negatives [K, D] all rows share and nobody learns: a bank, in one call.

    s_ij   = scale fixed_scale c(query_i) c(n_j) <query_i, n_j>      c(x) = 1 / |x| with `normalize` (0 for zero
                                                                     vectors), else 1; no `scale`: 1
    p_i    = scale fixed_scale c(query_i) c(key_i) <query_i, key_i>  the positive
    n_i    = log sum_j e^s_ij over the negatives j, without those of column_ids_j == row_ids_i, where ids are given
    loss_i = softplus(n_i - p_i)                             without `include_positive`: n_i - p_i; no negatives: 0
    out    = row_weight_i loss_i [M], their sum or mean      by `reduction`: "none", "sum", "mean"; no `row_weight`: 1
             rows of weight 0 are left out: nothing of them is multiplied, be it NaN

The gradients are those of :mod:`softmax_loss_per_query`, with t_i = sum_j e^(s_ij - n_i) c(n_j) n_j, the weighted keys,
which the forward makes in the same pass over the negatives as n_i. `needs` says what will be differentiated, in bits:
QUERY, KEY, SCALE; the forward makes these gradients, of each row's loss, in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core import Op, reduce, result_dtype
from ..embeddings import embed
from ..options import SoftmaxOptions
from ..row_losses import row_losses, statistics
from ..save_plan import KEY, QUERY, SCALE


class Inputs(NamedTuple):
    """Of the op; what each is stands above."""

    query: Tensor  # [M, D]
    key: Tensor  # [M, D]
    negatives: Tensor  # [K, D]
    scale: Tensor | None  # one element
    row_weight: Tensor | None  # [M]
    row_ids: Tensor | None  # [M] int64, both or neither
    column_ids: Tensor | None  # [K] int64
    fixed_scale: float
    include_positive: bool
    normalize: bool
    reduction: str
    needs: int
    workspace_mib: float


class Saved(NamedTuple):
    """Of each row's loss; empty where it is not needed."""

    query_grad: Tensor  # [M, D]
    key_grad: Tensor  # [M, D]
    scale_grad: Tensor  # [M], row by row


class Grads(NamedTuple):
    query: Tensor
    key: Tensor
    scale: Tensor


class Needs(NamedTuple):
    query: bool
    key: bool
    scale: bool


def softmax_loss_shared_reference(x: Inputs) -> Tensor:
    """The loss in dense differentiable torch."""
    dtype = result_dtype(x.query, x.key, x.negatives)
    weight = x.query.new_ones(x.query.shape[0]) if x.row_weight is None else x.row_weight
    dropped = (weight == 0)[:, None]
    query, key = (t.masked_fill(dropped, 0.0) for t in (x.query, x.key))
    anchor = embed(query, dtype, x.normalize) * x.fixed_scale
    if x.scale is not None:
        anchor = anchor * x.scale.reshape(())
    positive = (anchor * embed(key, dtype, x.normalize)).sum(1)
    logits = anchor @ embed(x.negatives, dtype, x.normalize).T
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if x.row_ids is not None and x.column_ids is not None:
        allowed = x.row_ids[:, None] != x.column_ids
    stats = statistics(logits, allowed, False, 0.0)
    loss = row_losses(positive, stats, x.fixed_scale, SoftmaxOptions(x.include_positive)).loss
    return reduce(loss if x.row_weight is None else loss * x.row_weight, x.reduction)


def _softmax_loss_shared_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    rows, dim = x.query.shape
    like = x.query.new_empty(0, dtype=torch.float32)
    return like.new_empty(rows if x.reduction == "none" else ()), Saved(
        query_grad=like.new_empty(rows if x.needs & QUERY else 0, dim),
        key_grad=like.new_empty(rows if x.needs & KEY else 0, dim),
        scale_grad=like.new_empty(rows if x.needs & SCALE else 0),
    )


def _softmax_loss_shared_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    return Grads(
        query=x.query.new_empty(x.query.shape if needs.query else 0),
        key=x.key.new_empty(x.key.shape if needs.key else 0),
        scale=grad.new_empty(0) if x.scale is None or not needs.scale else x.scale.new_empty(x.scale.shape),
    )


softmax_loss_shared = Op(
    "softmax_loss_shared",
    fwd=_softmax_loss_shared_fwd,
    bwd=_softmax_loss_shared_bwd,
    reference=softmax_loss_shared_reference,
    grads=Grads._fields,
    outputs=("out", *Saved._fields),
    triton="contrastive.kernels.softmax_loss_shared",
)
