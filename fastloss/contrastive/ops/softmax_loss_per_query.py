"""The op of the plain loss whose negatives [M, K, D] are each row's own: one call from embeddings to loss.

    s_ik   = scale fixed_scale c(query_i) c(n_ik) <query_i, n_ik>    c(x) = 1 / |x| with `normalize` (0 for zero
                                                                     vectors), else 1; no `scale`: 1
    p_i    = scale fixed_scale c(query_i) c(key_i) <query_i, key_i>  the positive
    n_i    = log sum_k e^s_ik
    loss_i = softplus(n_i - p_i)                             without `include_positive`: n_i - p_i; no negatives: 0
             negatives outside `mask` are left out of the sum, and nothing of them is read
    out    = row_weight_i loss_i [M], their sum or mean      by `reduction`: "none", "sum", "mean"; no `row_weight`: 1
             rows of weight 0 are left out: nothing of them is multiplied, be it NaN

With w_i = d out / d loss_i, g_i = w_i sigmoid(n_i - p_i) (without `include_positive`: w_i),
r_i = scale fixed_scale c(query_i) and t_i = sum_k e^(s_ik - n_i) c(n_ik) n_ik, which is summed in the forward's one
read of the negatives:

    u_i       = g_i (t_i - c(key_i) key_i)
    d query_i = r_i (u_i - c(query_i)^2 <query_i, u_i> query_i)   without `normalize`: r_i u_i
    d key_i   = -g_i r_i c(key_i) (query_i - c(key_i)^2 <query_i, key_i> key_i)
    d scale   = sum_i r_i <query_i, u_i> / scale
    d n_ik    = as in :mod:`softmax_stats_per_query`, of G_ik = g_i e^(s_ik - n_i)

`needs` says what will be differentiated, in bits: QUERY, KEY, SCALE, NEGATIVES. The forward makes the first three
gradients, of each row's loss, in float32; for the last it keeps the logits and c(n_ik), M K floats each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core import Op, reduce, result_dtype
from ..embeddings import embed
from ..options import SoftmaxOptions
from ..row_losses import row_losses, statistics
from ..save_plan import KEY, NEGATIVES, QUERY, SCALE
from .softmax_stats_per_query import why_not


class Inputs(NamedTuple):
    """Of the op; what each is stands above."""

    query: Tensor  # [M, D]
    key: Tensor  # [M, D]
    negatives: Tensor  # [M, K, D]
    mask: Tensor | None  # [M, K] bool
    scale: Tensor | None  # one element
    row_weight: Tensor | None  # [M]
    fixed_scale: float
    include_positive: bool
    normalize: bool
    reduction: str
    needs: int


class Saved(NamedTuple):
    """The first three are empty where the negatives need no gradient, the others where theirs is not needed."""

    stats: Tensor  # [4, M]: n, the maxima, p and r
    logits: Tensor  # [M, K]
    inverse_norms: Tensor  # [M, K]: c of the negatives
    query_grad: Tensor  # [M, D]
    key_grad: Tensor  # [M, D]
    scale_grad: Tensor  # [M], row by row


class Grads(NamedTuple):
    query: Tensor
    key: Tensor
    negatives: Tensor
    scale: Tensor


class Needs(NamedTuple):
    query: bool
    key: bool
    negatives: bool
    scale: bool


def softmax_loss_per_query_reference(x: Inputs) -> Tensor:
    """The loss in dense differentiable torch."""
    dtype = result_dtype(x.query, x.key, x.negatives)
    weight = x.query.new_ones(x.query.shape[0]) if x.row_weight is None else x.row_weight
    dropped = (weight == 0)[:, None]
    query, key, negatives = (
        t.masked_fill(mask, 0.0) for t, mask in ((x.query, dropped), (x.key, dropped), (x.negatives, dropped[:, None]))
    )
    anchor = embed(query, dtype, x.normalize) * x.fixed_scale
    if x.scale is not None:
        anchor = anchor * x.scale.reshape(())
    positive = (anchor * embed(key, dtype, x.normalize)).sum(1)
    if x.mask is not None:
        negatives = negatives.masked_fill(~x.mask[:, :, None], 0.0)
    logits = torch.bmm(embed(negatives, dtype, x.normalize), anchor[:, :, None]).squeeze(2)
    allowed = torch.ones_like(logits, dtype=torch.bool) if x.mask is None else x.mask
    stats = statistics(logits, allowed, False, 0.0)
    loss = row_losses(positive, stats, x.fixed_scale, SoftmaxOptions(x.include_positive)).loss
    return reduce(loss if x.row_weight is None else loss * x.row_weight, x.reduction)


def _softmax_loss_per_query_fwd(x: Inputs) -> tuple[Tensor, Saved]:
    rows, count, dim = x.negatives.shape
    like = x.query.new_empty(0, dtype=torch.float32)
    saved_rows = rows if x.needs & NEGATIVES else 0
    return like.new_empty(rows if x.reduction == "none" else ()), Saved(
        stats=like.new_empty(4, saved_rows),
        logits=like.new_empty(saved_rows, count),
        inverse_norms=like.new_empty(saved_rows, count),
        query_grad=like.new_empty(rows if x.needs & QUERY else 0, dim),
        key_grad=like.new_empty(rows if x.needs & KEY else 0, dim),
        scale_grad=like.new_empty(rows if x.needs & SCALE else 0),
    )


def _softmax_loss_per_query_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    return Grads(
        query=x.query.new_empty(x.query.shape if needs.query else 0),
        key=x.key.new_empty(x.key.shape if needs.key else 0),
        negatives=x.negatives.new_empty(x.negatives.shape if needs.negatives else 0),
        scale=grad.new_empty(0) if x.scale is None or not needs.scale else x.scale.new_empty(x.scale.shape),
    )


softmax_loss_per_query = Op(
    "softmax_loss_per_query",
    fwd=_softmax_loss_per_query_fwd,
    bwd=_softmax_loss_per_query_bwd,
    reference=softmax_loss_per_query_reference,
    grads=Grads._fields,
    outputs=("out", *Saved._fields),
    triton="contrastive.kernels.softmax_loss_per_query",
    declines=why_not,
)
