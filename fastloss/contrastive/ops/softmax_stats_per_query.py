"""The op of per-sample negatives: statistics of each row's logits with negatives [M, K, D] of its own, read once.

    s_ik = row_scale_i c_ik <query_i, n_ik>     c_ik = 1 / |n_ik| with `normalize` (0 for zero vectors), else 1
    A_i  = {k: mask_ik and not s_ik > logit_limit_i}    all of them without `mask` and `logit_limit`; of a negative
                                                    outside the mask nothing is read, be it NaN

The statistics [S, M] are those of softmax_stats.py, without its directions: log-sum-exp, maximum, with `moments` sum
and count, with `hardness` beta > 0 the log-sum-exps of (1 + beta) (s - max) and beta (s - max).
With G_ik = d loss / d s_ik,

    t_i      = sum_k G_ik c_ik n_ik
    d query  = row_scale_i t_i                  d row_scale = <query_i, t_i>
    d n_ik   = G_ik c_ik (row_scale_i query_i - s_ik c_ik n_ik)      without `normalize` the last term is absent

`save` is what the forward leaves for the backward. "weighted_keys": each statistic's part of t, divided by its upstream
gradient, [statistics with a gradient, M, D]; the queries' gradient then needs no negatives. "logits": these and the
logits (-inf outside A) and the c, M K floats each; the gradient of the negatives is one read and write of them.
A row whose statistics have the upstream gradient 0 has the gradient 0, even where it holds NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core import Op, result_dtype
from ..embeddings import embed
from ..options import SoftmaxOptions
from ..row_losses import statistics

WIDEST = 8192  # a Triton program holds a whole negative


class Inputs(NamedTuple):
    """Of the op; what each is stands above."""

    query: Tensor  # [M, D]
    negatives: Tensor  # [M, K, D]
    mask: Tensor | None  # [M, K] bool
    row_scale: Tensor  # [M]
    logit_limit: Tensor | None  # [M]
    normalize: bool
    moments: bool
    hardness: float
    save: str


class Saved(NamedTuple):
    """All that the forward returns: the backward needs the statistics themselves too."""

    stats: Tensor  # [S, M]
    weighted_keys: Tensor  # [powers + moments, M, D] where anything is saved, else empty
    logits: Tensor  # [M, K] with "logits", else empty
    inverse_norms: Tensor  # [M, K], c; as the logits


class Grads(NamedTuple):
    query: Tensor
    negatives: Tensor
    row_scale: Tensor


class Needs(NamedTuple):
    query: bool
    negatives: bool
    row_scale: bool


def softmax_stats_per_query_reference(x: Inputs) -> Tensor:
    """The definition, dense and in differentiable torch."""
    dtype = result_dtype(x.query, x.negatives)
    negatives = x.negatives if x.mask is None else x.negatives.masked_fill(~x.mask[:, :, None], 0.0)
    vectors = embed(negatives, dtype, x.normalize)
    logits = x.row_scale[:, None] * torch.bmm(vectors, x.query.to(dtype)[:, :, None]).squeeze(2)
    allowed = torch.ones_like(logits, dtype=torch.bool) if x.mask is None else x.mask
    if x.logit_limit is not None:
        allowed = allowed & ~(logits.detach() > x.logit_limit[:, None])
    return statistics(logits, allowed, x.moments, x.hardness)


def _softmax_stats_per_query_fwd(x: Inputs) -> Saved:
    rows, count, dim = x.negatives.shape
    sums = x.moments + (3 if x.hardness else 1)
    saved_rows = rows if x.save == "logits" else 0
    like = x.query.new_empty(0, dtype=torch.float32)
    return Saved(
        stats=like.new_empty(1 + x.moments + sums, rows),
        weighted_keys=like.new_empty(sums if x.save else 0, rows, dim),
        logits=like.new_empty(saved_rows, count),
        inverse_norms=like.new_empty(saved_rows, count),
    )


def _softmax_stats_per_query_bwd(grad: Tensor, x: Inputs, saved: Saved, needs: Needs) -> Grads:
    rows, count, dim = x.negatives.shape
    return Grads(
        query=x.query.new_empty(rows if needs.query else 0, dim),
        negatives=x.negatives.new_empty(rows if needs.negatives else 0, count, dim),
        row_scale=x.row_scale.new_empty(rows if needs.row_scale else 0),
    )


def why_not(query: Tensor, *rest: object) -> str | None:
    if query.device.type == "cpu" or query.shape[1] <= WIDEST:
        return None
    return f"with negatives of each query the kernels take embeddings of up to {WIDEST} numbers, not {query.shape[1]}"


softmax_stats_per_query = Op(
    "softmax_stats_per_query",
    fwd=_softmax_stats_per_query_fwd,
    bwd=_softmax_stats_per_query_bwd,
    reference=softmax_stats_per_query_reference,
    grads=Grads._fields,
    outputs=Saved._fields,
    triton="contrastive.kernels.softmax_stats_per_query",
    declines=why_not,
)


def per_query_statistics(
    query: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    row_scale: Tensor,
    form: SoftmaxOptions,
    logit_limit: Tensor | None,
    moments: bool,
    dropped: Tensor | None,
) -> Tensor:
    """Statistics [S, M] of the negatives [M, K, D] in the mask [M, K], in the order of :mod:`softmax_stats`.

    `row_scale` [M] is the scale over the query's norm (with `form.normalize`, else the scale); `logit_limit` [M] is in
    units of the logits, before any bias. The moments are there if `moments`, the reweighted ones if the sampling of
    `form` has a hardness. Negatives of `dropped` rows [M] get no gradient, whatever they hold.
    """
    save = ""
    if torch.is_grad_enabled() and negatives.requires_grad:
        save = "logits"
    elif torch.is_grad_enabled() and (query.requires_grad or row_scale.requires_grad):
        save = "weighted_keys"
    hardness = form.sampling.hardness if form.sampling is not None else 0.0
    backend = softmax_stats_per_query.backend(query, negatives, row_scale)
    if dropped is not None:
        row_scale = row_scale.masked_fill(dropped, 0.0)
        if backend == "reference":  # kernels skip what has no upstream gradient
            negatives = negatives.masked_fill(dropped[:, None, None], 0.0)
    x = Inputs(query, negatives, mask, row_scale, logit_limit, form.normalize, moments, float(hardness), save)
    return softmax_stats_per_query(*x, backend=backend)
