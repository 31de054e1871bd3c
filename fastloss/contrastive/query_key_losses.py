"""The softmax losses of queries and keys, assembled from the statistics of their negatives in O(M D): InfoNCE and CLIP.

The positives' logits, the norms of the embeddings and all that is one number per row are plain torch here, so that
autograd has their exact gradients, in float32 whatever the kernels' products are in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import check_not_empty, check_reduction, full_precision, result_dtype, row_shares
from ..core.backends import fitting
from .checks import counted, dropped_rows, reduce_output, without
from .embeddings import _inner, are_bfloat16, inverse_norm, scale_of_rows, upcast_on_cpu
from .ops import softmax_loss as loss_op
from .ops import softmax_loss_per_query as loss_per_query_op
from .ops import softmax_loss_shared as loss_shared_op
from .ops import softmax_stats as stats_op
from .ops.softmax_stats_per_query import per_query_statistics
from .options import ContrastiveOutput, SoftmaxOptions
from .pairs import ListedPairs, words_of
from .row_losses import merged, row_losses
from .save_plan import KEY, NEGATIVES, QUERY, SCALE, save_of_loss


class QueryKey(NamedTuple):
    """The checked arguments of :func:`query_key_loss`, as :func:`info_nce` has them."""

    query: Tensor  # [M, D]
    key: Tensor  # [N, D]
    negatives: Tensor | None  # [K, D] or [M, K, D]
    negatives_mask: Tensor | None  # [M, K] of negatives [M, K, D]
    scale: Tensor | float
    bias: Tensor | float | None
    targets: Tensor | None  # [M]
    ids: tuple[Tensor | None, Tensor | None]  # the queries' and the keys', both or neither
    weights: Tensor | None  # [M]
    form: SoftmaxOptions
    reduction: str
    return_lse: bool
    workspace_mib: float
    pairs: ListedPairs | None = None  # of rows and of columns of keys and shared negatives


def query_key_loss(x: QueryKey) -> Tensor | ContrastiveOutput:
    """The loss of checked arguments: in one op where none of the options needs more, else from the losses of rows."""
    plain = not x.return_lse and not isinstance(x.bias, Tensor) and x.pairs is None
    if plain and (loss := shared_negatives_loss(x)) is not None:
        return loss
    dropped = dropped_rows(x.weights)
    # a symmetric loss has each query among its negatives
    query = counted(x.query, dropped) if x.form.symmetric else without(x.query, dropped)
    key, negatives = counted(x.key, dropped), x.negatives
    if negatives is not None and negatives.ndim == 2:
        negatives = counted(negatives, dropped)
    if plain and all(t is None for t in x.ids):
        loss = softmax_loss(x._replace(query=query, key=key, negatives=negatives))
        if loss is not None:
            return loss
    with full_precision(query):
        rows = softmax_rows(x._replace(query=query, key=key, negatives=negatives), dropped)
        return reduce_output(rows, x.weights, x.reduction, x.return_lse)


def _sampling(form: SoftmaxOptions) -> tuple[bool, float, float | None]:
    """Whether the form needs moments, its hardness, and its margin."""
    sampling = form.sampling
    if sampling is None:
        return form.label_smoothing > 0, 0.0, None
    moments = form.label_smoothing > 0 or sampling.tau_plus > 0 or sampling.hardness > 0
    return moments, float(sampling.hardness), sampling.margin


def softmax_loss(x: QueryKey) -> Tensor | None:
    """The reduced loss of a form without options, of in-batch negatives or of each row's own (see
    :mod:`softmax_loss` and :mod:`softmax_loss_per_query`); None where their ops do not serve."""
    query, key, negatives, form = x.query, x.key, x.negatives, x.form
    if form.sampling is not None or form.label_smoothing != 0:
        return None
    per_query = negatives is not None
    embeddings = (query, key) if negatives is None else (query, key, negatives)
    if negatives is not None and negatives.ndim == 2:
        return None
    if per_query and (form.in_batch or x.targets is not None or key.shape[0] != query.shape[0]):
        return None
    op = loss_per_query_op.softmax_loss_per_query if per_query else loss_op.softmax_loss
    if (backend := op.backend(*embeddings)) == "reference":
        return None
    row_weight, reduction = _shares(query, x.weights, x.reduction, result_dtype(*embeddings))
    learned = x.scale if isinstance(x.scale, Tensor) else None
    needs = _needs((QUERY, query), (KEY, key), (SCALE, learned), (NEGATIVES, negatives))
    fixed_scale = x.scale if isinstance(x.scale, float) else 1.0
    if negatives is not None:
        inputs = loss_per_query_op.Inputs(
            query, key, negatives, x.negatives_mask, learned, row_weight, fixed_scale, form.include_positive,
            form.normalize, reduction, needs,
        )  # fmt: skip
        return op(*inputs, backend=backend)
    save, saved_rows = save_of_loss(backend, query, key, form.symmetric, reduction, needs, x.workspace_mib)
    return op(
        *loss_op.Inputs(
            query, key, learned, row_weight, x.targets, fixed_scale, form.include_positive, form.symmetric,
            form.normalize, reduction, needs, save, saved_rows, x.workspace_mib,
        ),
        backend=backend,
    )  # fmt: skip


def shared_negatives_loss(x: QueryKey) -> Tensor | None:
    """The reduced loss of plain arguments whose negatives are shared and frozen (see :mod:`softmax_loss_shared`); None
    where that op does not serve."""
    negatives, form, op = x.negatives, x.form, loss_shared_op.softmax_loss_shared
    if negatives is None or negatives.ndim != 2 or form.in_batch or x.targets is not None:
        return None
    if form.sampling is not None or form.label_smoothing != 0 or (negatives.requires_grad and torch.is_grad_enabled()):
        return None
    if x.key.shape != x.query.shape or not x.query.dtype == x.key.dtype == negatives.dtype:
        return None
    if "triton" not in fitting(x.query.device) or op.backend(x.query, x.key, negatives) != "triton":
        return None
    row_weight, reduction = _shares(x.query, x.weights, x.reduction, result_dtype(x.query))
    learned = x.scale if isinstance(x.scale, Tensor) else None
    fixed_scale = x.scale if isinstance(x.scale, float) else 1.0
    needs = _needs((QUERY, x.query), (KEY, x.key), (SCALE, learned))
    query_ids, key_ids = x.ids
    covered = key_ids is not None and key_ids.shape[0] > x.key.shape[0]  # else they are the keys' alone
    row_ids, column_ids = (query_ids, key_ids[x.key.shape[0] :]) if covered else (None, None)  # type: ignore[index]
    inputs = loss_shared_op.Inputs(
        x.query, x.key, negatives, learned, row_weight, row_ids, column_ids, fixed_scale, form.include_positive,
        form.normalize, reduction, needs, x.workspace_mib,
    )  # fmt: skip
    return op(*inputs, backend="triton")


def _shares(query: Tensor, weights: Tensor | None, reduction: str, dtype: torch.dtype) -> tuple[Tensor | None, str]:
    """What each row counts, None for all alike, and the reduction that is left."""
    check_reduction(reduction)
    if reduction == "mean":
        check_not_empty(query.shape[0])
    if weights is None:
        return None, reduction
    return row_shares(weights, reduction, dtype), "sum" if reduction == "mean" else reduction


def _needs(*inputs: tuple[int, Tensor | None]) -> int:
    """The bits of what will be differentiated."""
    if not torch.is_grad_enabled():
        return 0
    return sum(bit for bit, x in inputs if x is not None and x.requires_grad)


def softmax_rows(
    x: QueryKey,
    dropped: Tensor | None,
    statistics: Callable[[stats_op.Inputs, str], Tensor] = lambda x, columns: stats_op.softmax_statistics(x),
) -> ContrastiveOutput:
    """Row losses [M] of the forms with one positive per row; of a symmetric one the mean of the two directions.

    Of `dropped` rows [M] nothing arrives in a sum over rows. `statistics` finds those of the keys or the shared
    negatives (its second argument says of which), of which other ranks may have a part.
    """
    query, key, negatives, scale, bias, targets, form = x.query, x.key, x.negatives, x.scale, x.bias, x.targets, x.form
    dtype = result_dtype(query, key, negatives)
    query_ids, key_ids = x.ids
    bfloat16 = are_bfloat16(query, key)
    bfloat16_negatives = negatives is not None and are_bfloat16(query, negatives)
    query, key = upcast_on_cpu(query), upcast_on_cpu(key)
    rows, keys = query.shape[0], key.shape[0]
    moments, hardness, margin = _sampling(form)
    row_scale = scale_of_rows(inverse_norm(query, dtype) if form.normalize else None, scale, query, dtype)
    key_scale = inverse_norm(key, dtype) if form.normalize and form.in_batch else None
    columns = bias if isinstance(bias, Tensor) and bias.ndim == 1 else None
    target = slice(0, rows) if targets is None else targets
    paired = without(key[target] if targets is not None or keys > rows else key, dropped)
    positive = row_scale * _inner(query, paired, dtype)
    if form.normalize:
        positive = positive * (inverse_norm(paired, dtype) if key_scale is None else key_scale[target])
    logit_limit = None if margin is None else (positive + scale * margin).detach()
    if columns is not None:
        positive = positive + columns[target]
    stats = None
    if form.in_batch:
        row_ids, column_ids = (None, None) if key_ids is None else (query_ids, key_ids[:keys])
        stats = _left_out(dropped, statistics(stats_op.Inputs(
            query, key, row_scale, key_scale, None if columns is None else columns[:keys], targets, row_ids, column_ids,
            logit_limit, targets is None, form.symmetric, False, moments, bfloat16, False, hardness, x.workspace_mib,
        ).with_pairs(words_of(x.pairs, rows, keys)), "key"))  # fmt: skip
    if negatives is not None and negatives.ndim == 3:
        found = per_query_statistics(query, negatives, x.negatives_mask, row_scale, form, logit_limit, moments, dropped)
        extra = _left_out(dropped, found)
        union = extra if stats is None else merged(stats[0], extra, moments, hardness)
        stats = torch.stack([union] if stats is None else [union, *stats[1:]])
    elif negatives is not None:
        negatives = upcast_on_cpu(negatives)
        covered = key_ids is not None and key_ids.shape[0] > keys
        row_ids, column_ids = (query_ids, key_ids[keys:]) if covered else (None, None)  # type: ignore[index]
        extra = _left_out(dropped, statistics(stats_op.Inputs(
            query, negatives, row_scale, inverse_norm(negatives, dtype) if form.normalize else None,
            None if columns is None else columns[keys:], None, row_ids, column_ids, logit_limit,
            False, False, False, moments, bfloat16_negatives, False, hardness, x.workspace_mib,
        ).with_pairs(words_of(x.pairs, rows, negatives.shape[0], keys)), "negatives"))  # fmt: skip
        if stats is not None:
            extra = torch.stack([merged(stats[0], extra[0], moments, hardness), *stats[1:]])
        stats = extra
    assert stats is not None
    positive = _left_out(dropped, positive)
    out = row_losses(positive, stats if form.symmetric else stats[0], scale, form)
    if form.symmetric:
        out = out._replace(loss=out.loss.mean(0))
    if bias is not None and columns is None:  # one number for all logits cancels
        out = out._replace(loss=out.loss + 0.0 * bias, lse=out.lse + bias)
    return out._replace(lse=_left_out(dropped, out.lse))


def _left_out(dropped: Tensor | None, rows: Tensor) -> Tensor:
    """[..., M] with 0 for dropped rows: what was NaN there has a gradient of 0 now, and not 0 times NaN."""
    return rows if dropped is None else rows.masked_fill(dropped, 0.0)
