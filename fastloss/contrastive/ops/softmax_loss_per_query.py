"""The op of the plain loss whose negatives [M, K, D] are each row's own: one call from embeddings to loss.

    s_ik   = scale factor c(query_i) c(n_ik) <query_i, n_ik>      c(x) = 1 / |x| with `normalize` (0 for zero vectors),
                                                                  else 1; no `scale`: 1
    p_i    = scale factor c(query_i) c(key_i) <query_i, key_i>    the positive
    n_i    = log sum_k e^s_ik
    loss_i = softplus(n_i - p_i)                                  without `include_positive`: n_i - p_i; no negatives: 0
    out    = share_i loss_i [M], their sum or their mean          by `reduction`: "none", "sum", "mean"; no `share`: 1
             rows of share 0 are left out: nothing of them is multiplied, be it NaN

With w_i = d out / d loss_i, g_i = w_i sigmoid(n_i - p_i) (without `include_positive`: w_i), r_i = scale factor
c(query_i) and t_i = sum_k e^(s_ik - n_i) c(n_ik) n_ik, which is summed in the forward's one read of the negatives:

    u_i       = g_i (t_i - c(key_i) key_i)
    d query_i = r_i (u_i - c(query_i)^2 <query_i, u_i> query_i)   without `normalize`: r_i u_i
    d key_i   = -g_i r_i c(key_i) (query_i - c(key_i)^2 <query_i, key_i> key_i)
    d scale   = sum_i r_i <query_i, u_i> / scale
    d n_ik    = as in :mod:`softmax_stats_per_query`, of G_ik = g_i e^(s_ik - n_i)

`needs` says what will be differentiated, in bits: QUERY, KEY, SCALE, NEGATIVES. The forward makes the first three
gradients, of each row's loss, in float32; for the last it keeps the logits and c(n_ik), M K floats each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import Op, reduce, result_dtype
from ..embeddings import embed
from ..options import SoftmaxForm
from ..row_losses import row_losses, statistics
from ..save_plan import KEY, NEGATIVES, QUERY, SCALE
from .softmax_stats_per_query import why_not


def contrastive_own_reference(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    scale: Tensor | None,
    share: Tensor | None,
    factor: float,
    include_positive: bool,
    normalize: bool,
    reduction: str,
    needs: int,
) -> Tensor:
    """The loss in dense differentiable torch."""
    dtype = result_dtype(query, key, negatives)
    gone = torch.zeros_like(query[:, :1], dtype=torch.bool) if share is None else (share == 0)[:, None]
    query, key, negatives = (
        x.masked_fill(mask, 0.0) for x, mask in ((query, gone), (key, gone), (negatives, gone[:, :, None]))
    )
    anchor = embed(query, dtype, normalize) * factor
    if scale is not None:
        anchor = anchor * scale.reshape(())
    positive = (anchor * embed(key, dtype, normalize)).sum(1)
    logits = torch.bmm(embed(negatives, dtype, normalize), anchor[:, :, None]).squeeze(2)
    each = statistics(logits, torch.ones_like(logits, dtype=torch.bool), False, 0.0)
    loss = row_losses(positive, each, factor, SoftmaxForm(include_positive)).loss
    return reduce(loss if share is None else loss * share, reduction)


def _contrastive_own_fwd(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    scale: Tensor | None,
    share: Tensor | None,
    factor: float,
    include_positive: bool,
    normalize: bool,
    reduction: str,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out; n, the maxima, p and r; logits and c of the negatives; gradients of query, key, and scale by rows."""
    rows, count, width = negatives.shape
    single = query.new_empty(0, dtype=torch.float32)
    kept = rows if needs & NEGATIVES else 0
    return (
        single.new_empty(rows if reduction == "none" else ()),
        single.new_empty(4, kept),
        single.new_empty(kept, count),
        single.new_empty(kept, count),
        single.new_empty(rows if needs & QUERY else 0, width),
        single.new_empty(rows if needs & KEY else 0, width),
        single.new_empty(rows if needs & SCALE else 0),
    )


def _contrastive_own_bwd(  # as many parameters as the forward, the results and the flags are
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    scale: Tensor | None,
    share: Tensor | None,
    factor: float,
    include_positive: bool,
    normalize: bool,
    reduction: str,
    needs: int,
    state: Tensor,
    logits: Tensor,
    inverse: Tensor,
    query_grad: Tensor,
    key_grad: Tensor,
    scale_grad: Tensor,
    needs_query: bool,
    needs_key: bool,
    needs_negatives: bool,
    needs_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape if needs_query else 0),
        key.new_empty(key.shape if needs_key else 0),
        negatives.new_empty(negatives.shape if needs_negatives else 0),
        grad.new_empty(0) if scale is None or not needs_scale else scale.new_empty(scale.shape),
    )


contrastive_own = Op(
    "contrastive_own",
    fwd=_contrastive_own_fwd,
    bwd=_contrastive_own_bwd,
    reference=contrastive_own_reference,
    grads=("query", "key", "negatives", "scale"),
    outputs=("out", "state", "logits", "inverse", "query_grad", "key_grad", "scale_grad"),
    triton="contrastive.kernels.softmax_loss_per_query",
    declines=why_not,
)
