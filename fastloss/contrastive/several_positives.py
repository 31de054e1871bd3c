"""InfoNCE of queries with several positives each: the loss of one of them, corrected in O(M P D) for the others.

With n_i the log-sum-exp of all candidates but the positive that stands first, s_i0, the loss of that one is
softplus(n_i - s_i0), as for a single positive: it has the denominator of all of them. So

    loss_i = softplus(n_i - s_i0) + (1 - smoothing) (s_i0 - a_i)

with a_i the mean of the positives' logits ("mean"), or the log of the sum of their exponentials ("sum"). With one
positive the correction is 0, and the loss keeps its digits where that positive has almost all of the probability.
Where the keys of the batch are no negatives, the other positives are missing among the candidates and are added:

    loss_i = log(e^(s_i0 + softplus(n_i - s_i0)) + sum_p>0 e^s_ip) - a_i
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import check_not_empty, check_reduction, reduce, result_dtype, row_shares
from .checks import counted, without
from .embeddings import _inner, inverse_norm, scale_of_rows
from .query_key_losses import QueryKey, query_key_loss

POSITIVES = ("mean", "sum")


def check_several(x: QueryKey, group: object) -> None:
    """Raise where an option has no meaning, or no form yet, for several positives."""
    refused = {
        "include_positive=False": not x.form.include_positive,
        "sampling": x.form.sampling is not None,
        "query_ids and key_ids": any(t is not None for t in x.ids),
        "excluded_pairs and negative_pairs": x.pairs is not None,
        "return_lse=True": x.return_lse,
        "group": group is not None,
        "label_smoothing beside in_batch=False": x.form.label_smoothing > 0 and not x.form.in_batch,
    }
    for option, is_given in refused.items():
        if is_given:
            raise ValueError(f"targets: with several positives a query, [M, P], {option} cannot be given; pass [M]")


def several_positives_loss(x: QueryKey, targets: Tensor, positives: str) -> Tensor:
    """The reduced loss of checked arguments; `targets` [M, P] has -1 where a query has fewer positives."""
    check_reduction(x.reduction)
    if x.reduction == "mean":
        check_not_empty(x.query.shape[0])
    dtype = result_dtype(x.query, x.key, x.negatives)
    targets = targets.sort(1, descending=True).values  # what is missing comes last, repeated ones are neighbours
    repeated = torch.zeros_like(targets, dtype=torch.bool)
    repeated[:, 1:] = targets[:, 1:] == targets[:, :-1]
    there = (targets >= 0) & ~repeated
    targets, some = targets.clamp_min(0), there[:, 0]
    weights = torch.ones_like(some, dtype=dtype) if x.weights is None else x.weights
    share = row_shares(weights, x.reduction, dtype).masked_fill(~some, 0.0)
    dropped = share == 0
    reduction = "none" if x.reduction == "none" else "sum"
    logits = _positive_logits(x, targets, there, dropped, dtype)
    if positives == "mean":
        of_all = logits.masked_fill(~there, 0.0).sum(1) / there.sum(1).clamp_min(1)
    else:
        of_all = torch.logsumexp(logits.masked_fill(~there & some[:, None], -torch.inf), 1)
    first = x._replace(targets=targets[:, 0])
    of_first: Any
    if x.form.in_batch:
        correction = (1 - x.form.label_smoothing) * (logits[:, 0] - of_all)
        of_first = query_key_loss(first._replace(weights=share, reduction=reduction))
        return of_first + reduce(share * correction.masked_fill(dropped, 0.0), reduction)
    of_first = query_key_loss(first._replace(weights=(~dropped).to(dtype), reduction="none"))
    candidates = torch.cat((logits[:, :1] + of_first[:, None], logits[:, 1:]), 1)
    there[:, 0] = True
    loss = torch.logsumexp(candidates.masked_fill(~there, -torch.inf), 1) - of_all
    return reduce(share * loss.masked_fill(dropped, 0.0), reduction)


def _positive_logits(x: QueryKey, targets: Tensor, there: Tensor, dropped: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, P]: the logits of each query's positives, of what is not `there` and of `dropped` queries some number."""
    query, key = without(x.query, dropped), counted(x.key, dropped)
    scale = scale_of_rows(inverse_norm(query, dtype) if x.form.normalize else None, x.scale, query, dtype)
    used = there & ~dropped[:, None]
    paired = key[targets].masked_fill(~used[:, :, None], 0.0)
    logits = scale[:, None] * _inner(query[:, None], paired, dtype)
    if x.form.normalize:
        logits = logits * inverse_norm(paired, dtype)
    if isinstance(x.bias, Tensor) and x.bias.ndim == 1:
        logits = logits + x.bias[targets]
    return logits
